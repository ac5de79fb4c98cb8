"""Does the config's `slurm` section go together, and with the batches? Asked by `validate` and `submit`; no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..config import RunConfig
from ..config_checks import Problem, untouched, world_errors
from ..config_loading import Reading
from ..preflight import of_all_conversions
from .resources import stage_settings, world_size
from .scheduler import line_options

_JOB_KINDS = ("prepare", "distill", "merge", "finetune", "evaluate", "export")
"""Keys under `slurm` for single kinds of jobs."""
_EARLY_SIGNAL_S = 60
"""sbatch's manual: the signal may be sent up to so many seconds earlier than asked for."""
_START_S = 60
"""From a job's start to its first step, where the model is not very large."""


def layout_errors(reading: Reading) -> list[Problem]:
    """Everything that `submit` refuses of the section `slurm`, the variants' batches included."""
    main = reading.conversions[0]
    whole = [*_time_errors(main.config), *_cluster_errors(main.config), *_option_errors(main.config)]
    return [*of_all_conversions(reading, _world_errors), *untouched(whole, main.unknown)]


def _world_errors(config: RunConfig) -> list[Problem]:
    """Numbers of processes that the batches cannot be split over."""
    found = []
    for stage in ("distill", "finetune"):
        settings = stage_settings(config, stage)
        layout = f"(slurm: {settings['nodes']} nodes x {settings['tasks_per_node']} tasks)"
        keys = _keys(stage, "nodes", "tasks_per_node", "gpus")
        if any(problem.keys[0].startswith(f"{stage}.") for problem in world_errors(config, 1)):
            continue  # not even one process can do that: told without Slurm
        for problem in world_errors(config, world_size(config, stage)):
            if problem.keys[0].startswith(f"{stage}."):
                found.append(Problem((*problem.keys, *keys), f"{problem.message} {layout}"))
    return found


def _keys(stage: str, *names: str) -> list[str]:
    """A setting's keys, the general one and the stage's own."""
    return [f"{section}.{name}" for section in ("slurm", f"slurm.{stage}") for name in names]


def _owner(config: RunConfig, stage: str, name: str) -> str:
    """The key that a stage's setting comes from."""
    return f"slurm.{name}" if getattr(getattr(config.slurm, stage), name) is None else f"slurm.{stage}.{name}"


def _cluster_errors(config: RunConfig) -> Iterator[Problem]:
    """Jobs on another cluster: squeue and scancel would look for them on this one."""
    told = set()
    for stage in _JOB_KINDS:
        key = _owner(config, stage, "sbatch_lines")
        for line in stage_settings(config, stage)["sbatch_lines"] or ():
            names = line_options(line)
            elsewhere = any(name == "-M" or (len(name) > 4 and "--clusters".startswith(name)) for name in names)
            if elsewhere and (key, line) not in told:
                told.add((key, line))
                yield Problem(
                    (key,),
                    f"{line}: jobs on another cluster are not followed by `status` and `cancel`. Remove it, and submit "
                    "from a login node of that cluster (or export SLURM_CLUSTERS for every `hedgehog` command).",
                )


_OWN_OPTIONS = {
    "--array": "-a",
    "--chdir": "-D",
    "--dependency": "-d",
    "--error": "-e",
    "--open-mode": "",
    "--output": "-o",
    "--parsable": "",
    "--test-only": "",
    "--wait": "-W",
    "--wrap": "",
}
"""Options of sbatch, and their letters, that `submit`, `status` and the scripts rely on as they give them."""


def _option_errors(config: RunConfig) -> Iterator[Problem]:
    """Lines for sbatch that take out of a job what `submit` and `status` know it by."""
    told = set()
    for stage in _JOB_KINDS:
        key = _owner(config, stage, "sbatch_lines")
        for line in stage_settings(config, stage)["sbatch_lines"] or ():
            for name in line_options(line):
                own = next((option for option, letter in _OWN_OPTIONS.items() if name in (option, letter)), None)
                if own is not None and (key, line) not in told:
                    told.add((key, line))
                    yield Problem(
                        (key,), f"{line}: `submit` itself decides {own}, and relies on it; remove it from this line."
                    )


def _time_limit(config: RunConfig, stage: str) -> tuple[str, str | None]:
    """The key that a kind of jobs has its time limit from, and the limit: the last line for sbatch that has one, the
    key `time`, or what the environment says to sbatch."""
    settings = stage_settings(config, stage)
    for line in reversed(settings["sbatch_lines"] or ()):
        options = line_options(line)
        if "--time" in options or "-t" in options:
            return _owner(config, stage, "sbatch_lines"), options.get("--time", options.get("-t"))
    if settings["time"] is None:
        return _owner(config, stage, "time"), os.environ.get("SBATCH_TIMELIMIT")
    return _owner(config, stage, "time"), settings["time"]


def _time_errors(config: RunConfig) -> Iterator[Problem]:
    """Time limits whose warning may come before the first step, at every start anew."""
    grace = config.slurm.grace_period_s
    told = set()
    for stage in _JOB_KINDS:
        key, time = _time_limit(config, stage)
        try:
            limit_s = None if time is None else time_limit_s(time)
        except ValueError:  # UNLIMITED, or what sbatch will refuse
            limit_s = None
        if limit_s is not None and limit_s < grace + _EARLY_SIGNAL_S + _START_S and key not in told:
            told.add(key)
            yield Problem(
                (key, "slurm.grace_period_s"),
                f"{time} is {limit_s} s, too short for slurm.grace_period_s={grace}: Slurm warns a job so many "
                f"seconds before its limit and up to {_EARLY_SIGNAL_S} s earlier, and a start may take {_START_S} s. "
                "The job would be warned before it has done a step, requeue itself, and so for ever. Allow at least "
                f"{-(-(grace + _EARLY_SIGNAL_S + _START_S) // 60)} minutes, or lower slurm.grace_period_s.",
            )


def time_limit_s(text: str) -> int | None:
    """A time as sbatch's --time reads it (`90` minutes, `1:30:00`, `2-12`), in seconds; None: no limit."""
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # with days the clock begins with hours; without, a lone number or the first of two is minutes
    hours, minutes, seconds = (*parts, 0, 0)[:3] if dash or len(parts) == 3 else (0, *parts, 0)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds or None
