"""Feature maps φ, which replace softmax attention's exp(q·k/√d) by a dot product φ(q)·φ(k) ≥ 0.

Shape letters: B batch, L length, H query heads, D head dim, P projected dim (`feature_dim`), F features that come out.

A map belongs to one side, query or key, because a factor per query cancels in Σ s v / Σ s while a factor per key does
not. So maps with an exponential divide each query's features by their sum (exact, and never overflows), and keep each
key's features in proportion by bending the exponent only where float32 would soon end: see `bounded_exponent`.

All arithmetic is in float32 at least. The result is rounded once, to the wider of the input's and the weight's dtype,
so that a caller uses the same φ in numerator and denominator.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Side = Literal["query", "key"]

# exp(40) = 2.4e17: sums over a million keys, and their products with values and gradients, stay far inside float32.
KEY_EXPONENT_BOUND = 40.0


def bounded_exponent(z: Tensor, bound: float = KEY_EXPONENT_BOUND) -> Tensor:
    """z where |z| ≤ bound, and beyond it sign(z)·(bound + log(1 + |z| − bound)).

    So exp(bounded_exponent(z)) is exp(z) within ±bound, then grows linearly (and falls hyperbolically on the negative
    side), with a continuous first derivative that never reaches zero. Elementwise; any float dtype.
    """
    excess = (z.abs() - bound).clamp_min(0)
    return z - torch.sign(z) * (excess - torch.log1p(excess))


def _orthogonal_blocks(num_heads: int, dim: int, num_blocks: int, generator: torch.Generator) -> Tensor:
    """Independent random orthogonal matrices, (num_heads, num_blocks, dim, dim), float64, uniformly distributed."""
    shape = (num_heads, num_blocks, dim, dim)
    q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"))
    return q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)


class FeatureMap(nn.Module):
    """φ for all heads of one layer and one side. Subclasses define `num_features` and `activate` (or `features`).

    Arguments: `num_heads` is the number of query heads on both sides (keys are repeated for GQA before φ, so that each
    query head has its own key map); `feature_dim` is the width of the projection (default: head_dim); `seed` serves
    the maps and initialisations that draw random numbers, and must be the same on both sides; `options` are the
    map's own, `option_defaults` lists them. Raises ValueError for an unknown option or a feature_dim that does not fit.
    """

    name: ClassVar[str]
    trainable: ClassVar[bool] = False
    feature_dim_is_head_dim: ClassVar[bool] = True
    option_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        side: Side,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if side not in ("query", "key"):
            raise ValueError(f"side must be 'query' or 'key', not {side!r}")
        if feature_dim is not None and feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, not {feature_dim}")
        if self.feature_dim_is_head_dim and feature_dim not in (None, head_dim):
            raise ValueError(
                f"feature map '{self.name}' has no projection: leave feature_dim out, or make it head_dim ({head_dim})"
            )
        unknown = sorted(set(options or {}) - set(self.option_defaults))
        if unknown:
            known = ", ".join(self.option_defaults) or "none"
            raise ValueError(f"feature map '{self.name}' has no option {', '.join(unknown)}; its options: {known}")
        self.num_heads, self.head_dim, self.side, self.seed = num_heads, head_dim, side, seed
        self.feature_dim = head_dim if feature_dim is None else feature_dim
        self.options = {**self.option_defaults, **(options or {})}
        for key, default in self.option_defaults.items():
            value = self.options[key]
            if isinstance(default, (int, float)) and not _is_positive(value):
                raise ValueError(f"{key} must be a number > 0, not {value!r}")

    @property
    def num_features(self) -> int:
        """F, the width of φ(x)."""
        return self.feature_dim

    @property
    def projection_HDP(self) -> Tensor | None:
        """The matrices that `features` multiplies x with, or None for a map without any."""
        return None

    def reset_parameters(self) -> None:
        """Puts weights (and drawn projections) back to their documented start. Uses no global random numbers."""

    def forward(self, x_BHLD: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """φ(x), shape (B, H, L, F). `positions_BL` are absolute positions; only `cosformer` looks at them."""
        return self.features(x_BHLD, self.projection_HDP, positions_BL)

    def features(self, x_BHLD: Tensor, projection_HDP: Tensor | None, positions_BL: Tensor | None = None) -> Tensor:
        """φ(x) with the given projection, so that a caller may work through a few heads at a time."""
        dtype = x_BHLD.dtype
        if projection_HDP is not None:
            dtype = torch.promote_types(dtype, projection_HDP.dtype)
        compute = torch.promote_types(dtype, torch.float32)
        z = x_BHLD.to(compute)
        if projection_HDP is not None:
            z = torch.matmul(z, projection_HDP.to(compute))
        return self.activate(z, positions_BL).to(dtype)

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        """φ as a function of the projected input, in float32 or float64."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, head_dim={self.head_dim}, feature_dim={self.feature_dim}, "
            f"num_features={self.num_features}, side={self.side}"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


