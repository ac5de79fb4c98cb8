"""Runs stages: skips what is done, refuses what changed, resumes what was killed, writes the manifest last.

One process (or group of ranks) at a time works in a stage's folder (lease.py). A signal makes it stop where nothing is
lost (interrupts.py); if it was the job script's own, the Slurm job is queued again (requeue.py).

A stage module (`hedgehog.stages.<stage>`) declares CONSUMES, SECTIONS and IGNORED, and has `run(ctx)`; it may have
`external_inputs(config)`, fingerprints by name of files that come from outside the run, and
`still_to_do(config, run_folder, manifest)`, why a finished stage runs once more. Everything that is the same for all
stages is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .config import RunConfig
from .config_loading import apply_variant, config_differences, dump_resolved, flatten
from .distributed import World, discover_world
from .errors import CheckpointError, ConfigError, HedgehogError, Interrupted, LeaseError
from .interrupts import listening, stopping_together
from .lease import leased
from .manifest import Manifest, StageInput, describe_artifact, fingerprint, read_manifest
from .metrics import Reporter, format_bytes, format_duration, peak_memory_bytes, reset_peak_memory
from .out_of_memory import out_of_memory_explained
from .quiet_libraries import quiet_libraries
from .requeue import requeue, requeue_if_preempted, slurm_job
from .run_folder import (
    HIDDEN_STATES,
    LEASE,
    PREVIOUS_SUFFIX,
    SHARED_STAGES,
    STAGES,
    VARIANT_STAGES,
    RunFolder,
    atomic_write,
    check_shard,
    clear_unfinished,
    set_aside,
    storage_errors,
    write_fault,
)

if TYPE_CHECKING:
    from collections.abc import Callable

STAGE_MODULES = {stage: f"hedgehog.stages.{stage}" for stage in STAGES}
_MAP_KEYS = frozenset(
    {
        "model.feature_map",
        "model.feature_dim",
        "model.feature_map_options",
        "model.attention_eps",
        "model.chunk_size",
        "distill",
        "finetune.feature_map_learning_rate",
        "finetune.train_feature_maps",
    }
)
"""Without effect on a softmax baseline, which need not be made again where they change."""
_VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "datasets",
    "bitsandbytes",
    "safetensors",
    "hedgehog-llama",
)


@dataclass(frozen=True)
class StageResult:
    """What a stage hands back: its artifacts by name, facts for the manifest, or why there was nothing to do."""

    artifacts: Mapping[str, str | Path] = field(default_factory=dict)
    """Name to path inside the stage's folder; a file or a folder."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """JSON facts: `status` and the next stages read them."""
    skipped: str | None = None
    """Reason for having done nothing."""


@dataclass(frozen=True)
class VariantInputs:
    """A conversion that `evaluate` scores: its config and the finished stages that made it."""

    name: str
    label: str
    config: RunConfig
    inputs: dict[str, StageInput]


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may know."""

    config: RunConfig
    """The variant's overrides are applied already."""
    stage: str
    variant: str | None
    run_folder: RunFolder
    folder: Path
    """The stage's own folder; it exists, and this attempt holds its lease."""
    world: World
    fingerprint: str
    """SHA-256 over config sections and consumed artifacts; checkpoints carry it."""
    inputs: dict[str, StageInput]
    variants: dict[str, VariantInputs]
    """`main` and every variant; filled for `evaluate` only."""
    reporter: Reporter
    shard: str | None = None
    """Part of the test rows that `evaluate` is to do, such as `0/4`. None: all."""

    def rng(self, name: str) -> torch.Generator:
        """A CPU generator seeded from the run's seed and a name, so that no two uses share a stream."""
        digest = hashlib.sha256(f"{self.config.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def run_pipeline(
    config: RunConfig,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
    command: tuple[str, ...] = (),
) -> None:
    """Run the stages from `first` to `last` in order; stages of every variant in a row, one variant after the other.

    Raises:
        ConfigError: an unknown stage, or `first` after `last`.
        HedgehogError: what a stage raises.
    """
    names: list[str] = list(STAGES)
    for stage in (first, last):
        if stage is not None and stage not in names:
            raise ConfigError(f"unknown stage '{stage}'; the stages are {', '.join(names)}.")
    start, end = names.index(first or names[0]), names.index(last or names[-1])
    if start > end:
        raise ConfigError(f"--from {first} comes after --to {last}; the order is {', '.join(names)}.")
    selected = names[start : end + 1]
    with listening():  # also to what comes between two stages
        for is_each, group in itertools.groupby(selected, key=VARIANT_STAGES.__contains__):
            stages = tuple(group)
            for variant in (None, *config.variants) if is_each else (None,):
                for stage in stages:
                    run_stage(config, stage, variant=variant, force=force, alone=False, command=command)
    if "export" in selected:
        _say_where_things_are(config)


