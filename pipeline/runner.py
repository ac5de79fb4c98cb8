"""Runs stages: skips what is done, refuses what changed, resumes what was killed, writes the manifest last.

One process (or group of ranks) at a time works in a stage's folder (lease.py). A signal makes it stop where nothing is
lost (interrupts.py); if it was the job script's own, the Slurm job is queued again (requeue.py).

A stage module (`hedgehog.stages.<stage>`) declares CONSUMES, SECTIONS and IGNORED, and has `run(ctx)`; it may have
`external_inputs(config)`, fingerprints by name of files that come from outside the run, and
`still_to_do(config, run_folder, manifest)`, why a finished stage runs once more. Everything that is the same for all
stages is here; what decides whether one runs is in attempt.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from .attempt import Attempt, begin_anew, describe, holds_work, layers_folder, refusal, stage_module
from .config import RunConfig
from .config_loading import apply_variant, dump_resolved
from .distributed import World, discover_world
from .errors import CheckpointError, ConfigError, HedgehogError, Interrupted, LeaseError
from .go_on import shown
from .interrupts import listening, stopping_together
from .lease import leased
from .manifest import Manifest, describe_artifact, read_manifest
from .metrics import Reporter, format_bytes, format_duration, peak_memory_bytes, reset_peak_memory
from .out_of_memory import out_of_memory_explained
from .quiet_libraries import quiet_libraries
from .requeue import requeue, requeue_if_preempted, slurm_job
from .run_folder import (
    SHARED_STAGES,
    STAGES,
    VARIANT_STAGES,
    RunFolder,
    atomic_write,
    check_shard,
    storage_errors,
    write_fault,
)
from .stage_context import StageContext, StageResult

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
    is_labelled = config.data.is_labelled
    text = "Ann: Lunch at one? Bob: Gladly." if config.data.kind == "dialogues" else "Once upon a time"
    generate = ("hedgehog", "generate", str(root.root), "--text", text)
    auto_class = "AutoModelForSequenceClassification" if is_labelled else "AutoModelForCausalLM"
    remote_code = "" if config.model.attention == "softmax" else ", trust_remote_code=True"
    reporter = Reporter("run", None, is_main=int(os.environ.get("RANK", 0)) == 0)
    reporter.info("finished.")
    reporter.info(f"scores   {root.stage('evaluate') / 'results.md'}")
    reporter.info(f"model    {exported}")
    reporter.info(f'load it  {auto_class}.from_pretrained("{exported}"{remote_code})')
    if not is_labelled:
        reporter.info(f"try it   {shown(generate)}")
    reporter.info(f"show it  {shown(('hedgehog', 'report', str(root.root)))}")


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
    if effective.distill.layers != config.distill.layers is not None:
        raise ConfigError(
            f"distill.layers: {config.distill.layers} is asked for, but variants.{variant}.overrides.distill.layers is "
            f"{effective.distill.layers}; remove that."
        )
    layers = layers_folder(effective, stage)
    return _run_stage(
        config,
        effective,
        stage,
        variant,
        layers,
        lambda: stage_module(stage).run,
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
    load = lambda: stage_module("distill").merge  # noqa: E731
    return _run_stage(config, effective, "distill", variant, None, load, force, command=command)


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
        attempt = describe(config, effective, stage, variant, layers, shard, world, force, title, command)
        try:
            return _skip_or_run(attempt, function)
        except Interrupted as stop:
            raise _leave(stop, attempt) from None


def _skip_or_run(attempt: Attempt, function: Callable[[StageContext], StageResult]) -> Manifest:
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


def _earlier_attempt(attempt: Attempt) -> tuple[Manifest | None, str | None]:
    """The manifest that an attempt of this same stage left, and why it is to be taken up though it is done. Collective.

    Raises:
        CheckpointError: it had another config or input, left work behind, and `force` is off.
    """
    world, folder = attempt.world, attempt.folder
    previous: Manifest | None = world.broadcast(read_manifest(folder) if world.is_main else None)
    if previous is not None and previous.fingerprint != attempt.fingerprint:
        if not attempt.force and world.broadcast(holds_work(folder)):
            raise CheckpointError(refusal(attempt.title, folder, previous, attempt.sections, attempt.consumed))
        previous = None
    to_do = None
    if attempt.unfinished is not None and previous is not None:
        to_do = attempt.unfinished(attempt.config, attempt.run_folder, previous)
    return previous, world.broadcast(to_do)


def _is_done(attempt: Attempt, previous: Manifest | None, to_do: str | None) -> bool:
    return previous is not None and previous.status == "done" and not attempt.force and to_do is None


def _say_done(attempt: Attempt, previous: Manifest | None) -> Manifest:
    assert previous is not None
    finished = (previous.finished_at or "")[:16].replace("T", " ")
    attempt.quiet.info(f"done already ({finished} UTC); nothing to do. --force runs it again.")
    return previous


def _run_held(attempt: Attempt, previous: Manifest | None, function: Callable[[StageContext], StageResult]) -> Manifest:
    """Run a stage whose folder this attempt holds, and write its manifest."""
    folder, world, config = attempt.folder, attempt.world, attempt.config
    if attempt.force and not (previous is not None and previous.forced and previous.status == "running"):
        previous = None
        if world.is_main:
            begin_anew(folder, attempt.quiet)
    if world.is_main:
        config_file, resolved = attempt.run_folder.config_file, dump_resolved(attempt.given)
        if not config_file.is_file() or config_file.read_text(encoding="utf-8") != resolved:
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


def _leave(stop: Interrupted, attempt: Attempt) -> Interrupted:
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