class LearnedFeatureMap(FeatureMap):
    """φ(x) = f(W x): one matrix per head, no bias, float32, shape (H, D, P).

    At the start W is the identity times `init_scale`. With feature_dim < head_dim, the identity's first columns. With
    feature_dim > head_dim there are several D×D blocks, the last one cut to fit, and option `init` says which:
    - 'identity': block b is the identity times 2⁻ᵇ. Equal copies would get equal gradients and stay copies; powers of
      two give each block a temperature of its own.
    - 'identity+orthogonal': block 0 is the identity; each further block is a random rotation, one per head, drawn
      from `seed` alone, hence the same on the query and the key side.
    """

    trainable = True
    feature_dim_is_head_dim = False
    option_defaults: ClassVar[dict[str, Any]] = {"init": "identity", "init_scale": 1.0}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.options["init"] not in ("identity", "identity+orthogonal"):
            raise ValueError(f"init must be 'identity' or 'identity+orthogonal', not {self.options['init']!r}")
        self.weight = nn.Parameter(torch.empty(self.num_heads, self.head_dim, self.feature_dim, dtype=torch.float32))
        self.reset_parameters()

    @property
    def projection_HDP(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(self.initial_weight_HDP())

    def initial_weight_HDP(self) -> Tensor:
        """The weight at the start: float32 on the CPU, whatever device the map is on."""
        num_blocks = math.ceil(self.feature_dim / self.head_dim)
        eye = torch.eye(self.head_dim, dtype=torch.float64, device="cpu").expand(self.num_heads, 1, -1, -1)
        if self.options["init"] == "identity":
            blocks = torch.cat([eye * 0.5**b for b in range(num_blocks)], dim=1)
        else:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            rotations = _orthogonal_blocks(self.num_heads, self.head_dim, num_blocks - 1, generator)
            blocks = torch.cat([eye, rotations], dim=1)
        weight = blocks.transpose(1, 2).flatten(2)[..., : self.feature_dim]
        return (weight * self.options["init_scale"]).float()


class HedgehogSoftmax(LearnedFeatureMap):
    """φ(x) = [softmax(z) ⊕ softmax(−z)], two softmaxes over the features (the authors' code)."""

    name = "hedgehog_softmax"

    @property
    def num_features(self) -> int:
        return 2 * self.feature_dim

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        return torch.cat([torch.softmax(z_BHLP, dim=-1), torch.softmax(-z_BHLP, dim=-1)], dim=-1)


class HedgehogExp(LearnedFeatureMap):
    """φ(x) = [exp(z) ⊕ exp(−z)] (the paper's equation).

    Queries are divided by the sum of their features, which cancels in the attention. Keys are exact for |z| ≤ 40 and
    bent beyond it (`bounded_exponent`).
    """

    name = "hedgehog_exp"

    @property
    def num_features(self) -> int:
        return 2 * self.feature_dim

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        if self.side == "query":
            return torch.softmax(torch.cat([z_BHLP, -z_BHLP], dim=-1), dim=-1)
        exponent = bounded_exponent(z_BHLP)
        return torch.exp(torch.cat([exponent, -exponent], dim=-1))


class HedgehogJoint(LearnedFeatureMap):
    """φ(x) = softmax([2z ⊕ −2z]), one softmax over both halves (flash-linear-attention)."""

    name = "hedgehog_joint"

    @property
    def num_features(self) -> int:
        return 2 * self.feature_dim

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        return torch.softmax(torch.cat([2 * z_BHLP, -2 * z_BHLP], dim=-1), dim=-1)


class Relu(LearnedFeatureMap):
    """φ(x) = relu(z) (T2R, Kasai et al. 2021, without its bias, as the Hedgehog paper's baseline has it)."""

    name = "relu"

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        return torch.relu(z_BHLP)


class Elu(FeatureMap):
    """φ(x) = 1 + elu(x) (Katharopoulos et al. 2020). No weights."""

    name = "elu"

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        return 1 + nn.functional.elu(z_BHLP)


class ExpT(FeatureMap):
    """φ(x) = exp(t·x), with the temperature t as option `temperature`. No weights. Sides as in `HedgehogExp`."""

    name = "exp_t"
    option_defaults: ClassVar[dict[str, Any]] = {"temperature": 1.0}

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        z = z_BHLP * self.options["temperature"]
        return torch.softmax(z, dim=-1) if self.side == "query" else torch.exp(bounded_exponent(z))


class Cosformer(FeatureMap):
    """φ(x)_i = relu(x) ⊗ [cos θ_i, sin θ_i], θ_i = (π/2)·i/M (Qin et al. 2022). No weights, 2·D features.

    The weight of a key falls with its distance as cos(θ_i − θ_j). M is option `max_positions`; positions beyond it
    count as M, which keeps φ ≥ 0.
    """

    name = "cosformer"
    option_defaults: ClassVar[dict[str, Any]] = {"max_positions": 4096}

    @property
    def num_features(self) -> int:
        return 2 * self.head_dim

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        if positions_BL is None:
            positions_BL = torch.arange(z_BHLP.shape[2], device=z_BHLP.device).unsqueeze(0)
        fraction_BL = (
            positions_BL.to(z_BHLP.dtype).clamp(0, self.options["max_positions"]) / self.options["max_positions"]
        )
        angle_B1L1 = (fraction_BL * (math.pi / 2))[:, None, :, None]
        positive = torch.relu(z_BHLP)
        return torch.cat([positive * angle_B1L1.cos(), positive * angle_B1L1.sin()], dim=-1)


class Taylor(FeatureMap):
    """Second-order Taylor expansion: φ(q)·φ(k) = 1 + t + t²/2 with t = q·k/√D, so s ≥ 1/2. No weights.

    The symmetric half of x⊗x is kept once, its off-diagonal entries times √2: 1 + D + D(D+1)/2 features, some of them
    negative.
    """

    name = "taylor"

    @property
    def num_features(self) -> int:
        return 1 + self.head_dim + self.head_dim * (self.head_dim + 1) // 2

    def activate(self, z_BHLP: Tensor, positions_BL: Tensor | None) -> Tensor:
        x = z_BHLP * self.head_dim**-0.25
        rows, columns = torch.triu_indices(self.head_dim, self.head_dim, device=x.device)
        factor = torch.ones(len(rows), dtype=x.dtype, device=x.device).masked_fill(rows == columns, math.sqrt(0.5))
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., rows] * x[..., columns] * factor], dim=-1)