def _say_where_things_are(config: RunConfig) -> None:
    """The last lines of a whole run: what there is now, and what to do with it."""
    root = RunFolder.of(config)
    exported = (root.stage("export") / "model").resolve()
    remote_code = "" if config.model.attention == "softmax" else ", trust_remote_code=True"
    reporter = Reporter("run", None, is_main=int(os.environ.get("RANK", 0)) == 0)
    reporter.info("finished.")
    reporter.info(f"scores   {root.stage('evaluate') / 'results.md'}")
    reporter.info(f"model    {exported}")
    reporter.info(f'use it   AutoModelForCausalLM.from_pretrained("{exported}"{remote_code})')


def run_stage(
    config: RunConfig,
    stage: str,
    *,
    variant: str | None = None,
    shard: str | None = None,
    force: bool = False,
    alone: bool = True,
    command: tuple[str, ...] = (),
) -> Manifest:
    """Run or resume one stage.

    Args:
        config: the run's config, without a variant's overrides.
        variant: run the stage for this variant instead of the main conversion.
        shard: do only this part of evaluate's test rows, in a folder of its own.
        force: where the stage is done or its config or input changed, begin it anew. The earlier folder is kept as
            `<stage>.previous`, unless a finished one is there already and this one is not. A stage that `force` began
            and that was killed goes on.
        alone: whether this process runs no other stage.
        command: the command line, for the manifest: `status` tells it where the stage was stopped.

    Raises:
        ConfigError: unknown variant, a variant asked of a stage that has none, or no such shard.
        CheckpointError: an input is missing or changed, or the stage's own config changed and `force` is off.
        Interrupted: a signal came; what was done is saved.
        LeaseError: another process works in the stage's folder, or has taken it over.
        ResourceError: the disk is full, refuses, or memory ran out.
    """
    if variant is not None and stage in SHARED_STAGES:
        raise ConfigError(f"{stage} is done once for all variants; leave --variant away.")
    if shard is not None:
        check_shard(shard)
    effective = config if variant is None else apply_variant(config, variant)
    layers = _layers_folder(effective, stage)
    return _run_stage(
        config,
        effective,
        stage,
        variant,
        layers,
        lambda: _stage_module(stage).run,
        force,
        shard=shard,
        alone=alone,
        command=command,
    )


def merge_layers(
    config: RunConfig, *, variant: str | None = None, force: bool = False, command: tuple[str, ...] = ()
) -> Manifest:
    """Join the subsets that `distill --layers` trained into the distill stage's artifact."""
    effective = config if variant is None else apply_variant(config, variant)
    effective = effective.model_copy(update={"distill": effective.distill.model_copy(update={"layers": None})})
    load = lambda: _stage_module("distill").merge  # noqa: E731
    return _run_stage(config, effective, "distill", variant, None, load, force, command=command)


def _layers_folder(config: RunConfig, stage: str) -> str | None:
    return config.distill.layers.replace(" ", "") if stage == "distill" and config.distill.layers else None


def _stage_module(stage: str) -> ModuleType:
    return importlib.import_module(STAGE_MODULES[stage])


def _run_stage(
    config: RunConfig,
    effective: RunConfig,
    stage: str,
    variant: str | None,
    layers: str | None,
    load: Callable[[], Callable[[StageContext], StageResult]],
    force: bool,
    *,
    shard: str | None = None,
    alone: bool = True,
    command: tuple[str, ...] = (),
) -> Manifest:
    """Run what `load` returns; an interruption is complete, requeue included, when it leaves here."""
    title = "/".join(part for part in (variant, stage, layers or shard) if part)
    with listening(), storage_errors(title):
        function = load()
        # a process group keeps the timeout that it began with, also in stages where rank 0 works alone for long
        world = discover_world(effective.engine, trains=alone and stage in ("distill", "finetune"))
        attempt = _describe(config, effective, stage, variant, layers, shard, world, force, title, command)
        try:
            return _skip_or_run(attempt, function)
        except Interrupted as stop:
            raise _leave(stop, attempt) from None


