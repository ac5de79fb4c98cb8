"""Which of the backward kernels run, and why: decided here and nowhere else.

`slices` serve every shape and GPU; at F = 256 they take the values in two slices and do much of the work twice. `whole`
take them whole (backward.cuh): head dim 128 and F = 256, fused maps, a key head for each query head, and more shared
memory than an A100 has. They are chosen where they serve and agree with PyTorch on a small problem, since they do less
of everything that is counted (LOG.md). `wgmma` are the same with half of their products by warpgroups (Hopper): until a
GPU has shown them to be faster, only for who asks. `HEDGEHOG_BACKWARD` takes these names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from .switches import asked_for

SWITCH = "HEDGEHOG_BACKWARD"
KERNEL_NUMBERS = {"slices": 0, "whole": 1, "wgmma": 2}
logger = logging.getLogger(__name__)


class BackwardChoice(NamedTuple):
    """A name in KERNEL_NUMBERS, and the reason in words."""

    kernel: str
    reason: str


def choose_backward(obstacle: Callable[[str], str | None]) -> BackwardChoice:
    """`obstacle` says why the kernels of a name cannot serve; asked only where it matters: it may run the kernels.

    Raises ValueError for an unknown name in $HEDGEHOG_BACKWARD.
    """
    asked = asked_for(SWITCH, KERNEL_NUMBERS)
    if asked == "slices":
        return BackwardChoice("slices", f"{SWITCH}=slices")
    if asked == "wgmma":
        if (why := obstacle("wgmma")) is None:
            return BackwardChoice("wgmma", f"{SWITCH}=wgmma")
        _say_once(why)
    why = obstacle("whole")
    return BackwardChoice("whole", "they serve, and do less") if why is None else BackwardChoice("slices", why)


@cache
def _say_once(reason: str) -> None:
    logger.warning("%s=wgmma, but others run: %s", SWITCH, reason)
