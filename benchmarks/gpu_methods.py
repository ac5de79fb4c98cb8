"""The same causal attention done in several ways, and their times side by side.

kernel               the CUDA kernels, in as many segments of the length as fill the GPU
kernel, one segment  the same without cutting the length
kernel, wgmma        the same with the kernels for Hopper, forward and at 256 features backward
kernel, slices       the same with the values in slices in the backward pass, where they would be taken whole
fla                  flash-linear-attention: its hedgehog map and its chunked kernel with normaliser
pytorch              φ and the chunked form in PyTorch
softmax, flash       torch's SDPA with the FlashAttention backend; what linear attention replaces
softmax, cudnn       the same with cuDNN's
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_environment import version_of
from gpu_timing import Call, CudaMeter, NotAvailable
from gpu_work import Ceilings, Work, limit_s, linear_attention_work, softmax_work, total_bytes, total_flop
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hedgehog.kernels.cuda.attention import num_segments
from hedgehog.kernels.cuda.backward_choice import SWITCH as BACKWARD_SWITCH
from hedgehog.kernels.cuda.forward_choice import SWITCH as FORWARD_SWITCH
from hedgehog.kernels.cuda.forward_choice import choose_forward
from hedgehog.kernels.cuda.gradients import whole_obstacle
from hedgehog.kernels.cuda.library import library_for
from hedgehog.kernels.cuda.operators import linear_attention
from hedgehog.kernels.cuda.switches import switched
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.linear_attention import chunked_linear_attention

EPS = 1e-30
FEATURE_MAP = "hedgehog_softmax"
WGMMA_CHECK_LIMIT_S = 60
WGMMA_CHECK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import checkout
import torch
from gpu_circumstances import repeated
from gpu_problems import KINDS, Case, check
from hedgehog.kernels.cuda.gradients import whole_obstacle
device, maps = torch.device("cuda", torch.cuda.current_device()), ("hedgehog_softmax", "hedgehog_exp", "hedgehog_joint")
for name in maps:
    if why := whole_obstacle(device, 256, 128, name, False, "wgmma"):
        sys.exit(why)
for case in [Case(128, f, name, n, kind) for f in (128, 256) for name in maps for n in (65, 290) for kind in KINDS]:
    wrong = [row["faults"] for row in check(case, device) if row["faults"]]
    if wrong or (case.length == 290 and any(repeated(case, device).values())):
        sys.exit(f"{{case}}: {{wrong or 'not the same bits when run again'}}")
"""
"""The correctness matrix once more, with wgmma forward and, where there is one, backward."""
TWO_SETS_UP_TO = 2**22
"""Tokens times heads; larger inputs are far larger than any cache, and two sets might not fit."""


@dataclass(frozen=True)
class Cell:
    """A shape. `features` is None for softmax attention, which has none."""

    heads: int
    length: int
    features: int | None
    head_dim: int = 128


