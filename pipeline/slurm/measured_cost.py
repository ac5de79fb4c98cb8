"""What training a layer did cost over running it, from the step times of an array's elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import RunConfig
from ..run_folder import RunFolder
from ..stage_progress import read_metrics
from .layer_groups import layers_of

_MIN_STEPS = 20
_WARM_UP_STEPS = 3
"""First steps of an element, which compile and fill caches."""


def measured_trained_layer_cost(folder: RunFolder, config: RunConfig) -> float | None:
    """`slurm.trained_layer_cost` as the main conversion's elements had it, or None where they do not tell.

    All elements see the same batches, so steps of the same number are compared.
    """
    if config.distill.cache_hidden_states:  # how often the lower layers ran then differs between epochs
        return None
    times = {path.name.removeprefix("layers-"): _step_times(path) for path in folder.subsets()}
    times = {text: steps for text, steps in times.items() if steps}
    if len(times) < 2:
        return None
    common = set.intersection(*(set(steps) for steps in times.values()))
    if len(common) < _MIN_STEPS:
        return None
    return fitted_cost([(layers_of(text), sum(steps[n] for n in common)) for text, steps in times.items()])


def fitted_cost(elements: Sequence[tuple[Sequence[int], float]]) -> float | None:
    """c of time = f · (layers run) + c · f · (layers trained), by least squares; None where no positive one fits.

    Args:
        elements: layers and time of each.
    """
    runs = [max(layers) + 1 for layers, _ in elements]
    trains = [len(layers) for layers, _ in elements]
    times = [time for _, time in elements]

    def product(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    determinant = product(runs, runs) * product(trains, trains) - product(runs, trains) ** 2
    forward = product(trains, trains) * product(runs, times) - product(runs, trains) * product(trains, times)
    own = product(runs, runs) * product(trains, times) - product(runs, trains) * product(runs, times)
    return own / forward if determinant > 0 and forward > 0 and own > 0 else None


def _step_times(place: Path) -> Mapping[int, float]:
    """Seconds by number of the step."""
    return {
        record["step"]: record["step_s"]
        for record in read_metrics(place / "metrics.jsonl")
        if isinstance(record.get("step"), int)
        and isinstance(record.get("step_s"), (int, float))
        and record["step"] > _WARM_UP_STEPS
    }
