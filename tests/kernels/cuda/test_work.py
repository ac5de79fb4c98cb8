"""What a chunk costs the multiprocessor, counted: it may not grow unseen. LOG.md has the table and its arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hedgehog.kernels.cuda.backward_choice import SWITCH

from .problems import random_problem

# 128-byte accesses of ldmatrix, mma, slow results; of a chunk of 64 tokens at D = 128
FORWARD = {128: (4480, 1856, 16896), 256: (8128, 3552, 49664)}
BACKWARD = {128: (14672, 5856, 33792), 256: (38240, 16480, 165888)}  # both sweeps, at F = 256 each twice


@pytest.mark.parametrize("features", [128, 256])
def test_work_of_a_chunk(emulation, monkeypatch, features):
    """By the difference of two lengths: weights, states and what a row costs apart are small beside it."""
    monkeypatch.setenv(SWITCH, "slices")  # test_backward_whole.py counts the others

    def work(chunks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        problem = random_problem(64 * chunks, head_dim=128, features=features, heads=1)
        problem = replace(problem, q=problem.q.requires_grad_())
        emulation.emulated_work()
        out = problem.run()[0]
        forward = emulation.emulated_work()
        out.backward(torch.ones_like(out))
        return forward, emulation.emulated_work()

    once, twice = work(1), work(2)
    for budget, one, two in zip((FORWARD, BACKWARD), once, twice, strict=True):
        found = tuple(b - a for a, b in zip(one, two, strict=True))
        assert all(count <= limit for count, limit in zip(found, budget[features], strict=True)), found
