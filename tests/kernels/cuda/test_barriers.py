"""Each place where threads of the real kernels wait or fence is needed: without it, the emulation's numbers are wrong.

Waits for wgmma's products are not among them: before such a wait what the product gives is not a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hedgehog.kernels.cuda.backward_choice import SWITCH as BACKWARD_SWITCH
from hedgehog.kernels.cuda.forward_choice import SWITCH as FORWARD_SWITCH
from hedgehog.kernels.cuda.library import KernelError, Library
from hedgehog.kernels.cuda.switches import switched
from hedgehog.kernels.linear_attention import LinearAttentionState

from .problems import Problem, random_problem
from .test_decode import step
from .test_gradient import by_kernels, grad_of_out, packed

SEEDS = 12
"""Orders of the threads that are tried before a place counts as not needed."""


def sequence(feature_map: str, head_dim: int) -> Problem:
    """Two chunks, packed and padded: whatever the kernels can wait for."""
    problem = random_problem(70, batch=2, heads=1, head_dim=head_dim, feature_map=feature_map)
    return packed(problem, [30, 66], left=20, right=3)


def forward(head_dim: int) -> list[Tensor]:
    return list(sequence("hedgehog_softmax", head_dim).run())


def backward(feature_map: str) -> list[Tensor]:
    problem = sequence(feature_map, 64)
    return list(by_kernels(problem, grad_of_out(problem)).values())


def forward_by_warpgroups(features: int) -> list[Tensor]:
    """Three chunks: what a chunk uses must be free for the next one but one."""
    problem = random_problem(140, batch=2, heads=1, head_dim=128, features=features)
    plain = random_problem(140, heads=1, head_dim=128, features=features)
    with switched(FORWARD_SWITCH, "wgmma"):
        return [*packed(problem, [30, 66], left=20, right=3).run(), *plain.run()]


def backward_whole(kernel: str) -> list[Tensor]:
    problem = random_problem(140, batch=2, heads=1, head_dim=128, features=256)
    plain = random_problem(140, heads=1, head_dim=128, features=256)
    with switched(BACKWARD_SWITCH, kernel):
        found = [by_kernels(packed(problem, [30, 66], left=20, right=3), grad_of_out(problem), segments=2)]
        found.append(by_kernels(plain, grad_of_out(plain)))
    return [grad for grads in found for grad in grads.values()]


def decode() -> list[Tensor]:
    problem = random_problem(1, heads=1)
    ones = LinearAttentionState(torch.ones(1, 1, 128, 64), torch.ones(1, 1, 128))
    return [step(problem, 0, ones, splits=2), ones.kv_state_BHFV, ones.k_sum_BHF]


def is_missed(emulation: Library, run: Callable[[], list[Tensor]], expected: list[Tensor]) -> bool:
    """Whether some order of the threads gives something else, or stops."""
    for seed in range(SEEDS):
        emulation.seed_emulation(seed)
        try:
            if any(not torch.equal(x, y) for x, y in zip(run(), expected, strict=True)):
                return True
        except KernelError:
            return True
    return False


def not_missed(emulation: Library, runs: list[Callable[[], list[Tensor]]], files: set[str]) -> list[str]:
    """Places in `files` without which every run gives the same in every order."""
    emulation.forget_places()
    expected = [run() for run in runs]
    places = [place for place in emulation.emulated_places() if place.split(":")[0] in files]
    assert {place.split(":")[0] for place in places} == files
    found = []
    for place in places:
        emulation.leave_out(place)
        try:
            if not any(is_missed(emulation, run, right) for run, right in zip(runs, expected, strict=True)):
                found.append(place)
        finally:
            emulation.leave_out(None)
    return found


@pytest.mark.compiles  # a minute and a half; needs no GPU either
@pytest.mark.parametrize(
    ("runs", "files"),
    [
        # φ(q) covers raw k at 64, keys and queries have warps of their own at 128
        ([partial(forward, 64), partial(forward, 128)], {"forward.cuh"}),
        (
            [partial(backward, "hedgehog_softmax"), partial(backward, "given")],
            {"backward.cuh", "backward_queries.cuh", "backward_keys.cuh"},
        ),
        (
            [partial(backward_whole, "whole")],
            {"backward.cuh", "backward_queries.cuh", "backward_keys.cuh", "backward_inputs.cuh"},
        ),
        ([decode], {"decode.cu"}),
        ([partial(forward_by_warpgroups, 128), partial(forward_by_warpgroups, 256)], {"forward_hopper.cuh"}),
        ([partial(backward_whole, "wgmma")], {"backward.cuh", "backward_queries.cuh", "backward_keys.cuh"}),
    ],
    ids=["forward", "backward", "backward whole", "decode", "forward by warpgroups", "backward by warpgroups"],
)
def test_every_wait_is_needed(emulation, runs, files):
    assert not_missed(emulation, runs, files) == []
