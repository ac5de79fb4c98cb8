"""What a run's folder holds of what a report shows. Only looks; what is not there, or torn, is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base_folder import known_shape
from ..config import RunConfig
from ..errors import ConfigError, ModelError, ResourceError
from ..families import FAMILIES
from ..go_on import commands_to_finish, shown
from ..llama.shape import LlamaShape
from ..manifest import Manifest, read_manifest
from ..row_log import read_complete_rows
from ..run_folder import MAIN, RunFolder
from ..slurm.job_records import read_records
from ..stage_progress import JUST_NOW, read_metrics
from ..status import StageStatus, find_run_folder, resolved_config, stages_on_disk
from .scale import is_drawable


@dataclass(frozen=True)
class StageFiles:
    """A stage that has begun, or a part of one: a subset of layers, a shard of test rows."""

    status: StageStatus
    place: Path
    manifest: Manifest

    @property
    def variant(self) -> str:
        """`main`, or the variant's name."""
        return self.status.variant or MAIN

    @property
    def is_part(self) -> bool:
        """Whether it is a subset of layers or a shard of rows."""
        return self.status.layers is not None or self.status.shard is not None

    @property
    def may_run(self) -> bool:
        """Whether a process may be working on it right now: it wrote just now, and has not said since that it stopped.

        A process that was killed says nothing, so that this is no more than possible.
        """
        stopped = self.manifest.interrupted or self.manifest.error
        return self.status.state == "unfinished" and self.status.detail == JUST_NOW and not stopped

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of its metrics.jsonl."""
        return read_metrics(self.place / "metrics.jsonl")


@dataclass(frozen=True)
class RunFiles:
    """A run of which at least one stage has begun."""

    folder: RunFolder
    config: RunConfig | None
    """None where the folder has no config.resolved.yaml."""
    statuses: tuple[StageStatus, ...]
    """All stages in order, also those that have not begun."""
    begun: tuple[StageFiles, ...]
    commands: tuple[str, ...]
    """What finishes the run, where Slurm has no jobs of it."""
    submitted: tuple[str, ...] | None
    """The newest `hedgehog submit …` of a run that is not finished, or None where it was never submitted or is done.
    Whether its jobs wait, run or failed is not known here: Slurm is not asked."""
    labels: dict[str, str]
    """Name to label, `main` first; the place in it is a variant's colour in every chart."""

    @property
    def name(self) -> str:
        """The folder's, by which commands know it; the config's is another where the folder was renamed."""
        return self.folder.root.resolve().name

    def style(self, name: str) -> int:
        """Place in the palette of `main` or a variant."""
        return list(self.labels).index(name)

    def of_stage(self, stage: str) -> Iterator[StageFiles]:
        """A stage of `main` and every variant, and its parts, as far as they have begun."""
        return (files for files in self.begun if files.status.stage == stage)

    def whole(self, stage: str, name: str = MAIN) -> StageFiles | None:
        """A stage itself, not its parts, or None where it has not begun."""
        return next((files for files in self.of_stage(stage) if files.variant == name and not files.is_part), None)

    @property
    def kind(self) -> str | None:
        """The `data.kind`: what the run does with its rows; None where nothing says it."""
        if self.config is not None:
            return self.config.data.kind
        prepare = self.whole("prepare")
        return None if prepare is None else prepare.manifest.summary.get("kind")

    @property
    def converted_to(self) -> str:
        """What the conversion makes, as the config or prepare says; of a base that nobody has looked at: `Hedgehog`."""
        if self.config is not None and self.config.tiny is not None:
            return FAMILIES[self.config.tiny.architecture].hedgehog_title
        prepare = self.whole("prepare")
        if prepare is not None and prepare.manifest.status == "done":
            # before it was noted, there were Llamas only
            noted = prepare.manifest.summary.get("model_type", LlamaShape.model_type)
            return FAMILIES[noted].hedgehog_title if noted in FAMILIES else "Hedgehog"
        shape = None
        with suppress(ModelError):
            shape = known_shape(self.config) if self.config is not None and self.config.model.base else None
        return "Hedgehog" if shape is None else shape.hedgehog_title

    def what_makes(self, missing: str) -> str:
        """The sentence that names the command by which something comes about; empty where the run is finished."""
        if self.submitted is not None or any(files.may_run for files in self.begun):
            return " The top of the page says how the run goes on."
        if not self.commands:
            return ""
        if len(self.commands) == 1:
            return f" `{self.commands[0]}` makes {missing}."
        return f" The commands at the top of the page make {missing}."