class Inputs:
    """Random q, k, v and the gradient of o, (1, H, L, D) bf16 as a model strides them, and weights (H, D, F/2)."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        def tokens() -> Tensor:
            shape = 1, cell.length, cell.heads, cell.head_dim
            return torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)

        self.cell, self.device = cell, device
        self.q, self.k, self.v = (tokens().requires_grad_() for _ in range(3))
        self.grad_out = tokens()
        self.weights: list[Tensor] = []
        if cell.features is not None:
            shape = cell.heads, cell.head_dim, cell.features // 2
            weights = (torch.randn(shape, device=device) / cell.head_dim**0.5 for _ in range(2))
            self.weights = [weight.bfloat16().float().requires_grad_() for weight in weights]


@dataclass(frozen=True)
class Ready:
    """`attend` gives o (1, H, L, V); `leaves` are what a backward pass differentiates for."""

    attend: Callable[[], Tensor]
    leaves: list[Tensor]


def kernel(inputs: Inputs, segments: int | None = None, feature_map: str = FEATURE_MAP) -> Ready:
    chosen = segments or num_segments(inputs.device, 1, inputs.cell.heads)
    nothing = None, None, None, None

    def attend() -> Tensor:
        tensors = inputs.q, inputs.k, inputs.v, *inputs.weights
        return linear_attention(*tensors, *nothing, feature_map, EPS, chosen, False)[0]

    return Ready(attend, [inputs.q, inputs.k, inputs.v, *inputs.weights])


def one_segment(inputs: Inputs) -> Ready:
    if num_segments(inputs.device, 1, inputs.cell.heads) == 1:
        raise NotAvailable("one segment fills the GPU already")
    return kernel(inputs, segments=1)


@cache
def wgmma_obstacle() -> str | None:
    """Why the wgmma kernel is not to be timed on this GPU, or None.

    It shows that it is right in a process of its own: one that never returned would take the whole run with it.
    """
    command = [sys.executable, "-c", WGMMA_CHECK]
    environment = {**os.environ, FORWARD_SWITCH: "wgmma", BACKWARD_SWITCH: "wgmma"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WGMMA_CHECK_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"its check did not return within {WGMMA_CHECK_LIMIT_S} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def wgmma(inputs: Inputs) -> Ready:
    cell = inputs.cell
    assert cell.features is not None
    choice = choose_forward(library_for(inputs.device), cell.head_dim, cell.features, FEATURE_MAP)
    if choice.kernel != "wgmma":
        raise NotAvailable(f"wgmma: {choice.reason}")
    if obstacle := wgmma_obstacle():
        raise RuntimeError(f"wgmma is wrong here: {obstacle}")
    return kernel(inputs)


def slices(inputs: Inputs) -> Ready:
    cell = inputs.cell
    assert cell.features is not None
    if obstacle := whole_obstacle(inputs.device, cell.features, cell.head_dim, FEATURE_MAP, False):
        raise NotAvailable(f"that is what runs anyway: {obstacle}")
    return kernel(inputs)


def apply_map(side: Any, x: Tensor, weight: Tensor, feature_map: str = FEATURE_MAP) -> Tensor:
    """φ(x) in bf16, computed in float32 as the kernel does."""
    module = make_feature_map(feature_map, num_heads=1, head_dim=1, side=side)
    return module.features(x, weight).bfloat16()


def pytorch(inputs: Inputs) -> Ready:
    def attend() -> Tensor:
        phi_q = apply_map("query", inputs.q, inputs.weights[0])
        phi_k = apply_map("key", inputs.k, inputs.weights[1])
        return chunked_linear_attention(phi_q, phi_k, inputs.v, eps=EPS)[0]

    return Ready(attend, [inputs.q, inputs.k, inputs.v, *inputs.weights])


def softmax(inputs: Inputs, backend: SDPBackend) -> Ready:
    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True)

    return Ready(attend, [inputs.q, inputs.k, inputs.v])


def find_fla() -> SimpleNamespace:
    """flash-linear-attention's functions, its map and its version. Raises NotAvailable with the reason."""
    try:
        operators = importlib.import_module("fla.ops.linear_attn")
        maps = importlib.import_module("fla.modules.feature_map")
        return SimpleNamespace(
            chunk=operators.chunk_linear_attn,
            recurrent=operators.fused_recurrent_linear_attn,
            map=maps.HedgehogFeatureMap,
            version=version_of("flash-linear-attention", "fla-core"),
        )
    except Exception as error:  # it looks for a GPU and for Triton when it is imported
        raise NotAvailable(f"flash-linear-attention: {type(error).__name__}: {error}") from error


def fla_map(found: SimpleNamespace, weight: Tensor) -> torch.nn.Module:
    """Its hedgehog map with a head's weight (D, F/2). It has one for all heads, and a bias, here zero.

    As it comes it has F = 2·D; for fewer features its projection is replaced by a narrower one.
    """
    head_dim, width = weight.shape
    module = found.map(head_dim).to(weight.device, torch.bfloat16)
    module.layer = torch.nn.Linear(head_dim, width, device=weight.device, dtype=torch.bfloat16)
    with torch.no_grad():
        module.layer.weight.copy_(weight.T)
        module.layer.bias.zero_()
    return module


