"""The kernels as torch operators `hedgehog::linear_attention` and `hedgehog::linear_attention_token`.

torch.compile and DeepSpeed see plain operators, with fake versions (shapes only) and a gradient. On a CPU tensor the
same operators run the emulation: slow, and only for tests.

Saved for the backward are the inputs and the denominator (gradients.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .arguments import forward_arguments, loadable, token_strides
from .checks import check_side_inputs, checked_sizes
from .forward_choice import KERNEL_NUMBERS, choose_forward
from .gradients import linear_attention_gradients
from .library import DecodeArguments, address, current_stream, library_for
from .limits import FEATURE_MAP_NUMBERS


@torch.library.custom_op(
    "hedgehog::linear_attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, Tensor? mask, Tensor? runs, "
        "Tensor? initial_kv, Tensor? initial_k_sum, str feature_map, float eps, SymInt segments, bool return_state) "
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
    sizes = checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    check_side_inputs(q, mask, runs, initial_kv, initial_k_sum, sizes)
    out, denominator, final_kv, final_k_sum = _outputs(v, sizes, return_state)
    if out.numel() == 0:
        if return_state:
            for final, start in ((final_kv, initial_kv), (final_k_sum, initial_k_sum)):
                final.zero_() if start is None else final.copy_(start)
        return out, denominator, final_kv, final_k_sum
    library = library_for(q.device)
    inputs = q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum
    arguments = forward_arguments(inputs, sizes, feature_map, eps, segments)
    arguments.out, arguments.out_stride = address(out), token_strides(out)
    arguments.denominator = address(denominator)
    arguments.kernel = KERNEL_NUMBERS[choose_forward(library, sizes[3], sizes[4], feature_map).kernel]
    if return_state:
        arguments.final_kv, arguments.final_k_sum = address(final_kv), address(final_k_sum)
    scratch = torch.empty(library.scratch_bytes(arguments), dtype=torch.uint8, device=q.device)
    arguments.scratch = address(scratch) if scratch.numel() else None
    with torch.cuda.device_of(q):
        library.forward(arguments)
    return out, denominator, final_kv, final_k_sum


@linear_attention.register_fake
def _(
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum, feature_map, eps, segments, return_state
):  # fmt: skip
    sizes = checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    check_side_inputs(q, mask, runs, initial_kv, initial_k_sum, sizes)
    return _outputs(v, sizes, return_state)


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


def _save_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.feature_map, ctx.eps, ctx.segments, ctx.return_state = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad_out: Tensor, grad_d: Tensor, grad_kv: Tensor, grad_k_sum: Tensor) -> tuple:
    """Of q, k, v, the weights and the initial state. The denominator carries none."""
    *inputs, denominator = ctx.saved_tensors
    grads_of_results = (grad_out, grad_kv, grad_k_sum) if ctx.return_state else (grad_out, None, None)
    # its second sweep has one block for all query heads of a key head
    segments = ctx.segments * (inputs[0].shape[1] // inputs[2].shape[1])
    grads = linear_attention_gradients(tuple(inputs), denominator, grads_of_results, ctx.feature_map, ctx.eps, segments)
    return *grads, None, None, None, None


linear_attention.register_autograd(_gradients, setup_context=_save_inputs)


_ARRIVALS = WeakTensorKeyDictionary()


def _arrivals(k_sum: Tensor) -> Tensor:
    """Counters (B, H) of the blocks that are done with a head, zero before and after each token: kept as long as the
    state, so that no token has to clear them. A CUDA graph that meets a state for the first time clears its own."""
    kept = _ARRIVALS.get(k_sum)
    if kept is None or kept.shape != k_sum.shape[:2]:
        kept = torch.zeros(k_sum.shape[:2], dtype=torch.int32, device=k_sum.device)
        if not _is_capturing(k_sum):
            _ARRIVALS[k_sum] = kept
    if k_sum.is_cuda and not _is_capturing(k_sum):
        kept.record_stream(torch.cuda.current_stream(k_sum.device))  # not always the one that it was made on
    return kept


def _is_capturing(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device_of(tensor):
        return torch.cuda.is_current_stream_capturing()


@torch.library.custom_op(
    "hedgehog::linear_attention_token",
    mutates_args=("kv_state", "k_sum"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, Tensor? mask, Tensor(a!) kv_state, "
        "Tensor(b!) k_sum, str feature_map, float eps, SymInt splits) -> Tensor"
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
    sizes = checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    batch, heads, length, head_dim, features = sizes
    if length != 1:
        raise ValueError(f"one token at a time, not {length}")
    if splits not in (1, 2, 4):
        raise ValueError(f"splits must be 1, 2 or 4, not {splits}")
    check_side_inputs(q, mask, None, kv_state, k_sum, sizes)
    if not (kv_state.is_contiguous() and k_sum.is_contiguous()):
        raise ValueError("kv_state and k_sum must be contiguous: they are updated in place")
    q, k, v = (loadable(x) for x in (q, k, v))
    weights = [None if w is None else loadable(w.to(torch.bfloat16).contiguous()) for w in (weight_q, weight_k)]
    mask = None if mask is None else mask.contiguous()
    out = v.new_empty(batch, heads, 1, head_dim)
    if out.numel() == 0:
        return out
    arrivals = _arrivals(k_sum) if splits > 1 else None
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
        arrivals=address(arrivals),
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
    sizes = checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    check_side_inputs(q, mask, None, kv_state, k_sum, sizes)
    batch, heads, _, head_dim, _ = sizes
    return v.new_empty(batch, heads, 1, head_dim)
