"""What the matrix of shapes does not show: the same inputs again, another stream, a CUDA graph, addresses beyond 2³¹
elements, NaN. Rows as gpu_problems.py has them, with `check` for what was looked at.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_problems import EPS, FEATURE_MAPS, Case, Problem, faults, make_problem, poisoned_memory, relative
from gpu_work import CHUNK
from torch import Tensor

from hedgehog.kernels.cuda.operators import linear_attention_token

SEGMENTS = 3
FAR_STRIDE = 2**24
"""Elements from one token to the next: with 130 tokens and more, the last ones lie beyond 2³¹ elements."""
BUSY_CYCLES = 20_000_000
"""Some ten milliseconds, in which what was queued behind on the same stream has not happened yet."""


def results_of(problem: Problem, grad_out: Tensor, segments: int = SEGMENTS) -> dict[str, Tensor]:
    """o, the final state and every gradient, from memory that held NaN; the inputs as they lie."""
    leaves = {name: x.detach().requires_grad_() for name, x in problem.leaves().items()}
    with poisoned_memory():
        out, _, kv_state, k_sum = replace(problem, **leaves).kernel(segments, True)
        found = torch.autograd.grad(out, list(leaves.values()), grad_out)
    names = (f"d{name}" for name in leaves)
    return {"o": out.detach(), "S": kv_state, "z": k_sum, **dict(zip(names, found, strict=True))}


def grad_for(problem: Problem) -> Tensor:
    shape = *problem.q.shape[:3], problem.v.shape[-1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(problem.q)


def unlike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Differences, of which none is allowed; NaN counts."""
    errors = {f"{name} repeated": relative(found[name], expected[name].double()) for name in expected}
    return {name: error for name, error in errors.items() if error != 0} or {"repeated": 0.0}


def repeated(case: Case, device: torch.device) -> dict[str, float]:
    """The same bits when run again: o, state and every gradient. A race, or an atomic addition, shows here."""
    problem = make_problem(case, device)
    grad_out = grad_for(problem)
    first = results_of(problem, grad_out)
    return unlike(results_of(problem, grad_out), first)


def other_stream(case: Case, device: torch.device) -> dict[str, float]:
    """Inputs that arrive late on a stream which is not the default one; a launch on any other stream sees the old."""
    problem = make_problem(case, device)
    grad_out = grad_for(problem)
    expected = results_of(problem, grad_out)
    late = replace(problem, q=torch.full_like(problem.q, 7.0), v=torch.full_like(problem.v, 7.0))
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        late.q.copy_(problem.q)
        late.v.copy_(problem.v)
        found = results_of(late, grad_out)
    stream.synchronize()
    return unlike(found, expected)


def decode(problem: Problem, state: tuple[Tensor, Tensor], vectors: list[Tensor], splits: int) -> Tensor:
    weights = problem.weight_q, problem.weight_k
    return linear_attention_token(*vectors, *weights, None, *state, problem.feature_map, EPS, splits)


def decoding_graph(case: Case, device: torch.device) -> dict[str, float]:
    """A CUDA graph of one token, replayed on new tokens, against the same calls without a graph; o and the state."""
    problem = make_problem(replace(case, kind="plain"), device)
    tokens = [[x[:, :, at : at + 1].contiguous() for x in (problem.q, problem.k, problem.v)] for at in range(4)]
    shape = problem.q.shape[0], problem.q.shape[1], case.features
    start = torch.rand(*shape, case.head_dim, device=device), 1 + torch.rand(shape, device=device)
    held, state = [x.clone() for x in tokens[0]], (start[0].clone(), start[1].clone())
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        decode(problem, state, held, 4)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(problem, state, held, 4)
    for kept, first in zip(state, start, strict=True):
        kept.copy_(first)
    eager = start[0].clone(), start[1].clone()
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for at, token in enumerate(tokens):
        for kept, new in zip(held, token, strict=True):
            kept.copy_(new)
        graph.replay()
        found[f"o of token {at}"] = out.clone()
        expected[f"o of token {at}"] = decode(problem, eager, token, 4)
    return unlike(found | {"S": state[0], "z": state[1]}, expected | {"S": eager[0], "z": eager[1]})


