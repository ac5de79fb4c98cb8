"""How far a run is: from its manifests and metrics.jsonl, and from Slurm where it was submitted. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .config import RunConfig
from .config_loading import load_config
from .errors import CheckpointError, ConfigError
from .go_on import commands_to_finish, commands_to_renew, shown
from .manifest import read_manifest
from .run_folder import SHARED_STAGES, STAGES, VARIANT_STAGES, RunFolder
from .slurm.job_status import JobView, view_jobs
from .slurm.measured_cost import measured_trained_layer_cost
from .stage_progress import last_sign, read_progress
from .stale_inputs import Place, outdated_stages

State = Literal["not started", "unfinished", "done", "skipped", "queued", "running", "failed", "cancelled"]
"""The first four are the manifest's word; the others are Slurm's about a stage that is not done."""


@dataclass(frozen=True)
class StageStatus:
    """One stage of the main conversion or of a variant, or a part of it: a subset of layers, a shard of test rows."""

    stage: str
    variant: str | None
    layers: str | None
    state: State
    detail: str = ""
    """Why it was skipped, or when an unfinished one last wrote."""
    step: int | None = None
    """Optimizer steps; test rows of all variants where it is evaluate."""
    total_steps: int | None = None
    loss_name: str | None = None
    """`loss_nats`, the newest step's; of a finished stage `validation_kl_nats` (distill), `validation_loss_nats`
    (finetune), `reference_loss_nats` or, of rows to classify, `test_loss_nats` (evaluate, of the main conversion). Of
    rows to score they end in `_mse`."""
    loss: float | None = None
    minutes: float | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    """Name to path."""
    shard: str | None = None
    """`0/4`, a part of evaluate's test rows."""
    eta_s: float | None = None
    """Seconds that the remaining steps will take."""
    job: str | None = None
    """Slurm's id of the newest job: `12`, or `12_3` in an array."""
    job_state: str | None = None
    """Slurm's word for it."""
    error: str | None = None
    """Last line of the job's log that says what went wrong; without a job, what the newest attempt failed with."""
    log: str | None = None
    command: tuple[str, ...] = ()
    """What its newest attempt was begun with."""
    directory: str = ""
    """Where that was."""
    outdated: bool = False
    """Whether it was made from what is not there any more: an input ran anew since, or is outdated itself."""

    @property
    def title(self) -> str:
        """`t2r/finetune` for a variant's stage, `distill/0-15` for a subset, `evaluate 0/4` for a shard."""
        title = "/".join(part for part in (self.variant, self.stage, self.layers) if part)
        return f"{title} {self.shard}" if self.shard else title


