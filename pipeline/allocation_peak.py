"""How many bytes of tensors were alive at once: CUDA's own counter, or on a CPU every allocation that torch reports.

A process's resident set tells what a user's machine needs, but on a CPU it holds libraries, the allocator's free lists
and whatever came before. An estimate of tensors is checked against tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class AllocationPeak:
    """`num_bytes` after the block: the most that it held at once, over what was allocated when it began."""

    num_bytes: int = 0


@contextmanager
def allocation_peak(device: torch.device | str) -> Iterator[AllocationPeak]:
    """Measure the block's peak. On a CPU this slows the block down, so do not time it too."""
    found = AllocationPeak()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.num_bytes = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    assert results is not None
    # torch's stub of these events leaves out nbytes
    memory: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    alive = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        found.num_bytes = max(found.num_bytes, alive)