def far_apart(case: Case, device: torch.device) -> dict[str, float]:
    """Tokens so far apart that their offsets need 64 bits, against the same numbers close together."""
    problem = make_problem(case, device)
    grad_out = grad_for(problem)
    expected = results_of(problem, grad_out)
    memory = empty_elements(FAR_STRIDE * case.length, device)
    begins, spread = 0, []
    for x in (problem.q, problem.k, problem.v, grad_out):
        batch, heads, _, width = x.shape
        strides = heads * width, width, FAR_STRIDE, 1
        spread.append(memory.as_strided(x.shape, strides, begins).copy_(x))
        begins += batch * heads * width
    assert begins <= FAR_STRIDE and case.length * FAR_STRIDE > 2**31
    far = replace(problem, q=spread[0], k=spread[1], v=spread[2])
    return unlike(results_of(far, spread[3]), expected)


def empty_elements(number: int, device: torch.device) -> Tensor:
    """bfloat16; on a CPU pages of which only those that are touched take memory."""
    if device.type == "cuda":
        return torch.empty(number, dtype=torch.bfloat16, device=device)
    return torch.frombuffer(mmap.mmap(-1, 2 * number), dtype=torch.bfloat16)


def not_a_number(case: Case, device: torch.device) -> dict[str, float]:
    """1 for each input whose NaN does not come out where it has to, or comes out in an earlier chunk than its own."""
    problem = make_problem(replace(case, kind="plain"), device)
    at, errors = case.length // 2, {}
    for name in ("q", "k", "v"):
        x = getattr(problem, name).clone()
        x[:, :, at, 3] = float("nan")
        out = replace(problem, **{name: x}).kernel(SEGMENTS, False)[0].isnan().any(dim=-1)
        seen = out[:, :, at:] if name != "q" else out[:, :, at : at + 1]
        errors[f"NaN in {name}"] = float(not seen.all() or out[:, :, : at // CHUNK * CHUNK].any())
    vectors = [x[:, :, :1].clone() for x in (problem.q, problem.k, problem.v)]
    vectors[0][..., 5] = float("nan")
    shape = problem.q.shape[0], problem.q.shape[1], case.features
    state = torch.rand(*shape, case.head_dim, device=device), torch.rand(shape, device=device)
    errors["NaN in a decoded q"] = float(not decode(problem, state, vectors, 2).isnan().all())
    return errors


Check = Callable[[Case, torch.device], dict[str, float]]
ON_A_GPU: dict[str, Check] = {"another stream": other_stream, "decoding in a CUDA graph": decoding_graph}
ANYWHERE: dict[str, Check] = {
    "run again": repeated,
    "offsets beyond 2³¹": far_apart,
    "NaN": not_a_number,
}


def jobs(device: torch.device, quick: bool) -> list[tuple[str, Check, Case]]:
    """Every check with the cases that it is for."""
    shapes = [(64, 128)] if quick else [*product((64, 128), (128, 256))]
    maps = ("hedgehog_softmax",) if quick else FEATURE_MAPS
    found: list[tuple[str, Check, Case]] = []
    for name, check in {**ANYWHERE, **(ON_A_GPU if device.type == "cuda" else {})}.items():
        for (head_dim, features), feature_map in product(shapes, maps):
            found.append((name, check, Case(head_dim, features, feature_map, 133, "grouped")))
    return found


def check_all(device: torch.device, quick: bool, fits: Callable[[Case], bool]) -> list[dict[str, Any]]:
    """A row for each check and case that `fits` the GPU; a check that fails is a fault."""
    rows = []
    for name, check, case in jobs(device, quick):
        if fits(case):
            rows.append({**asdict(case), "check": name, **_tried(partial(check, case, device))})
    return rows


def _tried(check: Callable[[], dict[str, float]]) -> dict[str, Any]:
    try:
        errors = check()
    except torch.OutOfMemoryError:
        return {"errors": {}, "faults": [], "skipped": "out of memory"}
    except Exception as error:  # the other checks tell where it is right
        return {"errors": {}, "faults": [f"{type(error).__name__}: {error}"]}
    return {"errors": errors, "faults": faults(errors)}
