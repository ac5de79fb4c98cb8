"""The kernels as torch operators `hedgehog::linear_attention` and `hedgehog::linear_attention_token`.

torch.compile and DeepSpeed see plain operators, with fake versions (shapes only) and a gradient. On a CPU tensor the
same operators run the emulation: slow, and only for tests.

There is no CUDA backward yet. The gradient is PyTorch's: φ is computed again from the saved q and k and goes through
`chunked_linear_attention`, one key/value head and its query heads at a time. Saved are the inputs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention_state import LinearAttentionState
from ..chunked_attention import chunked_linear_attention
from ..feature_maps import Side, make_feature_map
from .library import (
    FEATURE_MAP_NUMBERS,
    DecodeArguments,
    ForwardArguments,
    Strides,
    address,
    current_stream,
    library_for,
)

HEAD_DIMS = (64, 128)
FEATURES = (128, 256)


@torch.library.custom_op(
    "hedgehog::linear_attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, Tensor? mask, Tensor? runs, "
        "Tensor? initial_kv, Tensor? initial_k_sum, str feature_map, float eps, int segments, bool return_state) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    mask: Tensor | None,
    runs: Tensor | None,
    initial_kv: Tensor | None,
    initial_k_sum: Tensor | None,
    feature_map: str,
    eps: float,
    segments: int,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal linear attention: (o_BHLV bfloat16, d_BHL float32, final S_BHFV, final z_BHF; empty unless return_state).

    q (B, H, L, D), k (B, K, L, D), v (B, K, L, V=D) bfloat16, weights (H, D, F/2), rounded to bfloat16 here. With
    feature_map "given": q, k are φ, (B, H, L, F), and no weights. `mask` (B, L) bool; `runs` (B, L) int32 from
    `run_index_BL`; states float32. Semantics: conventions.py. Raises ValueError for what does not fit together.
    """
    sizes = _checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    batch, heads, length, head_dim, features = sizes
    _check_side_inputs(q, mask, runs, initial_kv, initial_k_sum, sizes)
    q, k, v = (_loadable(x) for x in (q, k, v))
    weights = [None if w is None else w.to(torch.bfloat16).contiguous() for w in (weight_q, weight_k)]
    mask = None if mask is None else mask.contiguous()
    runs = None if runs is None else runs.contiguous()
    initial = [None if x is None else x.contiguous() for x in (initial_kv, initial_k_sum)]
    out, denominator, final_kv, final_k_sum = _outputs(v, sizes, return_state)
    if out.numel() == 0:
        if return_state:
            for final, start in zip((final_kv, final_k_sum), initial, strict=True):
                final.zero_() if start is None else final.copy_(start)
        return out, denominator, final_kv, final_k_sum
    library = library_for(q.device)
    arguments = ForwardArguments(
        q=address(q),
        k=address(k),
        v=address(v),
        weight_q=address(weights[0]),
        weight_k=address(weights[1]),
        mask=address(mask),
        runs=address(runs),
        initial_kv=address(initial[0]),
        initial_k_sum=address(initial[1]),
        out=address(out),
        denominator=address(denominator),
        final_kv=address(final_kv) if return_state else None,
        final_k_sum=address(final_k_sum) if return_state else None,
        stream=current_stream(q.device),
        q_stride=Strides(*q.stride()[:3]),
        k_stride=Strides(*k.stride()[:3]),
        v_stride=Strides(*v.stride()[:3]),
        out_stride=Strides(*out.stride()[:3]),
        batch=batch,
        heads=heads,
        kv_heads=v.shape[1],
        length=length,
        head_dim=head_dim,
        features=features,
        feature_map=FEATURE_MAP_NUMBERS[feature_map],
        segments=segments,
        eps=eps,
    )
    scratch = torch.empty(library.scratch_bytes(arguments), dtype=torch.uint8, device=q.device)
    arguments.scratch = address(scratch) if scratch.numel() else None
    with torch.cuda.device_of(q):
        library.forward(arguments)
    return out, denominator, final_kv, final_k_sum


@linear_attention.register_fake
def _(
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum, feature_map, eps, segments, return_state
):  # fmt: skip
    return _outputs(v, _checked_sizes(q, k, v, weight_q, weight_k, feature_map), return_state)


def _outputs(v: Tensor, sizes: tuple[int, int, int, int, int], return_state: bool) -> tuple[Tensor, ...]:
    """Uninitialised. o is (B, L, H, V) in memory, as the projection that comes next wants it."""
    batch, heads, length, head_dim, features = sizes
    out = v.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    denominator = v.new_empty(batch, heads, length, dtype=torch.float32)
    state_shape = (batch, heads, features, head_dim) if return_state else (0,)
    k_sum_shape = (batch, heads, features) if return_state else (0,)
    return (
        out,
        denominator,
        v.new_empty(state_shape, dtype=torch.float32),
        v.new_empty(k_sum_shape, dtype=torch.float32),
    )