@dataclass(frozen=True)
class _Attempt:
    """A stage, and everything that decides whether it runs."""

    title: str
    given: RunConfig
    config: RunConfig
    """With the variant's overrides."""
    stage: str
    variant: str | None
    run_folder: RunFolder
    folder: Path
    shard: str | None
    command: tuple[str, ...]
    world: World
    inputs: dict[str, StageInput]
    variants: dict[str, VariantInputs]
    sections: dict[str, Any]
    consumed: dict[str, str]
    fingerprint: str
    force: bool
    unfinished: Callable[..., str | None] | None
    quiet: Reporter
    """Speaks, and records nothing."""


def _describe(
    config: RunConfig,
    effective: RunConfig,
    stage: str,
    variant: str | None,
    layers: str | None,
    shard: str | None,
    world: World,
    force: bool,
    title: str,
    command: tuple[str, ...],
) -> _Attempt:
    module = _stage_module(stage)
    run_folder = RunFolder.of(effective)
    inputs = {name: _open_input(run_folder, name, variant) for name in module.CONSUMES}
    variants: dict[str, VariantInputs] = {}
    if stage == "evaluate":
        variants = _open_variants(config, run_folder, module.CONSUMES, inputs)
    sections = stage_sections(effective, module)
    consumed = {name: entry.manifest.output_fingerprint for name, entry in inputs.items()}
    for name, entry in variants.items():
        consumed |= {f"{name}/{key}": value.manifest.output_fingerprint for key, value in entry.inputs.items()}
    if hasattr(module, "external_inputs"):
        consumed |= module.external_inputs(effective)
    return _Attempt(
        title=title,
        given=config,
        config=effective,
        stage=stage,
        variant=variant,
        run_folder=run_folder,
        folder=run_folder.stage(stage, variant, layers) if shard is None else run_folder.shard(shard),
        shard=shard,
        command=command,
        world=world,
        inputs=inputs,
        variants=variants,
        sections=sections,
        consumed=consumed,
        fingerprint=fingerprint({"stage": stage, "config": sections, "consumed": consumed}),
        force=force,
        unfinished=getattr(module, "still_to_do", None),
        quiet=Reporter(title, None, is_main=world.is_main),
    )


def _skip_or_run(attempt: _Attempt, function: Callable[[StageContext], StageResult]) -> Manifest:
    previous, to_do = _earlier_attempt(attempt)
    if _is_done(attempt, previous, to_do):
        return _say_done(attempt, previous)
    with leased(attempt.folder, attempt.world, attempt.quiet.info):
        # who held the folder until now may have finished the stage
        previous, to_do = _earlier_attempt(attempt)
        if _is_done(attempt, previous, to_do):
            return _say_done(attempt, previous)
        if previous is not None and to_do is not None:
            attempt.quiet.info(f"done already ({previous.finished_at}), but {to_do}")
        return _run_held(attempt, previous, function)


def _earlier_attempt(attempt: _Attempt) -> tuple[Manifest | None, str | None]:
    """The manifest that an attempt of this same stage left, and why it is to be taken up though it is done. Collective.

    Raises:
        CheckpointError: it had another config or input, left work behind, and `force` is off.
    """
    world, folder = attempt.world, attempt.folder
    previous: Manifest | None = world.broadcast(read_manifest(folder) if world.is_main else None)
    if previous is not None and previous.fingerprint != attempt.fingerprint:
        if not attempt.force and world.broadcast(_holds_work(folder)):
            raise CheckpointError(_refusal(attempt.title, folder, previous, attempt.sections, attempt.consumed))
        previous = None
    to_do = None
    if attempt.unfinished is not None and previous is not None:
        to_do = attempt.unfinished(attempt.config, attempt.run_folder, previous)
    return previous, world.broadcast(to_do)


def _is_done(attempt: _Attempt, previous: Manifest | None, to_do: str | None) -> bool:
    return previous is not None and previous.status == "done" and not attempt.force and to_do is None


def _say_done(attempt: _Attempt, previous: Manifest | None) -> Manifest:
    assert previous is not None
    finished = (previous.finished_at or "")[:16].replace("T", " ")
    attempt.quiet.info(f"done already ({finished} UTC); nothing to do. --force runs it again.")
    return previous