def fla(inputs: Inputs) -> Ready:
    found = find_fla()
    map_q, map_k = (fla_map(found, weight[0]) for weight in inputs.weights)

    def attend() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        return found.chunk(map_q(q), map_k(k), v, normalize=True)[0].transpose(1, 2)

    return Ready(attend, [inputs.q, inputs.k, inputs.v, *map_q.parameters(), *map_k.parameters()])


def fla_difference(device: torch.device, cell: Cell) -> dict[str, Any]:
    """How far its o is from the kernel's, relative RMS, where both have the same map: is it the same work?"""
    inputs = Inputs(cell, device)
    inputs.weights = [weight.detach()[:1].expand_as(weight).contiguous() for weight in inputs.weights]
    with torch.no_grad():
        theirs = fla(inputs).attend().double()
        ours = kernel(inputs, feature_map="hedgehog_joint").attend().double()
    return {
        "version": find_fla().version,
        "difference_from_kernel": ((theirs - ours).norm() / ours.norm()).item(),
    }


LINEAR: dict[str, Callable[[Inputs], Ready]] = {
    "kernel": kernel,
    "kernel, one segment": one_segment,
    "kernel, wgmma": wgmma,
    "kernel, slices": slices,
    "fla": fla,
    "pytorch": pytorch,
}
SOFTMAX: dict[str, Callable[[Inputs], Ready]] = {
    "softmax, flash": lambda inputs: softmax(inputs, SDPBackend.FLASH_ATTENTION),
    "softmax, cudnn": lambda inputs: softmax(inputs, SDPBackend.CUDNN_ATTENTION),
}
METHODS = {**LINEAR, **SOFTMAX}
SWITCHES = {
    "kernel, wgmma": {FORWARD_SWITCH: "wgmma", BACKWARD_SWITCH: "wgmma"},
    "kernel, slices": {BACKWARD_SWITCH: "slices"},
}


def call_of(ready: Ready, inputs: Inputs, passes: str) -> Call:
    """o without a graph of gradients; the gradients of an o that is there already; or both."""

    def forward() -> Tensor:
        with torch.no_grad():
            return ready.attend()

    def forward_backward() -> tuple[Tensor, ...]:
        out = ready.attend()
        return out.detach(), *torch.autograd.grad(out, ready.leaves, inputs.grad_out)

    if passes != "backward":
        return forward if passes == "forward" else forward_backward
    out = ready.attend()
    return lambda: torch.autograd.grad(out, ready.leaves, inputs.grad_out, retain_graph=True)


def work_of(cell: Cell, passes: str) -> list[Work]:
    if cell.features is None:
        return softmax_work(passes, cell.heads, cell.length, cell.head_dim)
    return linear_attention_work(passes, cell.heads, cell.length, cell.head_dim, cell.features)


def rates(work: list[Work], seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """Of the work that has to be done, however much a method does."""
    least = limit_s(work, ceilings)
    return {
        "flop_per_s": total_flop(work) / seconds,
        "bytes_per_s": total_bytes(work) / seconds,
        "limit_s": least,
        "fraction_of_limit": least / seconds,
    }


def measure(method: str, sets: list[Inputs], passes: str, meter: CudaMeter, ceilings: Ceilings) -> dict[str, Any]:
    """Median time, rates and extra memory of one method on one shape."""
    if (method, passes) == ("kernel, slices", "forward"):
        raise NotAvailable("the forward pass is kernel's")
    make = METHODS[method]
    with ExitStack() as stack:
        for switch, name in SWITCHES.get(method, {}).items():
            stack.enter_context(switched(switch, name))
        calls = [call_of(make(inputs), inputs, passes) for inputs in sets]
        row = meter.seconds(calls)
        row |= rates(work_of(sets[0].cell, passes), row["seconds"], ceilings)
        row["extra_bytes"] = meter.extra_bytes(calls[0])
    return row


def make_sets(cell: Cell, device: torch.device) -> list[Inputs]:
    """Inputs that take turns."""
    return [Inputs(cell, device) for _ in range(2 if cell.heads * cell.length <= TWO_SETS_UP_TO else 1)]