class Performer(FeatureMap):
    """FAVOR+: φ(x)_f = exp(ω_f·x̂ − |x̂|²/2)/√F, x̂ = x/D^¼ (Choromanski et al. 2021), whose mean is softmax attention.

    The directions ω are Gaussian in length and orthogonal in blocks of D, drawn per head from `seed` (the same on both
    sides), kept in a buffer so that checkpoints carry them. `redraw(seed)` draws others: do it on both sides.
    """

    name = "performer"
    feature_dim_is_head_dim = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        directions = torch.empty(self.num_heads, self.head_dim, self.feature_dim, dtype=torch.float32)
        self.register_buffer("directions", directions, persistent=True)
        self.reset_parameters()

    @property
    def projection_HDP(self) -> Tensor:
        return self.get_buffer("directions")

    def reset_parameters(self) -> None:
        self.redraw(self.seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Replaces the random directions by those of `seed`."""
        generator = torch.Generator("cpu").manual_seed(seed)
        num_blocks = math.ceil(self.feature_dim / self.head_dim)
        blocks = _orthogonal_blocks(self.num_heads, self.head_dim, num_blocks, generator)
        directions = blocks.transpose(1, 2).flatten(2)[..., : self.feature_dim]
        gaussians = torch.randn(directions.shape, generator=generator, dtype=torch.float64, device="cpu")
        self.projection_HDP.copy_(directions * gaussians.norm(dim=1, keepdim=True))
        self.seed = seed

    def features(self, x_BHLD: Tensor, projection_HDP: Tensor | None, positions_BL: Tensor | None = None) -> Tensor:
        assert projection_HDP is not None
        dtype = torch.promote_types(x_BHLD.dtype, projection_HDP.dtype)
        compute = torch.promote_types(dtype, torch.float32)
        x = x_BHLD.to(compute) * self.head_dim**-0.25
        z = torch.matmul(x, projection_HDP.to(compute))
        if self.side == "query":  # |x̂|²/2 is a factor per query, and cancels
            return torch.softmax(z, dim=-1).to(dtype)
        exponent = bounded_exponent(z - x.square().sum(dim=-1, keepdim=True) / 2)
        return (torch.exp(exponent) * self.feature_dim**-0.5).to(dtype)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    cls.name: cls
    for cls in (HedgehogSoftmax, HedgehogExp, HedgehogJoint, Elu, Relu, Performer, Cosformer, Taylor, ExpT)
}


def make_feature_map(
    name: str,
    *,
    num_heads: int,
    head_dim: int,
    feature_dim: int | None = None,
    side: Side,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> FeatureMap:
    """Builds the map called `name`. Raises ValueError listing the known names, or naming the argument at fault."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map '{name}'; known: {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name](
        num_heads=num_heads, head_dim=head_dim, feature_dim=feature_dim, side=side, seed=seed, options=options
    )
