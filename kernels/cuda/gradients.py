"""The gradient of `hedgehog::linear_attention`, as the operator `hedgehog::linear_attention_backward`: the kernels, or
PyTorch where they cannot serve (a GPU whose blocks have too little shared memory, or one that fails the check).

The operator chooses when it runs, on real tensors: torch.compile traces its backward pass with tensors that hold
nothing, on which no check could run. Both compute φ again and need q, k, v, the weights and, the kernels, the
denominator. PyTorch takes one key/value head and its query heads at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..attention_state import LinearAttentionState
from ..chunked_attention import chunked_linear_attention
from ..faults import first_line
from ..feature_maps import Side, make_feature_map
from .arguments import forward_arguments, loadable, token_strides
from .backward_choice import KERNEL_NUMBERS, choose_backward
from .checks import checked_sizes
from .library import BackwardArguments, ForwardArguments, address, cuda_library, library_for
from .limits import FEATURE_MAP_NUMBERS

GRADIENT_TOLERANCE = 0.03
"""Relative RMS error at which the backward kernels count as wrong; bf16 costs about 0.005."""
UNCHECKED_DEVICES = ("cpu",)
"""The emulation, which tests check in full."""
logger = logging.getLogger(__name__)

Tensors = tuple[Tensor | None, ...]
"""q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum as the operator takes them, or their gradients."""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of q, k, v, weight_q, weight_k, initial_kv, initial_k_sum; empty where there is no such input."""


def linear_attention_gradients(
    inputs: Tensors, denominator: Tensor, grads_of_results: Tensors, feature_map: str, eps: float, segments: int
) -> Tensors:
    """Gradients of the inputs of `linear_attention`, None for those that have none.

    `grads_of_results` are those of o (B, H, L, V) and of the final state S and z, or None for these two.
    """
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum = inputs
    grad_out, grad_final_kv, grad_final_k_sum = grads_of_results
    assert q is not None and k is not None and v is not None and grad_out is not None
    found = linear_attention_backward(
        q,
        k,
        v,
        weight_q,
        weight_k,
        mask,
        runs,
        initial_kv,
        initial_k_sum,
        denominator,
        grad_out,
        grad_final_kv,
        grad_final_k_sum,
        feature_map,
        eps,
        segments,
    )
    wanted = q, k, v, weight_q, weight_k, initial_kv, initial_k_sum
    grads = [None if x is None else grad for x, grad in zip(wanted, found, strict=True)]
    return *grads[:5], None, None, *grads[5:]


@cache
def backward_obstacle(device: torch.device, num_features: int, head_dim: int, feature_map: str) -> str | None:
    """Why the backward kernels cannot serve here, or None. Asked where the forward kernel serves; said once."""
    if device.type in UNCHECKED_DEVICES:
        return None
    obstacle = _device_obstacle(device, num_features, head_dim, feature_map, "slices")
    if obstacle:
        logger.warning("PyTorch computes the gradients of linear attention, not the kernels: %s", obstacle)
    return obstacle


@cache
def whole_obstacle(
    device: torch.device, num_features: int, head_dim: int, feature_map: str, grouped: bool, kernel: str = "whole"
) -> str | None:
    """Why the kernels that take the values whole (`kernel`: "whole", "wgmma") cannot serve here, or None.

    `grouped`: query heads share key heads. What is the device's fault is said once.
    """
    shape = ForwardArguments(
        batch=1,
        heads=1 + grouped,
        kv_heads=1,
        head_dim=head_dim,
        features=num_features,
        feature_map=FEATURE_MAP_NUMBERS[feature_map],
    )
    if not library_for(device).has_backward(shape, KERNEL_NUMBERS[kernel]):
        heads = ", heads that share a key head" if grouped else ""
        return (
            f"no backward kernels named {kernel} for head dim {head_dim}, F={num_features}, {feature_map}{heads} here"
        )
    if device.type in UNCHECKED_DEVICES:
        return None
    obstacle = _device_obstacle(device, num_features, head_dim, feature_map, kernel)
    if obstacle:
        logger.warning("the backward kernels named %s do not serve: %s", kernel, obstacle)
    return obstacle


