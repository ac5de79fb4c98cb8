"""The kernels with the calling convention of `chunked_linear_attention`, and the reasons for which they cannot serve.

`backends.py` finds this module by name, so that exported models work without it. States go in and out as plain
tensors, because an export has a LinearAttentionState of its own.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from ..chunked_attention import chunked_linear_attention
from ..conventions import run_index_BL
from ..faults import first_line
from ..feature_maps import Side, make_feature_map
from .build import BuildError
from .gradients import backward_obstacle
from .library import KernelError, cuda_library, emulated_library
from .limits import FEATURES, FUSED_FEATURE_MAPS, HEAD_DIMS
from .operators import linear_attention, linear_attention_token

OLDEST_CAPABILITY = (8, 0)
TOLERANCE = 0.02
"""Relative RMS error at which the kernels count as wrong; bf16 costs about 0.004."""
__all__ = ["attend", "attend_token", "backward_obstacle", "num_segments", "num_splits", "why_not", "why_not_fused"]
_EMULATED_MULTIPROCESSORS = 4  # few, so that small tests use one segment and several


@cache
def why_not(device: torch.device, dtype: torch.dtype, num_features: int, value_dim: int) -> str | None:
    """Why the kernels cannot serve this, or None. Builds them the first time that nothing else is in the way."""
    if dtype != torch.bfloat16:
        return "the kernels take bfloat16"
    if num_features not in FEATURES or value_dim not in HEAD_DIMS:
        return f"the kernels have F in {FEATURES} and V in {HEAD_DIMS}"
    if device.type not in ("cuda", "cpu"):
        return "the kernels are for CUDA"
    try:
        if device.type == "cpu":
            emulated_library()
            return None
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"the kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        obstacle = _shared_memory_obstacle(device, num_features, value_dim, "given")
        return obstacle or disagreement(device, num_features, value_dim, "given")
    except (BuildError, KernelError, OSError) as error:
        return str(error)


@cache
def why_not_fused(device: torch.device, num_features: int, value_dim: int, feature_map: str) -> str | None:
    """Why the kernels cannot compute this φ here, or None; asked where `why_not` said None."""
    if feature_map not in FUSED_FEATURE_MAPS:
        return f"it has no {feature_map}"
    if device.type == "cpu":
        return None
    # small GPUs lack the shared memory
    obstacle = _shared_memory_obstacle(device, num_features, value_dim, feature_map)
    return obstacle or disagreement(device, num_features, value_dim, feature_map)


def _shared_memory_obstacle(device: torch.device, num_features: int, value_dim: int, feature_map: str) -> str | None:
    library = cuda_library(torch.cuda.get_device_capability(device))
    needed = library.shared_bytes(value_dim, num_features, feature_map)
    there = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return f"a block needs {needed} bytes of shared memory, this GPU gives {there}" if needed > there else None


def disagreement(device: torch.device, num_features: int, head_dim: int, feature_map: str) -> str | None:
    """Why the kernels are not to be trusted on this device: they fail, or differ from PyTorch. None: they serve.

    A small random problem, 130 tokens and, with φ inside, one more: a wrong kernel would spoil a model in silence. Once
    in one segment, so that a block goes from chunk to chunk, and once in as many as fill the GPU. `feature_map` "given"
    looks at the kernels that take φ.
    """
    try:
        errors = [_error_on_a_small_problem(device, num_features, head_dim, feature_map, count) for count in (1, None)]
    except torch.OutOfMemoryError:  # says nothing of the kernels: asked again next time
        raise
    except RuntimeError as fault:
        return f"the kernels fail here ({first_line(fault)})"
    for error in errors:
        if not error <= TOLERANCE:
            return f"the kernels differ from PyTorch here by {error:.1%}; please report it"
    return None


@torch.no_grad()
def _error_on_a_small_problem(
    device: torch.device, num_features: int, head_dim: int, feature_map: str, segments: int | None
) -> float:
    heads, kv_heads, length, eps = 4, 2, 130, 1e-6
    random = torch.Generator().manual_seed(0)  # not the caller's random numbers

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, torch.bfloat16)

    v = draw(1, kv_heads, length + 1, head_dim)
    weights: dict[str, Tensor] = {}
    if feature_map == "given":
        q, k = (draw(1, heads, length + 1, num_features).abs() for _ in range(2))
        phi_q, phi_k = q, k
    else:
        q, k = draw(1, heads, length + 1, head_dim), draw(1, kv_heads, length + 1, head_dim)
        phis = []
        sides: tuple[tuple[Side, Tensor], ...] = (("query", q), ("key", k.repeat_interleave(heads // kv_heads, dim=1)))
        for side, x in sides:
            module = make_feature_map(
                feature_map, num_heads=heads, head_dim=head_dim, feature_dim=num_features // 2, side=side
            ).to(device)
            weight = module.projection_HDP
            assert weight is not None
            rounded = weight.to(torch.bfloat16) + 0.1 * draw(*weight.shape)
            weight.copy_(rounded)
            weights[f"weight_{side[0]}_HDP"] = rounded
            phis.append(module(x.float()))
        phi_q, phi_k = phis
    found, state = attend(
        *(x[:, :, :length] for x in (q, k, v)),
        feature_map=feature_map,
        mask_BL=None,
        segment_ids_BL=None,
        initial_state=None,
        eps=eps,
        return_state=True,
        segments=segments,
        **weights,
    )
    assert state is not None
    if weights:
        last = (x[:, :, length:].contiguous() for x in (q, k, v))
        token = attend_token(*last, feature_map=feature_map, mask_B1=None, state=state, eps=eps, **weights)
        found = torch.cat([found, token], dim=2)
    expected, _ = chunked_linear_attention(phi_q.float(), phi_k.float(), v.float(), eps=eps)
    expected = expected[:, :, : found.shape[2]]
    return float((found.float() - expected).norm() / expected.norm())


@torch.compiler.assume_constant_result
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _EMULATED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_segments(device: torch.device, batch_size: int, num_heads: int) -> int:
    """Segments of the length, so that blocks fill the GPU; the kernel takes fewer for a short length."""
    return segments_for(max(1, batch_size * num_heads), _num_multiprocessors(device))


def segments_for(blocks: int, multiprocessors: int) -> int:
    """The fewest segments of the least time, with `blocks` blocks a segment and one block a multiprocessor at a time.

    All but the last segment first sum their state, which takes 2/5 of the time (LOG.md, "Segments"). No more blocks
    than four rounds of them: each leaves a state in memory.
    """

    def time(segments: int) -> Fraction:
        rounds, state_rounds = (-(-blocks * count // multiprocessors) for count in (segments, segments - 1))
        return (rounds + Fraction(2, 5) * state_rounds) / segments

    return min(range(1, max(1, 4 * multiprocessors // blocks) + 1), key=time)


def num_splits(device: torch.device, batch_size: int, num_heads: int) -> int:
    """Blocks a head for one token: 1, 2 or 4."""
    return splits_for(max(1, batch_size * num_heads), _num_multiprocessors(device))


def splits_for(heads: int, multiprocessors: int) -> int:
    """The fewest blocks a head of the least time; each block makes φ of its own, a quarter of a head's work."""
    return min(
        (1, 2, 4), key=lambda splits: -(-heads * splits // multiprocessors) * (Fraction(1, splits) + Fraction(1, 4))
    )


def attend(
    q_BHLX: Tensor,
    k_BKLX: Tensor,
    v_BKLV: Tensor,
    *,
    feature_map: str = "given",
    weight_q_HDP: Tensor | None = None,
    weight_k_HDP: Tensor | None = None,
    mask_BL: Tensor | None,
    segment_ids_BL: Tensor | None,
    initial_state: tuple[Tensor, Tensor] | None,
    eps: float,
    return_state: bool,
    segments: int | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(o_BHLV bfloat16, (S, z) or None). Chunks have 64 tokens. See `operators.linear_attention`.

    `segments`: as many as fill the GPU unless given.
    """
    batch, heads = q_BHLX.shape[:2]
    runs_BL = None if segment_ids_BL is None else run_index_BL(segment_ids_BL, mask_BL).to(torch.int32)
    initial_kv, initial_k_sum = initial_state if initial_state is not None else (None, None)
    out, _, kv_state, k_sum = linear_attention(
        q_BHLX,
        k_BKLX,
        v_BKLV,
        weight_q_HDP,
        weight_k_HDP,
        mask_BL,
        runs_BL,
        initial_kv,
        initial_k_sum,
        feature_map,
        eps,
        segments or num_segments(q_BHLX.device, batch, heads),
        return_state,
    )
    return out, (kv_state, k_sum) if return_state else None


def attend_token(
    q_BH1D: Tensor,
    k_BK1D: Tensor,
    v_BK1V: Tensor,
    *,
    feature_map: str,
    weight_q_HDP: Tensor,
    weight_k_HDP: Tensor,
    mask_B1: Tensor | None,
    state: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """o_BH1V; `state` (S, z) is updated in place. See `operators.linear_attention_token`."""
    splits = num_splits(q_BH1D.device, *q_BH1D.shape[:2])
    weights = weight_q_HDP, weight_k_HDP
    return linear_attention_token(q_BH1D, k_BK1D, v_BK1V, *weights, mask_B1, *state, feature_map, eps, splits)
