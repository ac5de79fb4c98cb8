"""Attention distillation of feature maps: one teacher pass, a loss and a gradient per layer, nothing of a layer kept.

    for each layer of the frozen base:   q, k, v → loss of this layer's maps → dW, clipped → next layer

Layers are independent: a layer's gradient, its clipping and its update (an optimizer group of its own) never look at
another layer, so any subset of layers trained alone ends with the same weights, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kernels.distill_backends import DistillBackend, select_distill_backend
from ..kernels.distill_loss import output_mse_loss
from ..kernels.map_training import sampled_row_weights
from ..kernels.precomputed_gradient import attach_gradient
from ..kernels.visible_ranges import Visibility
from .modeling.convert import feature_map_modules
from .modeling.hedgehog_attention import FEATURE_MAP_NAMES
from .modeling.teacher import TeacherForward, TeacherLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import DistillConfig
    from .hidden_state_cache import HiddenStateCache
    from .modeling.hedgehog_model import HedgehogPreTrainedModel

Batch = Mapping[str, Any]

logger = logging.getLogger(__name__)

LONG_ROWS_BLOCK = 128
"""Rows that `distill.query_fraction` takes or leaves together where rows are long: a tile of the GPU kernel."""


class Teacher(nn.Module):
    """The frozen base as a module whose forward pass shows each wanted layer's attention to `visit`."""

    def __init__(self, base: PreTrainedModel, layers: Sequence[int]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.layers = tuple(layers)

    def forward(
        self,
        batch: Batch,
        packed: bool,
        visit: Callable[[TeacherLayer], None],
        entering_BLE: torch.Tensor | None = None,
        keep_entering: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Run up to the last wanted layer; from the first one on, where the states that enter it are given."""
        for layer in TeacherForward(self.base)(
            batch["input_ids"],
            layers=self.layers,
            mask_BL=batch["mask"],
            position_ids_BL=batch["position_ids"],
            segment_ids_BL=batch["segment_ids"] if packed else None,
            token_type_ids_BL=batch.get("token_type_ids"),
            entering_BLE=entering_BLE,
            keep_entering=keep_entering,
        ):
            visit(layer)
            del layer  # else it would live until the next one is there


class FeatureMapDistillation(nn.Module):
    """The maps of some layers, and their distillation loss. The teacher is no submodule: neither trained nor saved.

    Args:
        hedgehog: the converted model that the maps are taken from.
        teacher: `Teacher`, or the same under ZeRO-3.
        layers: which layers learn, ascending.
        backend: `model.attention_backend`: "auto", or "torch" for no GPU kernel.
        report: told once which implementation of the loss runs, and why.
    """

    def __init__(
        self,
        hedgehog: HedgehogPreTrainedModel,
        teacher: Callable[..., None],
        layers: Sequence[int],
        config: DistillConfig,
        *,
        backend: str = "auto",
        report: Callable[[str], None] = logger.info,
    ) -> None:
        super().__init__()
        maps = feature_map_modules(hedgehog)
        self.layers = nn.ModuleDict(
            {str(layer): nn.ModuleDict({name: maps[layer, name] for name in FEATURE_MAP_NAMES}) for layer in layers}
        )
        self.layer_indices = tuple(layers)
        self._teacher = (teacher,)  # inside a tuple nn.Module does not find it
        self._config = config
        self._backend_name, self._report = backend, report
        self._reported: set[str] = set()
        self.output_variance: dict[int, float] = {}
        """Variance of each layer's softmax attention output; the output error is counted in it."""
        self.hidden_states: HiddenStateCache | None = None
        """Where the states that enter the first of the layers are kept between epochs."""

    @property
    def learns(self) -> bool:
        """Whether these maps have weights."""
        return any(True for _ in self.parameters())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One optimizer group a layer."""
        return [
            {"params": list(layer.parameters()), "peak_learning_rate": learning_rate} for layer in self.layers.values()
        ]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(sum over layers of this micro-batch's share of their losses, shares of `kl_LH`, `loss_L`, `grad_norm_L` and
        `grad_norm_LH`, by head).

        Every layer's gradient over this micro-batch's mean loss is clipped to `gradient_clip`, then weighted with the
        micro-batch's share of the global batch's tokens.
        """
        share = int(batch["mask"].sum()) / batch["real_tokens_in_global_batch"]
        kl, losses, norms, head_norms = [], [], [], []
        parameters: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []

        row_weights_BL = self._draw_rows(batch)
        visibility = _visibility(batch, self._config.packing, row_weights_BL)

        def learn(seen: TeacherLayer) -> None:
            loss, kl_H = self._layer_loss(seen, batch, row_weights_BL, visibility)
            weights = list(self.layers[str(seen.layer_index)].parameters())
            grads = torch.autograd.grad(loss, weights)
            norm_H = torch.linalg.vector_norm(torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]), dim=0)
            norm = torch.linalg.vector_norm(norm_H)
            limit = self._config.gradient_clip
            scale = share if limit is None else share * torch.clamp(limit / (norm + 1e-6), max=1.0)
            parameters.extend(weights)
            gradients.extend(grad * scale for grad in grads)
            losses.append(loss.detach() * share)
            norms.append(norm * share)
            head_norms.append(norm_H * share)
            kl.append(kl_H * share)

        cache, entering = self.hidden_states, {}
        if cache is not None:
            entering = {"entering_BLE": cache.lookup(batch), "keep_entering": lambda states: cache.store(batch, states)}
        self._run_teacher(batch, self._config.packing, learn, **entering)
        shares = {
            "kl_LH": torch.stack(kl),
            "loss_L": torch.stack(losses),
            "grad_norm_L": torch.stack(norms),
            "grad_norm_LH": torch.stack(head_norms),
        }
        return attach_gradient(shares["loss_L"].sum(), parameters, gradients), shares

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
        """This rank's shares over validation batches: `kl_LH` summed over tokens, and `tokens`. Divide after summing.

        A batch with `counted` False is run and not counted.
        """
        kl_LH: torch.Tensor | None = None
        total = 0
        for batch in batches:
            kl: list[torch.Tensor] = []
            visibility = _visibility(batch, False, None)
            self._run_teacher(batch, False, lambda seen, b=batch, v=visibility, kl=kl: kl.append(self._kl(seen, b, v)))
            tokens = int(batch["mask"].sum()) if batch["counted"] else 0
            part = torch.stack(kl).double() * tokens
            kl_LH = part if kl_LH is None else kl_LH + part
            total += tokens
        assert kl_LH is not None, "validation_batches gives every rank a batch"
        return {"kl_LH": kl_LH, "tokens": torch.tensor([float(total)], device=kl_LH.device)}

    @torch.no_grad()
    def measure_output_variance(self, batch: Batch) -> None:
        """Set `output_variance` from one batch, the same on all ranks: a fixed unit for the output error."""

        def see(seen: TeacherLayer) -> None:
            real = seen.o_BHLV.float().transpose(1, 2)[batch["mask"]]
            self.output_variance[seen.layer_index] = max(float(real.var(correction=0)), 1e-12)

        self._run_teacher(batch, False, see)

    def base_fault(self) -> str | None:
        """The first weight of the base that is not finite, which no maps can be blamed for; None where all are, or
        ZeRO-3 has them in parts."""
        teacher: Any = self._teacher[0]
        base = getattr(getattr(teacher, "module", teacher), "base", None)
        for name, weight in () if base is None else base.named_parameters():
            if weight.is_floating_point() and weight.numel() and not bool(torch.isfinite(weight).all()):
                return name
        return None

    def _run_teacher(self, batch: Batch, packed: bool, visit: Callable[[TeacherLayer], None], **entering: Any) -> None:
        # a dict of its own: ZeRO-3 puts other tensors in the places of those in a dict that goes through a module
        self._teacher[0](dict(batch), packed, visit, **entering)

    def _kl(self, seen: TeacherLayer, batch: Batch, visibility: Visibility) -> torch.Tensor:
        map_q, map_k = self._maps(seen)
        options = self._loss_options(seen, batch, packed=False) | {"visibility": visibility}
        return self._backend(seen).loss(seen.q_BHLD, seen.k_BKLD, map_q, map_k, grad=False, **options).kl_H

    def _draw_rows(self, batch: Batch) -> torch.Tensor | None:
        """Row weights (B, L) of `distill.query_fraction`; None: all rows. One draw for all layers."""
        if self._config.query_fraction == 1:
            return None
        length = batch["mask"].shape[1]
        block = LONG_ROWS_BLOCK if length >= 8 * LONG_ROWS_BLOCK else self._config.query_block
        return sampled_row_weights(batch["mask"], self._config.query_fraction, block, float(torch.rand(())))

    def _layer_loss(
        self, seen: TeacherLayer, batch: Batch, row_weights_BL: torch.Tensor | None, visibility: Visibility
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config
        map_q, map_k = self._maps(seen)
        options = self._loss_options(seen, batch, packed=config.packing)
        # with the cross-entropy switched off its KL is still recorded, without a gradient
        wanted = config.cross_entropy_weight > 0
        distilled = self._backend(seen).loss(
            seen.q_BHLD,
            seen.k_BKLD,
            map_q,
            map_k,
            grad=wanted,
            row_weights_BL=row_weights_BL,
            visibility=visibility,
            **options,
        )
        loss = distilled.loss * config.cross_entropy_weight
        if config.output_mse_weight > 0:
            for name in ("eps", "block_size", "log_sum_exp_BHL"):
                del options[name]
            error = output_mse_loss(
                seen.q_BHLD,
                seen.k_BKLD,
                seen.v_BKLV,
                map_q,
                map_k,
                teacher_output_BHLV=seen.o_BHLV,
                **options,
            )
            loss = loss + error.loss * (config.output_mse_weight / self.output_variance[seen.layer_index])
        return loss, distilled.kl_H

    def _backend(self, seen: TeacherLayer) -> DistillBackend:
        """The implementation of the attention loss, reported once with its reason."""
        maps = self._maps(seen)
        place = {"device": seen.q_BHLD.device, "dtype": seen.q_BHLD.dtype}
        backend = select_distill_backend(self._backend_name, *maps, **place, causal=seen.is_causal)
        line = f"distillation loss: {backend.name} ({backend.reason})"
        if line not in self._reported:
            self._reported.add(line)
            self._report(line)
        return backend

    def _loss_options(self, seen: TeacherLayer, batch: Batch, *, packed: bool) -> dict[str, Any]:
        return {
            "scale": seen.scale,
            "mask_BL": batch["mask"],
            "segment_ids_BL": batch["segment_ids"] if packed else None,
            "positions_BL": batch["position_ids"],
            "eps": self._config.loss_eps,
            "block_size": self._config.query_block,
            "log_sum_exp_BHL": seen.log_sum_exp_BHL,
            **({} if seen.is_causal else {"causal": False}),
        }

    def _maps(self, seen: TeacherLayer) -> tuple[Any, Any]:
        maps = self.layers[str(seen.layer_index)]
        return tuple(maps[name] for name in FEATURE_MAP_NAMES)  # type: ignore[return-value, index]


def _visibility(batch: Batch, packed: bool, row_weights_BL: torch.Tensor | None) -> Visibility:
    """For all layers of a batch."""
    return Visibility(batch["mask"], batch["segment_ids"] if packed else None, row_weights_BL)