def _device_obstacle(
    device: torch.device, num_features: int, head_dim: int, feature_map: str, kernel: str
) -> str | None:
    obstacle = None
    if device.type == "cuda":
        obstacle = _shared_memory_obstacle(device, num_features, head_dim, feature_map, kernel)
    return obstacle or gradient_disagreement(device, num_features, head_dim, feature_map, kernel)


def _shared_memory_obstacle(
    device: torch.device, num_features: int, head_dim: int, feature_map: str, kernel: str
) -> str | None:
    library = cuda_library(torch.cuda.get_device_capability(device))
    needed = library.backward_shared_bytes(head_dim, num_features, feature_map, KERNEL_NUMBERS[kernel])
    there = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return (
        f"a block of theirs needs {needed} bytes of shared memory, this GPU gives {there}" if needed > there else None
    )


def gradient_disagreement(
    device: torch.device, num_features: int, head_dim: int, feature_map: str, kernel: str = "slices"
) -> str | None:
    """Why the backward kernels are not to be trusted on this device: they fail, or differ from PyTorch."""
    try:
        error = _error_on_a_small_problem(device, num_features, head_dim, feature_map, kernel)
    except torch.OutOfMemoryError:  # says nothing of the kernels: asked again next time
        raise
    except RuntimeError as fault:
        return f"they fail here ({first_line(fault)})"
    return None if error <= GRADIENT_TOLERANCE else f"they differ from PyTorch here by {error:.1%}; please report it"