@dataclass(frozen=True)
class RunStatus:
    """All stages of a run in order, and the commands that finish it."""

    folder: str
    stages: tuple[StageStatus, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Why Slurm's states are missing."""
    queue_unknown: bool = False
    """Whether squeue did not answer: a job may wait or run that is not seen here."""
    trained_layer_cost: float | None = None
    """What the elements of distill's array say about the config's key of this name."""

    @property
    def finished(self) -> bool:
        """Whether every whole stage is done, of what there is now."""
        whole = [stage for stage in self.stages if not stage.layers and not stage.shard]
        return all(stage.state in ("done", "skipped") and not stage.outdated for stage in whole)

    @property
    def live(self) -> bool:
        """Whether Slurm still has jobs of this run."""
        return any(stage.state in ("queued", "running") for stage in self.stages)


def read_status(run: str) -> RunStatus:
    """The status of a run.

    Args:
        run: a run folder, its name under `runs/`, or a YAML that names it.

    Raises:
        ConfigError: no such run.
        CheckpointError: a manifest cannot be read.
    """
    folder = RunFolder(find_run_folder(run))
    config = resolved_config(folder)
    jobs, notes, records = view_jobs(folder)
    stages, reasons, input_unfinished = _with_outdated(folder, config, tuple(_stages(folder, config, jobs)))
    measured = None if config is None else measured_trained_layer_cost(folder, config)
    in_doubt = [
        f"Slurm gave no answer about the job of {intent.name}, and shows none now; `hedgehog submit` finds out"
        for intent in records.intents
    ]
    if not jobs and not in_doubt:
        renewing = commands_to_renew(folder, config, [stage for stage in stages if stage.outdated])
        both = [list(renewing), list(commands_to_finish(folder, config, stages))]
        first, then = reversed(both) if input_unfinished else both
        commands = tuple(shown(command) for command in (*first, *then))
        return RunStatus(str(folder.root), stages, commands, reasons, trained_layer_cost=measured)
    unknown = any(note.startswith("squeue") for note in notes)
    stages = _with_jobs(stages, jobs, answered=not unknown)
    status = RunStatus(str(folder.root), stages, (), (*reasons, *notes, *in_doubt), unknown, measured)
    waits_for_a_failure = any(stage.state in ("failed", "cancelled") for stage in stages)
    if not status.finished and (waits_for_a_failure or not status.live):
        status = replace(status, commands=(shown(records.command),))
    return status


def stages_on_disk(folder: RunFolder, config: RunConfig | None) -> tuple[StageStatus, ...]:
    """All stages in order, by their files alone: Slurm is not asked.

    Raises:
        CheckpointError: a manifest cannot be read.
    """
    return tuple(_stages(folder, config, []))


def find_run_folder(run: str) -> Path:
    """The run folder that a user means.

    Raises:
        ConfigError: there is none; the message lists the runs that there are.
    """
    path = Path(run)
    try:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            config = load_config(path)
            path = Path(config.output_dir) / config.name
        for candidate in (path, Path("runs") / run):
            if RunFolder(candidate).config_file.is_file() or any((candidate / stage).is_dir() for stage in STAGES):
                return candidate
    except (OSError, ValueError) as error:  # no permission, or a text that can be no path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{str(path)[:200]}: cannot be looked into ({reason}); give a run folder or its name"
        ) from None
    runs = sorted(file.parent.name for file in Path("runs").glob("*/config.resolved.yaml"))
    known = f" Runs here: {', '.join(runs)}." if runs else ""
    raise ConfigError(f"{path}: no run folder (it has neither config.resolved.yaml nor a stage's folder).{known}")


def resolved_config(folder: RunFolder) -> RunConfig | None:
    """The config of the newest command on the run, or None where there was none yet.

    Raises:
        CheckpointError: the file is none of this version.
    """
    if not folder.config_file.is_file():
        return None
    try:
        return load_config(folder.config_file)
    except ConfigError as error:
        raise CheckpointError(f"{error}\nThe file belongs to another version, or was edited; correct it.") from error


def _with_outdated(
    folder: RunFolder, config: RunConfig | None, stages: tuple[StageStatus, ...]
) -> tuple[tuple[StageStatus, ...], tuple[str, ...], bool]:
    """The stages, those marked that were made from what is not there any more; why they were; and whether that is
    still being made anew.

    Raises:
        CheckpointError: a manifest cannot be read.
    """
    whole = {Place(stage.stage, stage.variant, stage.layers): stage for stage in stages if stage.shard is None}
    read = {place: read_manifest(folder.stage(*place)) for place, s in whole.items() if s.state != "not started"}
    manifests = {place: manifest for place, manifest in read.items() if manifest is not None}
    known = None if config is None else (None, *config.variants)
    wanted = [place for place in manifests if known is None or place.variant in known]
    outdated = outdated_stages(sorted(wanted, key=lambda place: STAGES.index(place.stage)), manifests)
    reasons = tuple(
        f"{place.title} is out of date: {' and '.join(source.title for source in why.anew)} ran anew since"
        for place, why in outdated.items()
        if not why.follows
    )
    marked = tuple(
        replace(stage, outdated=True, detail="out of date")
        if stage.shard is None and Place(stage.stage, stage.variant, stage.layers) in outdated
        else stage
        for stage in stages
    )
    unfinished = any(manifests[source].status != "done" for why in outdated.values() for source in why.anew)
    return marked, reasons, unfinished


