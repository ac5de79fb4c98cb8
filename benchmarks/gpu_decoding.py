"""One token in several ways, as called and inside a CUDA graph.

    kernel           the CUDA kernel, φ inside
    fla              flash-linear-attention: its hedgehog map and its recurrent kernel with normaliser
    pytorch          φ and the recurrent step in PyTorch
    softmax, flash   torch's SDPA on a cache of keys and values, FlashAttention backend
    softmax, cudnn   the same with cuDNN's

A graph holds one call on each of several states, as a model calls one layer after the other; times are of one call.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_methods import EPS, FEATURE_MAP, apply_map, find_fla, fla_map, rates
from gpu_timing import Call, CudaMeter
from gpu_work import Ceilings, Work, decoding_work, softmax_decoding_work
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hedgehog.kernels.attention_state import LinearAttentionState
from hedgehog.kernels.cuda.attention import num_splits
from hedgehog.kernels.cuda.operators import linear_attention_token
from hedgehog.kernels.linear_attention import recurrent_linear_attention_step

STATES = 4
"""Calls in a graph, each on its own state or cache; one where they are as large as a gigabyte."""
LARGE_BYTES = 2**30


@dataclass(frozen=True)
class Token:
    """A shape: a state of `features`, or a cache of `positions`."""

    batch: int
    features: int | None = None
    positions: int | None = None
    heads: int = 32
    head_dim: int = 128

    def work(self) -> list[Work]:
        if self.features is not None:
            return decoding_work(self.batch, self.heads, self.head_dim, self.features)
        return softmax_decoding_work(self.batch, self.heads, self.head_dim, self.positions or 0)

    def num_states(self) -> int:
        return STATES if self.work()[0].num_bytes < LARGE_BYTES else 1


def _vectors(token: Token, device: torch.device) -> list[Tensor]:
    """q, k, v of one token, (B, H, 1, D) bf16."""
    shape = token.batch, token.heads, 1, token.head_dim
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]


def _weights(token: Token, device: torch.device) -> list[Tensor]:
    """Of query and key, (H, D, F/2), bf16 as a model that decodes keeps them."""
    assert token.features is not None
    shape = token.heads, token.head_dim, token.features // 2
    return [(torch.randn(shape, device=device) / token.head_dim**0.5).bfloat16() for _ in range(2)]


def _state(token: Token, device: torch.device) -> tuple[Tensor, Tensor]:
    """S and z as they might be after some tokens: z is positive."""
    assert token.features is not None
    shape = token.batch, token.heads, token.features
    return torch.randn(*shape, token.head_dim, device=device), 1 + torch.rand(shape, device=device)


def kernel(token: Token, device: torch.device) -> Call:
    vectors, weights, state = _vectors(token, device), _weights(token, device), _state(token, device)
    splits = num_splits(device, token.batch, token.heads)
    return lambda: linear_attention_token(*vectors, *weights, None, *state, FEATURE_MAP, EPS, splits)


def pytorch(token: Token, device: torch.device) -> Call:
    q, k, v = _vectors(token, device)
    weight_q, weight_k = _weights(token, device)
    state = LinearAttentionState(*_state(token, device))

    def step() -> Tensor:
        phi_q, phi_k = apply_map("query", q, weight_q)[:, :, 0], apply_map("key", k, weight_k)[:, :, 0]
        return recurrent_linear_attention_step(phi_q, phi_k, v[:, :, 0], state, eps=EPS)[0]

    return step


def fla(token: Token, device: torch.device) -> Call:
    found = find_fla()
    q, k, v = (x.transpose(1, 2) for x in _vectors(token, device))
    map_q, map_k = (fla_map(found, weight[0]) for weight in _weights(token, device))
    kv_state, k_sum = _state(token, device)
    state = kv_state, k_sum.bfloat16().unsqueeze(1)  # (B, 1, H, F), in the features' dtype as it returns it

    def step() -> Tensor:
        return found.recurrent(
            map_q(q), map_k(k), v, initial_state=state, output_final_state=True, normalize=True
        )[0]  # fmt: skip

    return step


def softmax(token: Token, device: torch.device, backend: SDPBackend) -> Call:
    assert token.positions is not None
    q = _vectors(token, device)[0]
    shape = token.batch, token.heads, token.positions, token.head_dim
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))

    def step() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return step


LINEAR: dict[str, Callable[[Token, torch.device], Call]] = {"kernel": kernel, "fla": fla, "pytorch": pytorch}
SOFTMAX: dict[str, Callable[[Token, torch.device], Call]] = {
    "softmax, flash": lambda token, device: softmax(token, device, SDPBackend.FLASH_ATTENTION),
    "softmax, cudnn": lambda token, device: softmax(token, device, SDPBackend.CUDNN_ATTENTION),
}


@torch.no_grad()
def measure(method: str, token: Token, in_graph: bool, meter: CudaMeter, ceilings: Ceilings) -> dict[str, Any]:
    """Median time of one call and its rates."""
    make = {**LINEAR, **SOFTMAX}[method]
    calls = [make(token, meter.device) for _ in range(token.num_states())]
    row = meter.seconds([meter.graph(calls)] if in_graph else calls)
    if in_graph:
        row |= {name: row[name] / len(calls) for name in ("seconds", "fastest_s", "slowest_s")}
    return row | rates(token.work(), row["seconds"], ceilings)