def _run_held(
    attempt: _Attempt, previous: Manifest | None, function: Callable[[StageContext], StageResult]
) -> Manifest:
    """Run a stage whose folder this attempt holds, and write its manifest."""
    folder, world, config = attempt.folder, attempt.world, attempt.config
    if attempt.force and not (previous is not None and previous.forced and previous.status == "running"):
        previous = None
        if world.is_main:
            _begin_anew(folder, attempt.quiet)
    if world.is_main:
        config_file, resolved = attempt.run_folder.config_file, dump_resolved(attempt.given)
        if not config_file.is_file() or config_file.read_text() != resolved:
            atomic_write(config_file, resolved, several_writers=True)
    previous = world.broadcast(previous)

    manifest = previous or Manifest(
        stage=attempt.stage,
        variant=attempt.variant,
        fingerprint=attempt.fingerprint,
        config=attempt.sections,
        forced=attempt.force,
    )
    manifest.consumed, manifest.versions, manifest.world_size = attempt.consumed, _versions(), world.world_size
    manifest.command, manifest.directory = list(attempt.command), str(Path.cwd())
    manifest.started_at = manifest.started_at or _now()
    manifest.interrupted = manifest.error = None
    if previous is not None:
        manifest.num_resumes += 1
        attempt.quiet.info(f"goes on in {folder}")
    if world.is_main:
        manifest.write(folder)
    world.barrier()

    reporter = Reporter(
        attempt.title,
        folder,
        is_main=world.is_main,
        log_every_steps=getattr(getattr(config, attempt.stage, None), "log_every_steps", 1),
        tensorboard=config.logging.tensorboard,
    )
    context = StageContext(
        config=config,
        stage=attempt.stage,
        variant=attempt.variant,
        run_folder=attempt.run_folder,
        folder=folder,
        world=world,
        fingerprint=attempt.fingerprint,
        inputs=attempt.inputs,
        variants=attempt.variants,
        reporter=reporter,
        shard=attempt.shard,
    )
    quiet_libraries()
    reset_peak_memory()
    started = time.monotonic()
    result = StageResult()
    try:
        with (
            _duration_kept(manifest, folder, world, started),
            stopping_together(world),
            out_of_memory_explained(attempt.title, attempt.stage, attempt.config, world),
            _lost_folder_said(),
        ):
            result = function(context)
    finally:
        reporter.close()
    peak = max(world.gather(peak_memory_bytes()))
    if world.is_main:
        manifest.artifacts = {name: describe_artifact(folder, path) for name, path in result.artifacts.items()}
        manifest.summary, manifest.skipped = dict(result.summary), result.skipped
        manifest.status, manifest.finished_at, manifest.peak_memory_bytes = (
            "done",
            _now(),
            max(manifest.peak_memory_bytes, peak),
        )
    with stopping_together(world):
        if world.is_main:
            manifest.write(folder)
    if result.skipped:
        reporter.info(f"skipped: {result.skipped}")
    else:
        reporter.info(
            f"done in {format_duration(manifest.duration_s)}, peak memory {format_bytes(peak)}; results in {folder}"
        )
    return world.broadcast(manifest)


def _leave(stop: Interrupted, attempt: _Attempt) -> Interrupted:
    """Queue the Slurm job again if the signal or a preemption asks for it; the error with which all leave. Collective.

    Everything is saved and the lease released by now: Slurm ends a job that it queues again at once. The other ranks
    wait until that is done, for `srun --kill-on-bad-exit` would take rank 0 along with the first that leaves.
    """
    what = f"stopped by {' and '.join(stop.signals)}: {stop}"
    message = f"{attempt.title} {what}"
    goes_on = False
    job = slurm_job()
    if attempt.world.is_main and job is not None and (stop.requeue or "SIGTERM" in stop.signals):
        attempt.quiet.info(what)
        goes_on, outcome = requeue(job) if stop.requeue else requeue_if_preempted(job)
        message += f"; {outcome}" if outcome else ""
    attempt.world.barrier()
    leaving = Interrupted(message, signals=stop.signals, requeue=stop.requeue)
    leaving.goes_on_by_itself = goes_on
    return leaving