def _with_jobs(stages: tuple[StageStatus, ...], jobs: list[JobView], *, answered: bool) -> tuple[StageStatus, ...]:
    """The stages with what Slurm says of their newest jobs; where a manifest says done, that is the last word."""
    newest = {(job.stage, job.variant, job.part): job for job in jobs}
    found = []
    for stage in stages:
        job = newest.get((stage.stage, stage.variant, stage.layers or stage.shard))
        if job is None:
            found.append(stage)
            continue
        stage = replace(stage, job=job.job_id, job_state=job.state or None, log=job.log)
        if stage.state in ("not started", "unfinished"):
            word = " ".join(part for part in (job.state, f"({job.reason})" if job.reason else "") if part)
            if job.activity in ("queued", "running", "failed", "cancelled"):
                if job.activity == "cancelled" and job.failed_parents:
                    word = f"needs {', '.join(job.failed_parents)}, which failed"
                detail = stage.detail if job.activity == "running" else word
                stage = replace(stage, state=job.activity, detail=detail)
            elif job.activity == "unknown":
                said = "is not in the queue" if answered else "may wait or run: Slurm does not answer"
                stage = replace(stage, detail=f"{stage.detail or 'nothing written'}; job {job.job_id} {said}")
            stage = replace(stage, error=job.error, eta_s=stage.eta_s if job.activity == "running" else None)
        found.append(stage)
    return tuple(found)


def _stages(folder: RunFolder, config: RunConfig | None, jobs: list[JobView]) -> Iterator[StageStatus]:
    variants: list[str] = list(config.variants) if config is not None else []
    on_disk = sorted(path.name for path in (folder.root / "variants").glob("*") if path.is_dir())
    variants += [name for name in on_disk if name not in variants]
    for is_each, group in itertools.groupby(STAGES, key=VARIANT_STAGES.__contains__):
        stages = tuple(group)
        for variant in (None, *variants):
            for stage in stages:
                wanted = variant is None or is_each
                if wanted or (stage not in SHARED_STAGES and folder.stage(stage, variant).is_dir()):
                    yield from _parts(folder, config, stage, variant, jobs)
                    yield _stage(folder, config, stage, variant)


def _parts(
    folder: RunFolder, config: RunConfig | None, stage: str, variant: str | None, jobs: list[JobView]
) -> Iterator[StageStatus]:
    """Subsets of distill's layers and shards of evaluate's rows: those begun, and those submitted."""
    submitted = [job.part for job in jobs if job.part and (job.stage, job.variant) == (stage, variant)]
    if stage == "distill":
        begun = [subset.name.removeprefix("layers-") for subset in folder.subsets(variant)]
        for layers in sorted({*begun, *submitted}, key=_first_number):
            yield _stage(folder, config, stage, variant, layers)
    elif stage == "evaluate":
        begun = [shard.name.removeprefix("shard-").replace("-of-", "/") for shard in folder.shards()]
        for shard in sorted({*begun, *submitted}, key=_first_number):
            yield _stage(folder, config, stage, None, shard=shard)


def _first_number(part: str) -> tuple[int, str]:
    """Orders `8-15` after `0-7`."""
    digits = re.match(r"\d+", part)
    return (int(digits[0]) if digits else 0, part)


def _stage(
    folder: RunFolder,
    config: RunConfig | None,
    stage: str,
    variant: str | None,
    layers: str | None = None,
    shard: str | None = None,
) -> StageStatus:
    path = folder.stage(stage, variant, layers) if shard is None else folder.shard(shard)
    manifest = read_manifest(path)
    if manifest is None:
        return StageStatus(stage, variant, layers, "not started", shard=shard)
    progress = read_progress(folder, config, manifest, path, shard)
    if manifest.status == "done":
        state, detail = ("skipped", manifest.skipped) if manifest.skipped else ("done", "")
        seconds = manifest.duration_s
    else:
        state, detail = "unfinished", last_sign(path)
        seconds = max(manifest.duration_s, progress.recorded_s)
    return StageStatus(
        stage=stage,
        variant=variant,
        layers=layers,
        state=state,  # type: ignore[arg-type]
        detail=detail,
        step=progress.step,
        total_steps=progress.total,
        loss_name=progress.loss_name,
        loss=progress.loss,
        minutes=round(seconds / 60, 2),
        artifacts={name: str(path / artifact.path) for name, artifact in manifest.artifacts.items()},
        shard=shard,
        eta_s=progress.remaining_s,
        error=manifest.error if state == "unfinished" else None,
        command=tuple(manifest.command),
        directory=manifest.directory,
    )