def _error_on_a_small_problem(
    device: torch.device, num_features: int, head_dim: int, feature_map: str, kernel: str
) -> float:
    """The largest relative RMS error of a gradient; 130 tokens, two segments, grouped heads where they serve."""
    heads, length, eps = 4, 130, 1e-6
    kv_heads = 2 if kernel == "slices" else heads
    random = torch.Generator().manual_seed(0)  # not the caller's random numbers

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, torch.bfloat16)

    v, grad_out = draw(1, kv_heads, length, head_dim), draw(1, heads, length, head_dim)
    if feature_map == "given":
        q, k = (draw(1, heads, length, num_features).abs() for _ in range(2))
        weights: tuple[Tensor | None, Tensor | None] = None, None
        phi_q, phi_k = q, k
    else:
        q, k = draw(1, heads, length, head_dim), draw(1, kv_heads, length, head_dim)
        weight_q, weight_k = (
            (draw(heads, head_dim, num_features // 2) / head_dim**0.5).to(torch.bfloat16).float() for _ in range(2)
        )
        weights = weight_q, weight_k
        group = heads // kv_heads
        phi_q, phi_k = _features(feature_map, q, k.repeat_interleave(group, dim=1), weight_q, weight_k)
    denominator = (phi_q.float() * phi_k.float().cumsum(dim=2)).sum(dim=-1) + eps
    inputs = q, k, v, *weights, None, None, None, None
    expected = gradients_in_pytorch(inputs, (grad_out, None, None), feature_map, eps)
    found = backward_kernels(inputs, denominator, (grad_out, None, None), feature_map, eps, 2, kernel)
    errors = [
        float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        for ours, theirs in zip(found, expected, strict=True)
        if ours.numel()
    ]
    # a NaN counts as the worst
    return max(errors, key=lambda error: float("inf") if error != error else error)


@torch.library.custom_op(
    "hedgehog::linear_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? weight_q, Tensor? weight_k, Tensor? mask, Tensor? runs, "
        "Tensor? initial_kv, Tensor? initial_k_sum, Tensor denominator, Tensor grad_out, Tensor? grad_final_kv, "
        "Tensor? grad_final_k_sum, str feature_map, float eps, SymInt segments) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def linear_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    mask: Tensor | None,
    runs: Tensor | None,
    initial_kv: Tensor | None,
    initial_k_sum: Tensor | None,
    denominator: Tensor,
    grad_out: Tensor,
    grad_final_kv: Tensor | None,
    grad_final_k_sum: Tensor | None,
    feature_map: str,
    eps: float,
    segments: int,
) -> Gradients:
    """Gradients of q, k, v, weight_q, weight_k, initial_kv, initial_k_sum, as they are; empty where there is no such.

    The inputs of `linear_attention` as it had them, its denominator (B, H, L), and the gradients of o (B, H, L, V) and
    of the final state, if any. Deterministic.
    """
    _, heads, _, head_dim, features = checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    inputs = q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum
    grads_of_results = grad_out, grad_final_kv, grad_final_k_sum
    if v.numel() and backward_obstacle(q.device, features, head_dim, feature_map) is not None:
        return gradients_in_pytorch(inputs, grads_of_results, feature_map, eps)
    shape = q.device, features, head_dim, feature_map, heads != v.shape[1]
    kernel = choose_backward(lambda name: whole_obstacle(*shape, name)).kernel
    return backward_kernels(inputs, denominator, grads_of_results, feature_map, eps, segments, kernel)


@linear_attention_backward.register_fake
def _(
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum, denominator, grad_out, grad_final_kv,
    grad_final_k_sum, feature_map, eps, segments
):  # fmt: skip
    return _results(q, k, v, weight_q, weight_k, initial_kv, initial_k_sum)


def backward_kernels(
    inputs: Tensors,
    denominator: Tensor,
    grads_of_results: Tensors,
    feature_map: str,
    eps: float,
    segments: int,
    kernel: str,
) -> Gradients:
    """The operator's results by the kernels, whatever `backward_obstacle` says.

    Beyond results: one state per segment, the weights' gradients of each row and segment, and where query heads share a
    key head four bytes a token, head and slice of the values (backward.cu). `kernel`: a name in backward_choice.py.
    """
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum = inputs
    grad_out, grad_final_kv, grad_final_k_sum = grads_of_results
    assert q is not None and k is not None and v is not None and grad_out is not None
    sizes = checked_sizes(q, k, v, weight_q, weight_k, feature_map)
    batch, heads, length, head_dim, features = sizes
    results = _results(q, k, v, weight_q, weight_k, initial_kv, initial_k_sum)
    grad_q, grad_k, grad_v, grad_weight_q, grad_weight_k, grad_kv, grad_k_sum = results
    if v.numel() == 0:
        for grad, final in ((grad_kv, grad_final_kv), (grad_k_sum, grad_final_k_sum)):
            if grad.numel():
                grad.zero_() if final is None else grad.copy_(final)
        return grad_q, grad_k, grad_v, grad_weight_q.zero_(), grad_weight_k.zero_(), grad_kv, grad_k_sum
    grad_out = loadable(grad_out.to(torch.bfloat16))
    initial_kv, initial_k_sum, grad_final_kv, grad_final_k_sum = (
        None if x is None else x.float().contiguous()
        for x in (initial_kv, initial_k_sum, grad_final_kv, grad_final_k_sum)
    )
    denominator = denominator.contiguous()
    library, number = library_for(q.device), KERNEL_NUMBERS[kernel]
    inputs = q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum
    forward = forward_arguments(inputs, sizes, feature_map, eps, segments)
    forward.denominator = address(denominator)
    scratch = torch.empty(library.backward_scratch_bytes(forward, number), dtype=torch.uint8, device=q.device)
    forward.scratch = address(scratch) if scratch.numel() else None
    grad_denominator = None
    if heads != v.shape[1]:  # else it waits where dv will be
        grad_denominator = denominator.new_empty(library.num_slices(head_dim, features, number), batch, heads, length)
    partial_shape = 2, batch, library.num_segments(length, segments), heads, head_dim, features // 2
    partial = denominator.new_empty(partial_shape if weight_q is not None else (0,))
    arguments = BackwardArguments(
        forward=forward,
        grad_out=address(grad_out),
        grad_final_kv=address(grad_final_kv),
        grad_final_k_sum=address(grad_final_k_sum),
        grad_q=address(grad_q),
        grad_k=address(grad_k),
        grad_v=address(grad_v),
        grad_weight_q=address(partial[0]) if weight_q is not None else None,
        grad_weight_k=address(partial[1]) if weight_q is not None else None,
        grad_initial_kv=address(grad_kv) if initial_kv is not None else None,
        grad_initial_k_sum=address(grad_k_sum) if initial_k_sum is not None else None,
        grad_denominator=address(grad_denominator),
        grad_out_stride=token_strides(grad_out),
        grad_q_stride=token_strides(grad_q),
        grad_k_stride=token_strides(grad_k),
        grad_v_stride=token_strides(grad_v),
        kernel=number,
    )
    with torch.cuda.device_of(q):
        library.backward(arguments)
    if weight_q is not None:
        for grad, parts in zip((grad_weight_q, grad_weight_k), partial, strict=True):
            grad.copy_(parts.sum(dim=(0, 1)))
    return grad_q, grad_k, grad_v, grad_weight_q, grad_weight_k, grad_kv, grad_k_sum


def _results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    initial_kv: Tensor | None,
    initial_k_sum: Tensor | None,
) -> Gradients:
    """Uninitialised. dq, dk, dv are (B, L, ·, ·) in memory, as the projections behind them want them."""

    def tokens_first(x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    def like(x: Tensor | None, dtype: torch.dtype) -> Tensor:
        return v.new_empty(0, dtype=dtype) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return (
        tokens_first(q),
        tokens_first(k),
        tokens_first(v),
        like(weight_q, torch.float32),
        like(weight_k, torch.float32),
        like(initial_kv, torch.float32),
        like(initial_k_sum, torch.float32),
    )


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, whose caller (custom_op, a compiled graph) has taken it out of the dispatcher."""
    keys = torch._C.DispatchKey
    autograd = torch._C.DispatchKeySet(keys.AutogradCPU) | torch._C.DispatchKeySet(keys.AutogradCUDA)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - autograd), torch.enable_grad():
        yield


def gradients_in_pytorch(inputs: Tensors, grads_of_results: Tensors, feature_map: str, eps: float) -> Gradients:
    """The operator's results through `chunked_linear_attention`."""
    q, k, v, weight_q, weight_k, mask, runs, initial_kv, initial_k_sum = inputs
    grad_out, grad_kv, grad_k_sum = grads_of_results
    assert q is not None and k is not None and v is not None and grad_out is not None
    by_name = {"q": q, "k": k, "v": v, "weight_q": weight_q, "weight_k": weight_k}
    by_name |= {"initial_kv": initial_kv, "initial_k_sum": initial_k_sum}
    wanted = {name: x for name, x in by_name.items() if x is not None}
    results = _results(q, k, v, weight_q, weight_k, initial_kv, initial_k_sum)
    grads = {name: grad for name, grad in zip(by_name, results, strict=True) if name in wanted}
    num_kv_heads = v.shape[1]
    group = q.shape[1] // num_kv_heads
    given = feature_map == "given"
    for kv_head in range(num_kv_heads):
        query_heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)

        def part(name: str, x: Tensor, query_heads: slice = query_heads, kv_heads: slice = kv_heads) -> Tensor:
            if name.startswith("weight"):
                return x[query_heads]
            return x[:, kv_heads if name == "v" or (name == "k" and not given) else query_heads]

        parts = {name: part(name, x).detach().requires_grad_() for name, x in wanted.items()}
        with _recording():
            phi_q, phi_k = parts["q"], parts["k"]
            if not given:
                expanded = phi_k.expand(-1, group, -1, -1)
                phi_q, phi_k = _features(feature_map, phi_q, expanded, parts["weight_q"], parts["weight_k"])
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
                eps=eps,
                return_state=grad_kv is not None,
            )
            outputs, incoming = [out], [grad_out[:, query_heads].to(out.dtype)]
            if final is not None:
                assert grad_kv is not None and grad_k_sum is not None
                outputs += [final.kv_state_BHFV, final.k_sum_BHF]
                incoming += [grad_kv[:, query_heads], grad_k_sum[:, query_heads]]
            found = torch.autograd.grad(outputs, list(parts.values()), incoming)
        for (name, grad), found_grad in zip(grads.items(), found, strict=True):
            part(name, grad).copy_(found_grad)
    return results


def _features(feature_map: str, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, Tensor]:
    """φ(q) and φ(k) as the kernel has them: weights rounded to bfloat16, φ rounded once."""
    phi = []
    sides: tuple[tuple[Side, Tensor, Tensor], ...] = (("query", q, weight_q), ("key", k, weight_k))
    for side, x, weight in sides:
        feature_map_module = make_feature_map(feature_map, num_heads=1, head_dim=1, side=side)
        rounded = weight.to(torch.bfloat16).float()
        phi.append(feature_map_module.features(x, rounded).to(torch.bfloat16))
    return phi[0], phi[1]