def _checked_sizes(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor | None, weight_k: Tensor | None, feature_map: str
) -> tuple[int, int, int, int, int]:
    """(B, H, L, D, F), or ValueError that names what does not fit."""
    if feature_map not in FEATURE_MAP_NUMBERS:
        raise ValueError(f"no kernel for feature map '{feature_map}'; there are: {', '.join(FEATURE_MAP_NUMBERS)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.dtype != torch.bfloat16 or x.device != q.device:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must have 4 dimensions and be bfloat16 on {q.device}"
            )
    batch, heads, length, width = q.shape
    kv_heads, head_dim = v.shape[1], v.shape[3]
    if kv_heads < 1 or heads % kv_heads or (v.shape[0], v.shape[2]) != (batch, length):
        raise ValueError(f"v {tuple(v.shape)} must be (B, K, L, V) with K a divisor of H, q is {tuple(q.shape)}")
    if feature_map == "given":
        if weight_q is not None or weight_k is not None:
            raise ValueError("q and k are given as features already: no weights")
        features, k_shape = width, (batch, heads, length, width)
    else:
        if weight_q is None or weight_k is None:
            raise ValueError(f"feature map '{feature_map}' needs weight_q and weight_k")
        features, k_shape = 2 * weight_q.shape[-1], (batch, kv_heads, length, head_dim)
        for name, weight in (("weight_q", weight_q), ("weight_k", weight_k)):
            if tuple(weight.shape) != (heads, head_dim, features // 2) or weight.device != q.device:
                raise ValueError(
                    f"{name} {tuple(weight.shape)} on {weight.device} must be (H, D, F/2) = "
                    f"{(heads, head_dim, features // 2)} on {q.device}"
                )
        if width != head_dim:
            raise ValueError(f"q has {width} dimensions a head and v {head_dim}: the fused kernel wants as many")
    if tuple(k.shape) != k_shape:
        raise ValueError(f"k {tuple(k.shape)} must be {k_shape}")
    if head_dim not in HEAD_DIMS or features not in FEATURES:
        raise ValueError(f"head dim {head_dim} and {features} features: the kernel has {HEAD_DIMS} and {FEATURES}")
    return batch, heads, length, head_dim, features


def _check_side_inputs(
    q: Tensor,
    mask: Tensor | None,
    runs: Tensor | None,
    initial_kv: Tensor | None,
    initial_k_sum: Tensor | None,
    sizes: tuple[int, int, int, int, int],
) -> None:
    batch, heads, length, head_dim, features = sizes
    if (initial_kv is None) != (initial_k_sum is None):
        raise ValueError("initial_kv and initial_k_sum come together")
    wanted = (
        ("mask", mask, (batch, length), torch.bool),
        ("runs", runs, (batch, length), torch.int32),
        ("initial_kv", initial_kv, (batch, heads, features, head_dim), torch.float32),
        ("initial_k_sum", initial_k_sum, (batch, heads, features), torch.float32),
    )
    for name, x, shape, dtype in wanted:
        if x is not None and (tuple(x.shape) != shape or x.dtype != dtype or x.device != q.device):
            raise ValueError(f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must be {shape} {dtype} on {q.device}")


def _loadable(x: Tensor) -> Tensor:
    """x, or a copy of it where the kernel's loads of 16 bytes would not be aligned."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _save_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.feature_map, ctx.eps, _, ctx.return_state = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_out: Tensor, grad_d: Tensor, grad_kv: Tensor, grad_k_sum: Tensor) -> tuple:
    """Of q, k, v, the weights and the initial state. The denominator carries none."""
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum = ctx.saved_tensors
    inputs = {"q": q, "k": k, "v": v, "weight_q": weight_q, "weight_k": weight_k}
    inputs |= {"initial_kv": initial_kv, "initial_k_sum": initial_k_sum}
    wanted = [name for name, x in inputs.items() if x is not None]
    grads = {name: torch.empty_like(inputs[name]) for name in wanted}
    num_kv_heads = v.shape[1]
    group = q.shape[1] // num_kv_heads
    given = ctx.feature_map == "given"
    for kv_head in range(num_kv_heads):
        query_heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)

        def part(name: str, x: Tensor, query_heads: slice = query_heads, kv_heads: slice = kv_heads) -> Tensor:
            if name.startswith("weight"):
                return x[query_heads]
            return x[:, kv_heads if name == "v" or (name == "k" and not given) else query_heads]

        parts = {name: part(name, inputs[name]).detach().requires_grad_() for name in wanted}
        with torch.enable_grad():
            phi_q, phi_k = (parts["q"], parts["k"]) if given else _features(ctx.feature_map, parts, group)
            state = None
            if initial_kv is not None:
                state = LinearAttentionState(parts["initial_kv"], parts["initial_k_sum"])
            out, final = chunked_linear_attention(
                phi_q,
                phi_k,
                parts["v"],
                mask_BL=mask,
                segment_ids_BL=runs,
                initial_state=state,
                eps=ctx.eps,
                return_state=ctx.return_state,
            )
        results, incoming = [out], [grad_out[:, query_heads]]
        if final is not None:
            results += [final.kv_state_BHFV, final.k_sum_BHF]
            incoming += [grad_kv[:, query_heads], grad_k_sum[:, query_heads]]
        found = torch.autograd.grad(results, list(parts.values()), incoming)
        for name, grad in zip(wanted, found, strict=True):
            part(name, grads[name]).copy_(grad)
    order = ("q", "k", "v", "weight_q", "weight_k", "mask", "runs", "initial_kv", "initial_k_sum")
    return *(grads.get(name) for name in order), None, None, None, None


def _features(feature_map: str, parts: dict[str, Tensor], group: int) -> tuple[Tensor, Tensor]:
    """φ(q) and φ(k) as the kernel has them: weights rounded to bfloat16, φ rounded once."""
    phi = []
    sides: tuple[tuple[Side, Tensor, Tensor], ...] = (
        ("query", parts["q"], parts["weight_q"]),
        ("key", parts["k"].expand(-1, group, -1, -1), parts["weight_k"]),
    )
    for side, x, weight in sides:
        feature_map_module = make_feature_map(feature_map, num_heads=1, head_dim=1, side=side)
        rounded = weight.to(torch.bfloat16).float()
        phi.append(feature_map_module.features(x, rounded).to(torch.bfloat16))
    return phi[0], phi[1]


linear_attention.register_autograd(_gradients, setup_context=_save_inputs)


@torch.library.custom_op(
    "hedgehog::linear_attention_token",
    mutates_args=("kv_state", "k_sum"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, Tensor? mask, Tensor(a!) kv_state, "
        "Tensor(b!) k_sum, str feature_map, float eps, int splits) -> Tensor"
    ),
)
def linear_attention_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    mask: Tensor | None,
    kv_state: Tensor,
    k_sum: Tensor,
    feature_map: str,
    eps: float,
    splits: int,
) -> Tensor:
    """One token: o_BH1V bfloat16; S (B, H, F, V) and z (B, H, F), float32 and contiguous, are updated in place.

    q (B, H, 1, D), k (B, K, 1, D), v (B, K, 1, V) and the rest as in `linear_attention`; `mask` (B, 1). `splits` in
    1, 2, 4 cuts a head's values into as many blocks. No gradient. Fixed addresses: a CUDA graph may hold it.
    """
    sizes = _checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    batch, heads, length, head_dim, features = sizes
    if length != 1:
        raise ValueError(f"one token at a time, not {length}")
    if splits not in (1, 2, 4):
        raise ValueError(f"splits must be 1, 2 or 4, not {splits}")
    _check_side_inputs(q, mask, None, kv_state, k_sum, sizes)
    if not (kv_state.is_contiguous() and k_sum.is_contiguous()):
        raise ValueError("kv_state and k_sum must be contiguous: they are updated in place")
    q, k, v = (_loadable(x) for x in (q, k, v))
    weights = [None if w is None else w.to(torch.bfloat16).contiguous() for w in (weight_q, weight_k)]
    mask = None if mask is None else mask.contiguous()
    out = v.new_empty(batch, heads, 1, head_dim)
    if out.numel() == 0:
        return out
    arrivals = torch.zeros(batch * heads if splits > 1 else 0, dtype=torch.int32, device=q.device)
    arguments = DecodeArguments(
        q=address(q),
        k=address(k),
        v=address(v),
        weight_q=address(weights[0]),
        weight_k=address(weights[1]),
        mask=address(mask),
        kv_state=address(kv_state),
        k_sum=address(k_sum),
        out=address(out),
        arrivals=address(arrivals) if splits > 1 else None,
        stream=current_stream(q.device),
        q_batch_stride=q.stride(0),
        q_head_stride=q.stride(1),
        k_batch_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v_batch_stride=v.stride(0),
        v_head_stride=v.stride(1),
        batch=batch,
        heads=heads,
        kv_heads=v.shape[1],
        head_dim=head_dim,
        features=features,
        feature_map=FEATURE_MAP_NUMBERS[feature_map],
        splits=splits,
        eps=eps,
    )
    with torch.cuda.device_of(q):
        library_for(q.device).decode(arguments)
    return out


@linear_attention_token.register_fake
def _(q, k, v, weight_q, weight_k, mask, kv_state, k_sum, feature_map, eps, splits):
    batch, heads, _, head_dim, _ = _checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    return v.new_empty(batch, heads, 1, head_dim)
