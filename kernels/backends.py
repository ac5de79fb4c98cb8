"""The one place that chooses an implementation of causal linear attention, and says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_state import LinearAttentionState
from .chunked_attention import chunked_linear_attention
from .mapped_attention import mapped_linear_attention

BACKENDS = ("auto", "torch", "cuda", "emulated")
"""`cuda` insists on the compiled kernels; `emulated` is their source compiled for a CPU: slow, for tests."""

# By name, not by import: this file travels with exports, where the kernels may not be installed.
_CUDA_MODULE = "hedgehog.kernels.cuda.attention"


class Backend(NamedTuple):
    """An implementation, its name, and why it was chosen."""

    name: str
    reason: str
    causal_attention: Callable
    """On features φ, with the signature of `chunked_linear_attention`."""
    fused: FusedAttention | None = None
    """The same with φ inside the kernel, if the feature map has one."""
    mapped: Callable | None = None
    """The same with φ computed along the way, by any map; signature of `mapped_linear_attention`."""


class FusedAttention:
    """Linear attention from q and k themselves: φ(q), φ(k) are never stored. k is not repeated for grouped heads.

    `projections` are the maps' weights (H, D, P), rounded to bfloat16 on their way. Everything else as in
    `chunked_linear_attention`; q (B, H, L, D), k (B, K, L, D), v (B, K, L, V), all bfloat16.
    """

    def __init__(self, kernels: ModuleType, feature_map: str) -> None:
        self._kernels, self._feature_map = kernels, feature_map

    def attend(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        v_BKLV: Tensor,
        projections: tuple[Tensor, Tensor],
        *,
        mask_BL: Tensor | None,
        segment_ids_BL: Tensor | None,
        initial_state: LinearAttentionState | None,
        eps: float,
        return_state: bool,
    ) -> tuple[Tensor, LinearAttentionState | None]:
        """(o_BHLV, final state or None)."""
        out, state = self._kernels.attend(
            q_BHLD,
            k_BKLD,
            v_BKLV,
            feature_map=self._feature_map,
            weight_q_HDP=projections[0],
            weight_k_HDP=projections[1],
            mask_BL=mask_BL,
            segment_ids_BL=segment_ids_BL,
            initial_state=_as_pair(initial_state),
            eps=eps,
            return_state=return_state,
        )
        return out, None if state is None else LinearAttentionState(*state)

    def attend_token(
        self,
        q_BH1D: Tensor,
        k_BK1D: Tensor,
        v_BK1V: Tensor,
        projections: tuple[Tensor, Tensor],
        *,
        mask_B1: Tensor | None,
        state: LinearAttentionState,
        eps: float,
    ) -> Tensor:
        """o_BH1V of one token; `state` is updated in place; no gradient."""
        return self._kernels.attend_token(
            q_BH1D,
            k_BK1D,
            v_BK1V,
            feature_map=self._feature_map,
            weight_q_HDP=projections[0],
            weight_k_HDP=projections[1],
            mask_B1=mask_B1,
            state=_as_pair(state),
            eps=eps,
        )


def select_attention_backend(
    requested: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_features: int,
    value_dim: int,
    feature_map: str | None = None,
    gradients: bool = False,
) -> Backend:
    """The backend called `requested`, or with "auto" the fastest that serves this device, dtype and shape.

    With the name of a `feature_map` whose φ the kernels compute, `Backend.fused` is there too. With `gradients` the
    backward kernels are tried as well, and the reason says where PyTorch takes their place. Raises ValueError listing
    the backends for an unknown name, and with the reason where a backend asked for cannot serve.
    """
    name, reason, fuses = _choose(requested, str(device), dtype, num_features, value_dim, feature_map, gradients)
    if name == "torch":
        return Backend(name, reason, chunked_linear_attention, mapped=mapped_linear_attention)
    fused = FusedAttention(_kernels, feature_map) if fuses and feature_map is not None else None
    return Backend(name, reason, _attend_features, fused)


_kernels: Any = None
"""The module of that name, once it has been asked for."""


@torch.compiler.assume_constant_result  # torch.compile calls it, and does not look inside: it imports, builds and tries
def _choose(
    requested: str,
    device_name: str,
    dtype: torch.dtype,
    num_features: int,
    value_dim: int,
    feature_map: str | None,
    gradients: bool,
) -> tuple[str, str, bool]:
    """(name, reason, whether φ is inside the kernel)"""
    global _kernels
    if requested not in BACKENDS:
        raise ValueError(f"unknown attention backend '{requested}'; known: {', '.join(BACKENDS)}")
    if requested == "torch":
        return "torch", "requested", False
    device = torch.device(device_name)
    what = f"{device.type}, {str(dtype).removeprefix('torch.')}, F={num_features}, V={value_dim}"
    kernels, obstacle = None, None
    if device.type != ("cpu" if requested == "emulated" else "cuda"):
        obstacle = "it needs a CPU" if requested == "emulated" else "it needs a CUDA GPU"
    else:
        try:
            kernels = _kernels = importlib.import_module(_CUDA_MODULE)
            obstacle = kernels.why_not(device, dtype, num_features, value_dim)
        except ImportError as error:
            obstacle = f"the kernels are not installed ({error})"
    if kernels is None or obstacle is not None:
        if requested == "auto":
            return "torch", f"no compiled kernel for {what}: {obstacle}", False
        raise ValueError(f"attention backend '{requested}' cannot serve {what}: {obstacle}")
    name = "cuda" if requested == "auto" else requested
    reason = "requested" if requested != "auto" else f"compiled for {what}"
    fuses = False
    if feature_map is not None:
        obstacle = kernels.why_not_fused(device, num_features, value_dim, feature_map)
        fuses = obstacle is None
        reason += "; φ inside the kernel" if fuses else f"; φ outside the kernel: {obstacle}"
    if gradients:
        differentiated = feature_map if fuses else "given"
        obstacle = kernels.backward_obstacle(device, num_features, value_dim, differentiated)
        reason += f"; gradients by PyTorch: {obstacle}" if obstacle else ""
    return name, reason, fuses


def _attend_features(
    phi_q_BHLF: Tensor,
    phi_k_BHLF: Tensor,
    v_BKLV: Tensor,
    *,
    mask_BL: Tensor | None = None,
    segment_ids_BL: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    eps: float,
    chunk_size: int | None = None,  # the kernels have 64; another one changes nothing but roundings
    return_state: bool = False,
) -> tuple[Tensor, LinearAttentionState | None]:
    out, state = _kernels.attend(
        phi_q_BHLF,
        phi_k_BHLF,
        v_BKLV,
        mask_BL=mask_BL,
        segment_ids_BL=segment_ids_BL,
        initial_state=_as_pair(initial_state),
        eps=eps,
        return_state=return_state,
    )
    return out, None if state is None else LinearAttentionState(*state)


def _as_pair(state: LinearAttentionState | None) -> Any:
    return None if state is None else (state.kv_state_BHFV, state.k_sum_BHF)