def stage_sections(config: RunConfig, module: ModuleType) -> dict[str, Any]:
    """The part of the config that a stage's result depends on, flattened to dotted keys."""
    flat = flatten(config)
    wanted = tuple(module.SECTIONS)
    ignored = module.IGNORED | (_MAP_KEYS if config.model.attention == "softmax" else frozenset())
    return {
        key: value
        for key, value in flat.items()
        if not _under(key, ignored) and any(_under(key, (name,)) for name in wanted)
    }


def _under(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _open_input(run_folder: RunFolder, stage: str, variant: str | None) -> StageInput:
    folder = run_folder.stage(stage, variant)
    manifest = read_manifest(folder)
    if manifest is None or manifest.status != "done":
        state = "has not run" if manifest is None else "is not finished"
        option = f" --variant {variant}" if variant and stage in VARIANT_STAGES else ""
        raise CheckpointError(
            f"stage {stage} {state} (no finished manifest in {folder}): run `hedgehog {stage} CONFIG{option}` first."
        )
    return StageInput(folder, manifest)


def _open_variants(
    config: RunConfig, run_folder: RunFolder, consumes: tuple[str, ...], main_inputs: dict[str, StageInput]
) -> dict[str, VariantInputs]:
    opened = {"main": VariantInputs("main", config.label or "main", config, main_inputs)}
    for name, variant in config.variants.items():
        inputs = {stage: _open_input(run_folder, stage, name) for stage in consumes}
        opened[name] = VariantInputs(name, variant.label or name, apply_variant(config, name), inputs)
    return opened


def _refusal(title: str, folder: Path, previous: Manifest, sections: dict[str, Any], consumed: dict[str, str]) -> str:
    lines = config_differences(previous.config, sections)
    for name in sorted(consumed.keys() | previous.consumed.keys()):
        if consumed.get(name) != previous.consumed.get(name):
            lines.append(
                f"input from {name}: its artifacts changed" if "." not in name else f"{name}: the file changed"
            )
    changes = "\n".join(f"  {line}" for line in lines)
    state = "finished" if previous.status == "done" else "begun"
    return (
        f"{title} was {state} in {folder} with another config or input:\n{changes}\n"
        f"Undo the change, choose another name=…, or begin the stage anew with --force "
        f"(the folder is kept as {folder.name}.previous)."
    )


def _holds_work(folder: Path) -> bool:
    """Whether a stage's folder holds more than the note that it was begun: a mistyped path leaves nothing to lose."""
    # drift.json alone says why an export was refused: the cure it names changes the config
    nothing_lost = ("manifest.json", "metrics.jsonl", "drift.json", LEASE, HIDDEN_STATES)
    return any(path.name not in nothing_lost for path in folder.iterdir())


def _begin_anew(folder: Path, reporter: Reporter) -> None:
    """Set the folder aside; but a finished `.previous` is worth more than what an unfinished attempt left."""
    if not folder.exists():
        return
    current, kept = read_manifest(folder), folder.with_name(folder.name + PREVIOUS_SUFFIX)
    finished = read_manifest(kept) if kept.is_dir() else None
    if finished is not None and finished.status == "done" and (current is None or current.status != "done"):
        clear_unfinished(folder)
        reporter.info(f"--force: begins anew; the finished folder of before is still kept as {kept}")
    elif current is not None:
        reporter.info(f"--force: the earlier folder is kept as {set_aside(folder)}")


@contextlib.contextmanager
def _duration_kept(manifest: Manifest, folder: Path, world: World, started: float) -> Iterator[None]:
    """Add this attempt's working time to the manifest, also when the attempt ends with an exception; and say why."""
    try:
        yield
    except BaseException as error:
        manifest.duration_s += time.monotonic() - started
        if isinstance(error, Interrupted):
            manifest.interrupted = f"{_now()}: {' and '.join(error.signals)}, {error}"
        elif isinstance(error, HedgehogError):
            manifest.error = str(error)
        elif isinstance(error, Exception):
            manifest.error = f"{type(error).__name__}: {error}"
        if world.is_main:
            with contextlib.suppress(OSError, LeaseError):
                manifest.write(folder)
        raise
    manifest.duration_s += time.monotonic() - started


@contextlib.contextmanager
def _lost_folder_said() -> Iterator[None]:
    """Who takes a folder over clears away what was being written there; the older attempt may stumble over that."""
    try:
        yield
    except Exception as error:
        fault = write_fault()
        if fault is None or isinstance(error, LeaseError):
            raise
        raise fault from error


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
