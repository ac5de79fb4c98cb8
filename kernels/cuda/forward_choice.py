"""Which of the two forward kernels runs, and why: decided here and nowhere else.

`mma`, forward.cuh's, serves every shape and GPU. `wgmma`, forward_hopper.cuh's, is for Hopper (compute capability 9.0),
head dim 128 and fused maps. Until a GPU has shown it to be faster, it runs only where `HEDGEHOG_FORWARD=wgmma` asks
for it. The check at first use (`attention.disagreement`) looks at whichever is chosen by
then; a later change is not looked at.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

from .library import Library
from .switches import asked_for

SWITCH = "HEDGEHOG_FORWARD"
KERNEL_NUMBERS = {"mma": 0, "wgmma": 1}
logger = logging.getLogger(__name__)


class ForwardChoice(NamedTuple):
    """A name in KERNEL_NUMBERS, and the reason in words."""

    kernel: str
    reason: str


def choose_forward(library: Library, head_dim: int, features: int, feature_map: str) -> ForwardChoice:
    """Raises ValueError for an unknown name in $HEDGEHOG_FORWARD."""
    wanted = asked_for(SWITCH, KERNEL_NUMBERS)
    if not wanted:
        return ForwardChoice("mma", f"the default; wgmma has not been measured yet ({SWITCH}=wgmma asks for it)")
    if wanted == "wgmma" and not library.has_wgmma(head_dim, features, feature_map):
        choice = ForwardChoice("mma", f"no wgmma kernel for head dim {head_dim}, F={features}, {feature_map} here")
        if feature_map != "given":  # which is asked about in any case, before it is known that φ can be inside
            _say_once(choice.reason)
        return choice
    return ForwardChoice(wanted, f"{SWITCH}={wanted}")


@cache
def _say_once(reason: str) -> None:
    logger.warning("%s=wgmma, but mma.sync runs: %s", SWITCH, reason)
