"""Times and memory on a GPU, the ceilings they are held against, and the time that is left for more of them.

`HostMeter` does the same with the host's clock, so that everything around the GPU's own clock can run without one.
"""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_work import Ceilings
from torch import Tensor

from hedgehog.pipeline.allocation_peak import allocation_peak

Call = Callable[[], Any]
MEASUREMENT_S = 0.15
"""What the timed calls of one measurement take together; at least 3 calls, one where a call takes over a second."""
FLUSH_BYTES = 2**30
SETTLE_BYTES = 2**28
"""Read after the flush; several times any GPU's L2."""


class NotAvailable(Exception):
    """A competitor that is not installed, or does not do what is asked; the message says which."""


class CudaMeter:
    """Medians of CUDA events over calls that take turns, after one call each as warm-up.

    Before each timed call a large buffer is written: no input is in the cache then, and the host, which queues the
    call meanwhile, is ahead by a third of a millisecond or so. What the host takes beyond that counts. Then another
    buffer is read, or the call would pay for writing the first one's last lines back to memory.
    """

    max_rounds = 30

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES, settle_bytes: int = SETTLE_BYTES) -> None:
        self.device = device
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        self._settle = torch.zeros(settle_bytes // 4, device=device)
        self._sum = torch.empty((), device=device)

    def seconds(self, calls: Sequence[Call]) -> dict[str, Any]:
        """The median, the fastest, the slowest and the number of timed calls."""
        for call in calls:
            call()
        self._synchronize()
        times = [self._once(calls[0])]
        rounds = 1 if times[0] > 1 else min(self.max_rounds, max(3, round(MEASUREMENT_S / times[0])))
        times += [self._once(calls[index % len(calls)]) for index in range(1, rounds)]
        return {
            "seconds": statistics.median(times),
            "fastest_s": min(times),
            "slowest_s": max(times),
            "rounds": rounds,
        }

    def extra_bytes(self, call: Callable[[], Tensor | tuple[Tensor, ...]]) -> int:
        """The most that a call holds at once beyond its inputs and what it returns. Call it once before: what a first
        call allocates for good does not count."""
        with allocation_peak(self.device) as peak:
            results = call()
        returned = (results,) if isinstance(results, Tensor) else results
        return peak.num_bytes - sum(x.untyped_storage().nbytes() for x in returned)

    def graph(self, calls: Sequence[Call]) -> Call:
        """The calls one after the other as one CUDA graph."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _once(self, call: Call) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.sum(self._settle, dim=0, out=self._sum)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


class HostMeter(CudaMeter):
    """The host's clock, one timed call, no graphs: shows that everything runs, and measures nothing."""

    max_rounds = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def graph(self, calls: Sequence[Call]) -> Call:
        return lambda: [call() for call in calls]

    def _synchronize(self) -> None:
        pass

    def _once(self, call: Call) -> float:
        started = time.perf_counter()
        call()
        return max(time.perf_counter() - started, 1e-9)


def measure_ceilings(meter: CudaMeter, copy_bytes: int, matrix_size: int) -> Ceilings:
    """Of a copy and of a square bf16 product, on random data: zeros can run faster."""
    source = torch.randn(copy_bytes // 4, device=meter.device)
    target = torch.empty_like(source)
    copy_s = meter.seconds([lambda: target.copy_(source)])["seconds"]
    a, b = (torch.randn(matrix_size, matrix_size, device=meter.device).bfloat16() for _ in range(2))
    product_s = meter.seconds([lambda: a @ b])["seconds"]
    return Ceilings(2 * copy_bytes / copy_s, 2 * matrix_size**3 / product_s)


class Budget:
    """Seconds since the start, and how many are left."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._started = time.monotonic()

    def spent_s(self) -> float:
        return time.monotonic() - self._started

    def left_s(self) -> float:
        return self.limit_s - self.spent_s()


class Forecast:
    """What a row will take, from what the same method took at a shorter length: at most quadratically more."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[int, float]] = {}

    def seconds(self, key: Any, length: int) -> float:
        """0 where nothing is known."""
        if key not in self._seen:
            return 0.0
        before, took = self._seen[key]
        return took * max(1.0, length / before) ** 2

    def note(self, key: Any, length: int, seconds: float) -> None:
        if length >= self._seen.get(key, (0, 0.0))[0]:
            self._seen[key] = length, seconds


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or {"skipped": reason} or {"failed": reason}: one failure must not cost the other figures."""
    try:
        return measure()
    except NotAvailable as reason:
        return {"skipped": str(reason)}
    except torch.OutOfMemoryError:
        pass
    except Exception as error:  # a competitor may fail in any way, at compile time or when it runs
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}
    free_memory()  # after the except clause, whose traceback holds what there was no room for
    return {"failed": "out of memory"}


def free_memory() -> None:
    """Back to the GPU, so that blocks kept for one shape do not stand in the next one's way."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
