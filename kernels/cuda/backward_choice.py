"""Which of the backward kernels run, and why: decided here and nowhere else.

`slices` serve every shape and GPU; at F = 256 they take the values in two slices and do much of the work twice. `whole`
take them whole (backward.cuh): head dim 128 and F = 256, fused maps, a key head for each query head, and more shared
memory than an A100 has. They are chosen where they serve and agree with PyTorch on a small problem, since they do less
of everything that is counted (LOG.md); `HEDGEHOG_BACKWARD=slices` asks for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .switches import asked_for

SWITCH = "HEDGEHOG_BACKWARD"
KERNEL_NUMBERS = {"slices": 0, "whole": 1}


class BackwardChoice(NamedTuple):
    """A name in KERNEL_NUMBERS, and the reason in words."""

    kernel: str
    reason: str


def choose_backward(whole_obstacle: Callable[[], str | None]) -> BackwardChoice:
    """`whole_obstacle` says why `whole` cannot serve; called only where it matters, since it may run the kernels.

    Raises ValueError for an unknown name in $HEDGEHOG_BACKWARD.
    """
    if asked_for(SWITCH, KERNEL_NUMBERS) == "slices":
        return BackwardChoice("slices", f"{SWITCH}=slices")
    obstacle = whole_obstacle()
    return (
        BackwardChoice("whole", "they serve, and do less") if obstacle is None else BackwardChoice("slices", obstacle)
    )