def read_run(run: str) -> RunFiles:
    """Look at a run.

    Args:
        run: a run folder, its name under `runs/`, or a YAML that names it.

    Raises:
        ConfigError: no such run, or no stage of it has begun.
        CheckpointError: a manifest, the resolved config or the list of jobs cannot be read.
        ResourceError: the operating system refuses to have one read.
    """
    try:
        return _read_run(run)
    except OSError as error:
        raise ResourceError(f"{error.filename or run}: cannot be read ({error.strerror}).") from error


def _read_run(run: str) -> RunFiles:
    folder = RunFolder(find_run_folder(run))
    config = resolved_config(folder)
    statuses = stages_on_disk(folder, config)
    commands = tuple(shown(command) for command in commands_to_finish(folder, config, statuses))
    begun = []
    for status in statuses:
        place = _place(folder, status)
        manifest = read_manifest(place)
        if manifest is not None:
            begun.append(StageFiles(status, place, manifest))
    submitted = _submitted(folder, statuses)
    if not begun:
        cure = f" `{commands[0]}` begins it." if commands else ""
        if submitted is not None:
            cure = f" It was submitted to Slurm: `{status_command(folder)}` says what its jobs do."
        raise ConfigError(f"{folder.root}: nothing to report yet, no stage of this run has begun.{cure}")
    return RunFiles(folder, config, statuses, tuple(begun), commands, submitted, _labels(config, statuses))


def status_command(folder: RunFolder) -> str:
    """What says how far the run is, and what its jobs do."""
    return shown(("hedgehog", "status", str(folder.root)))


def _submitted(folder: RunFolder, statuses: tuple[StageStatus, ...]) -> tuple[str, ...] | None:
    records = read_records(folder)
    whole = (status for status in statuses if status.layers is None and status.shard is None)
    if not records.jobs or all(status.state in ("done", "skipped") for status in whole):
        return None
    return tuple(records.command)


def read_predictions(evaluate: Path, name: str) -> dict[int, dict[str, Any]] | str:
    """Summaries, or predicted labels or scores, of `main` or a variant, by the test row's index, or why they cannot be
    read."""
    file = evaluate / "predictions" / f"{name}.jsonl"
    try:
        rows = read_complete_rows(file)
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return {
        row["index"]: row
        for row in rows
        if isinstance(row["index"], int) and (isinstance(row.get("prediction"), str) or is_drawable(row["prediction"]))
    }


def read_examples(prepare: StageFiles | None) -> list[Mapping[str, Any]] | str:
    """The test split's rows (`id`, `dialogue` or `text`, …) in order, or why there are none; a torn line is an empty
    row."""
    entry = None if prepare is None else prepare.manifest.artifacts.get("examples_test")
    if prepare is None or entry is None:
        return "prepare has not written it"
    try:
        lines = (prepare.place / entry.path).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no {entry.path} in prepare's folder"
    except OSError as error:
        return f"{entry.path} cannot be read ({error.strerror})"
    return [_object(line) for line in lines]


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _place(folder: RunFolder, status: StageStatus) -> Path:
    if status.shard is not None:
        return folder.shard(status.shard)
    return folder.stage(status.stage, status.variant, status.layers)


def _labels(config: RunConfig | None, statuses: tuple[StageStatus, ...]) -> dict[str, str]:
    """Of all conversions: those of the config, then those that only lie on the disk."""
    labels = {MAIN: MAIN if config is None else config.label or MAIN}
    for status in statuses:
        if status.variant is not None and status.variant not in labels:
            variant = None if config is None else config.variants.get(status.variant)
            labels[status.variant] = status.variant if variant is None else variant.label or status.variant
    return labels
