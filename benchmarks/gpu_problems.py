"""Small random problems, what they give in float64, and how far the kernels are off: forward, gradients, decoding.

The matrix: head dim × features × feature map × length × kind of problem × segments of the length. The reference is
written out here from the definition and differentiated by autograd. Memory is filled with NaN before each kernel, so
that an element which nobody wrote shows.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hedgehog.kernels.conventions import run_index_BL
from hedgehog.kernels.cuda.operators import linear_attention, linear_attention_token
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.linear_attention import chunked_linear_attention

EPS = 1e-30
LIMITS = {"relative": 4e-3, "absolute": 2e-3, "gradient": 1e-2, "repeated": 0.0, "NaN": 0.0}
"""RMS errors: of o and the state relative to their own size, of o absolute (values have unit variance), of gradients
relative; the difference between two runs on the same inputs, where a race would show; NaN that got lost."""
FEATURE_MAPS = ("hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "given")
KINDS = ("plain", "grouped", "padded", "packed", "resumed", "everything")
LENGTHS = (1, 63, 64, 65, 130, 290)
LONG = 65553
"""Tokens of the long problem: more than 64k, and no multiple of a chunk."""
STATE_TOKENS = 40
"""Tokens that an initial state comes from."""


@dataclass(frozen=True)
class Case:
    """`kind`: grouped query heads, padding at both ends, packed sequences, an initial state, or all of these."""

    head_dim: int
    features: int
    feature_map: str
    length: int
    kind: str = "plain"


def shares_key_heads(case: Case) -> bool:
    return case.kind in ("grouped", "everything")


def all_cases() -> list[Case]:
    return [Case(*chosen) for chosen in product((64, 128), (128, 256), FEATURE_MAPS, LENGTHS, KINDS)]


def few_cases() -> list[Case]:
    """For the emulation, which takes about as long a case as a GPU for a hundred."""
    cases = [Case(64, 128, feature_map, 70, "everything") for feature_map in FEATURE_MAPS]
    return [
        *cases,
        Case(64, 128, "hedgehog_softmax", 1),
        Case(128, 256, "hedgehog_softmax", 65, "grouped"),
        Case(128, 256, "hedgehog_softmax", 65),
    ]


@dataclass(frozen=True)
class Problem:
    """Inputs of one call; `leaves` names those that have a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight_q: Tensor | None
    weight_k: Tensor | None
    feature_map: str
    mask: Tensor | None
    runs: Tensor | None
    initial_kv: Tensor | None
    initial_k_sum: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        names = ("q", "k", "v", "weight_q", "weight_k", "initial_kv", "initial_k_sum")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def with_gradients(self, dtype: torch.dtype | None = None) -> Problem:
        """The same numbers in tensors that autograd follows."""
        leaves = {
            name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for name, x in self.leaves().items()
        }
        return replace(self, **leaves)

    def kernel(self, segments: int, return_state: bool) -> tuple[Tensor, ...]:
        """(o, d, S, z)"""
        return linear_attention(
            self.q, self.k, self.v, self.weight_q, self.weight_k, self.mask, self.runs,
            self.initial_kv, self.initial_k_sum, self.feature_map, EPS, segments, return_state,
        )  # fmt: skip

    def features(self) -> tuple[Tensor, Tensor]:
        """φ(q), φ(k), each (B, H, L, F), in the dtype of the inputs."""
        if self.weight_q is None or self.weight_k is None:
            return self.q, self.k
        group = self.q.shape[1] // self.k.shape[1]
        map_q, map_k = (
            make_feature_map(self.feature_map, num_heads=1, head_dim=1, side=side) for side in ("query", "key")
        )
        k = self.k.repeat_interleave(group, dim=1)
        return map_q.features(self.q, self.weight_q), map_k.features(k, self.weight_k)

    def reference(self, hold_denominator: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(o, final S, final z) by the definition; with `hold_denominator`, no gradient goes through it."""
        phi_q, phi_k = self.features()
        batch, heads, length, _ = phi_q.shape
        v = self.v.repeat_interleave(heads // self.v.shape[1], dim=1)
        runs = self.runs if self.runs is not None else v.new_zeros(batch, length, dtype=torch.int32)
        real = self.mask if self.mask is not None else torch.ones_like(runs, dtype=torch.bool)
        visible = (runs.unsqueeze(2) == runs.unsqueeze(1)).tril() & real.unsqueeze(1)
        scores = (phi_q @ phi_k.mT) * visible.unsqueeze(1)
        numerator, denominator = scores @ v, scores.sum(dim=-1, keepdim=True)
        goes_on = (real & (runs == runs[:, -1:]))[:, None, :, None]
        kv_state, k_sum = (phi_k * goes_on).mT @ v, (phi_k * goes_on).sum(dim=2)
        if self.initial_kv is not None and self.initial_k_sum is not None:  # of the first token's run
            in_first = (runs == runs[:, :1])[:, None, :, None]
            numerator = numerator + in_first * (phi_q @ self.initial_kv)
            denominator = denominator + in_first * (phi_q @ self.initial_k_sum.unsqueeze(-1))
            one_run = (runs[:, -1] == runs[:, 0])[:, None, None]
            kv_state, k_sum = kv_state + one_run[..., None] * self.initial_kv, k_sum + one_run * self.initial_k_sum
        if hold_denominator:
            denominator = denominator.detach()
        return numerator / (denominator + EPS), kv_state, k_sum


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Standard normal q, k, v in bf16, as a model strides them; weights that give W x unit variance."""
    generator = torch.Generator().manual_seed(seed)
    everything = case.kind == "everything"
    batch = 2 if everything or case.kind in ("padded", "packed") else 1
    heads, kv_heads = (4, 2) if shares_key_heads(case) else (2, 2)
    length, given = case.length, case.feature_map == "given"

    def tokens(num_tokens: int, num_heads: int) -> Tensor:
        x = torch.randn(batch, num_tokens, num_heads, case.head_dim, generator=generator)
        return x.to(device, torch.bfloat16).transpose(1, 2)

    def weight() -> Tensor:
        shape = heads, case.head_dim, case.features // 2
        return (torch.randn(shape, generator=generator) / case.head_dim**0.5).bfloat16().float().to(device)

    mask = runs = None
    if everything or case.kind == "padded":
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        mask[0, : length // 3] = False
        mask[1, length - length // 4 :] = False
    if everything or case.kind == "packed":
        ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        for border in (length // 3, length // 3 + 1, 2 * length // 3):  # one sequence of a single token
            ids[0, border:] += 1
        ids[1, 64 if length > 66 else 0 :] += 1  # at a border of chunks
        runs = run_index_BL(ids, mask).int()
    feature_map = "hedgehog_softmax" if given else case.feature_map
    plain = Problem(
        tokens(length, heads), tokens(length, kv_heads), tokens(length, kv_heads), weight(), weight(),
        feature_map, mask, runs, None, None,
    )  # fmt: skip
    if everything or case.kind == "resumed":
        before = replace(
            plain, q=tokens(STATE_TOKENS, heads), k=tokens(STATE_TOKENS, kv_heads), v=tokens(STATE_TOKENS, kv_heads),
            mask=None, runs=None,
        )  # fmt: skip
        _, kv_state, k_sum = before.with_gradients(torch.float64).reference()
        plain = replace(plain, initial_kv=kv_state.detach().float(), initial_k_sum=k_sum.detach().float())
    if not given:
        return plain
    phi_q, phi_k = (phi.bfloat16() for phi in plain.features())
    return replace(plain, q=phi_q, k=phi_k, weight_q=None, weight_k=None, feature_map="given")


def rms(x: Tensor) -> float:
    return x.detach().double().pow(2).mean().sqrt().item() if x.numel() else 0.0


def relative(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """RMS of the difference over the RMS of what is expected; 0 where both are nothing but zeros."""
    error, size = rms(found.double() - expected), rms(expected) if scale is None else scale
    return error / size if error or size else 0.0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates and does not set with NaN: outputs and scratch."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Oracle:
    """A problem's results and gradients in float64, for random gradients that come in."""

    def __init__(self, problem: Problem, seed: int = 1) -> None:
        self.problem = problem
        self.with_state = problem.initial_kv is not None
        exact = problem.with_gradients(torch.float64)
        self.results = exact.reference()
        generator = torch.Generator().manual_seed(seed)
        # gradients of the state are small beside those of o, so that neither hides the other
        self.incoming = [
            (torch.randn(x.shape, generator=generator) * size).bfloat16().to(x.device)
            for x, size in zip(self.results, (1.0, 0.05, 0.05), strict=True)
        ]
        self.gradients = self._differentiate(self.results, exact.leaves())
        self.scales = {name: rms(gradient) for name, gradient in self.gradients.items()}
        if problem.v.shape[2] == 1 and not self.with_state:
            # o = v: no gradient is left of q, k and the weights, and rounding errors are measured against its terms
            terms = problem.with_gradients(torch.float64)
            held = self._differentiate(terms.reference(hold_denominator=True), terms.leaves())
            self.scales |= {name: max(self.scales[name], rms(gradient)) for name, gradient in held.items()}

    def _differentiate(self, results: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        count = 3 if self.with_state else 1
        incoming = [x.to(result.dtype) for x, result in zip(self.incoming, results, strict=True)]
        found = torch.autograd.grad(results[:count], list(leaves.values()), incoming[:count])
        return dict(zip(leaves, found, strict=True))

    def kernel_errors(self, segments: int) -> dict[str, float]:
        """Of o, the state and every gradient."""
        problem = self.problem.with_gradients()
        with poisoned_memory():
            out, _, kv_state, k_sum = problem.kernel(segments, self.with_state)
            results = (out, kv_state, k_sum) if self.with_state else (out, *self.results[1:])
            gradients = self._differentiate(results, problem.leaves())
        errors = {
            "forward relative": relative(out, self.results[0]),
            "forward absolute": rms(out.double() - self.results[0]),
        }
        if self.with_state:
            errors["state relative"] = max(relative(kv_state, self.results[1]), relative(k_sum, self.results[2]))
        for name, expected in self.gradients.items():
            errors[f"gradient {name}"] = relative(gradients[name], expected, self.scales[name])
        return errors

    @torch.no_grad()
    def decoding_errors(self, segments: int, splits: int) -> dict[str, float]:
        """All tokens but the last by the forward kernel, the last by the decoding kernel."""
        problem = self.problem
        before = replace(
            problem,
            q=problem.q[:, :, :-1],
            k=problem.k[:, :, :-1],
            v=problem.v[:, :, :-1],
            mask=None if problem.mask is None else problem.mask[:, :-1],
            runs=None if problem.runs is None else problem.runs[:, :-1],
        )
        last = [x[:, :, -1:] for x in (problem.q, problem.k, problem.v)]
        mask = None if problem.mask is None else problem.mask[:, -1:]
        with poisoned_memory():
            _, _, kv_state, k_sum = before.kernel(segments, True)
            out = linear_attention_token(
                *last, problem.weight_q, problem.weight_k, mask, kv_state, k_sum, problem.feature_map, EPS, splits
            )
        expected, final_kv, final_k_sum = self.results
        return {
            "decoding relative": relative(out, expected[:, :, -1:]),
            "decoding absolute": rms(out.double() - expected[:, :, -1:]),
            "decoded state relative": max(relative(kv_state, final_kv), relative(k_sum, final_k_sum)),
        }


def faults(errors: dict[str, float]) -> list[str]:
    """What is over its limit, or not a number."""
    limits = {name: LIMITS[next(kind for kind in LIMITS if kind in name)] for name in errors}
    return [name for name, error in errors.items() if not error <= limits[name]]


def check(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """A row for one segment and one for four: the case, its errors, and which of them are too large."""
    rows = []
    oracle = Oracle(make_problem(case, device, seed=case.length))
    for segments, splits in ((1, 1), (4, 2 if case.length % 2 else 4)):
        errors = oracle.kernel_errors(segments) | oracle.decoding_errors(segments, splits)
        rows.append({**asdict(case), "segments": segments, "errors": errors, "faults": faults(errors)})
    return rows


def check_long(case: Case, device: torch.device, segments: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same for a length whose T×T matrix fits nowhere, against PyTorch's chunked form in float64: o, gradients."""
    problem = make_problem(case, device, seed=case.length)
    exact = problem.with_gradients(torch.float64)
    expected = chunked_linear_attention(*exact.features(), exact.v, eps=EPS)[0]
    grad_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    expected_gradients = torch.autograd.grad(expected, list(exact.leaves().values()), grad_out.double())
    rows = []
    for count in segments:
        ours = problem.with_gradients()
        with poisoned_memory():
            out = ours.kernel(count, False)[0]
            gradients = torch.autograd.grad(out, list(ours.leaves().values()), grad_out)
            again = problem.kernel(count, False)[0]
        errors = {
            "forward relative": relative(out, expected.detach()),
            "forward absolute": rms(out.double() - expected),
            "forward repeated": rms(again.double() - out),
        }
        for name, found, wanted in zip(ours.leaves(), gradients, expected_gradients, strict=True):
            errors[f"gradient {name}"] = relative(found, wanted)
        rows.append({**asdict(case), "segments": count, "errors": errors, "faults": faults(errors)})
    return rows


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest error of each sort over lengths and segments, a row for each map, shape and kind."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = {name: row[name] for name in ("feature_map", "head_dim", "features", "kind")}
        errors = found.setdefault(tuple(key.values()), {**key, "errors": {}})["errors"]
        for name, error in row.get("errors", {}).items():
            kept = errors.get(name, 0.0)
            errors[name] = kept if math.isnan(kept) or error <= kept else error
    return list(found.values())
