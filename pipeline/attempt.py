"""An attempt at a stage: what decides whether it runs, what of an earlier attempt it may go on from or must leave.

A stage's fingerprint is over the keys of the config that its result depends on (the module's SECTIONS less IGNORED)
and over what it consumes: artifacts of earlier stages, and files from outside the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import RunConfig
from .config_loading import apply_variant, canonical, config_differences, flatten
from .distributed import World
from .errors import CheckpointError
from .manifest import Manifest, StageInput, fingerprint, read_manifest
from .metrics import Reporter
from .run_folder import (
    HIDDEN_STATES,
    LEASE,
    MAIN,
    PREVIOUS_SUFFIX,
    STAGES,
    VARIANT_STAGES,
    RunFolder,
    clear_unfinished,
    set_aside,
)
from .stage_context import VariantInputs

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


@dataclass(frozen=True)
class Attempt:
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


def describe(
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
) -> Attempt:
    module = stage_module(stage)
    run_folder = RunFolder.of(effective)
    inputs = {name: open_input(run_folder, name, variant) for name in module.CONSUMES}
    variants: dict[str, VariantInputs] = {}
    if stage == "evaluate":
        variants = _open_variants(config, run_folder, module.CONSUMES, inputs)
    quiet = Reporter(title, None, is_main=world.is_main)
    opened = {name: entry.inputs for name, entry in variants.items()} or {variant or MAIN: inputs}
    _check_inputs(opened, stage, force=force, warn=quiet.warning)
    sections = stage_sections(effective, module)
    consumed = {name: entry.manifest.output_fingerprint for name, entry in inputs.items()}
    for name, entry in variants.items():
        consumed |= {f"{name}/{key}": value.manifest.output_fingerprint for key, value in entry.inputs.items()}
    if hasattr(module, "external_inputs"):
        consumed |= module.external_inputs(effective)
    return Attempt(
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
        fingerprint=fingerprint({"stage": stage, "config": canonical(sections), "consumed": consumed}),
        force=force,
        unfinished=getattr(module, "still_to_do", None),
        quiet=quiet,
    )


def layers_folder(config: RunConfig, stage: str) -> str | None:
    return config.distill.layers.replace(" ", "") if stage == "distill" and config.distill.layers else None


def stage_module(stage: str) -> ModuleType:
    return importlib.import_module(STAGE_MODULES[stage])


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


def open_input(run_folder: RunFolder, stage: str, variant: str | None) -> StageInput:
    folder = run_folder.stage(stage, variant)
    manifest = read_manifest(folder)
    if manifest is None or manifest.status != "done":
        state = "has not run" if manifest is None else "is not finished"
        option = f" --variant {variant}" if variant and stage in VARIANT_STAGES else ""
        raise CheckpointError(
            f"stage {stage} {state} (no finished manifest in {folder}): run `hedgehog {stage} CONFIG{option}` first."
        )
    return StageInput(folder, manifest)


def check_still_fits(inputs: Mapping[str, StageInput], variant: str | None) -> None:
    """
    Raises:
        CheckpointError: one of the stages was made from another one than there is now: data prepared anew, and the
            adapter of the old; distilled anew, and the maps finetuned before.
    """
    for stage, entry in inputs.items():
        option = f" --variant {variant}" if variant and stage in VARIANT_STAGES else ""
        for source, digest in entry.manifest.consumed.items():
            if source in inputs and inputs[source].manifest.output_fingerprint != digest:
                cure = f"`hedgehog {stage} CONFIG{option} --force` makes it anew"
                raise CheckpointError(f"{entry.folder}: was made from an earlier {source} than there is now; {cure}")


def _check_inputs(
    opened: Mapping[str, Mapping[str, StageInput]], stage: str, *, force: bool, warn: Callable[[str], None]
) -> None:
    """
    Raises:
        CheckpointError: as `check_still_fits`, unless `force` says that they are to be taken as they are.
    """
    for name, inputs in opened.items():
        try:
            check_still_fits(inputs, None if name == MAIN else name)
        except CheckpointError as error:
            if not force:
                raise CheckpointError(f"{error}; with --force, {stage} takes it as it is.") from None
            warn(str(error))


def _open_variants(
    config: RunConfig, run_folder: RunFolder, consumes: tuple[str, ...], main_inputs: dict[str, StageInput]
) -> dict[str, VariantInputs]:
    opened = {"main": VariantInputs("main", config.label or "main", config, main_inputs)}
    for name, variant in config.variants.items():
        inputs = {stage: open_input(run_folder, stage, name) for stage in consumes}
        opened[name] = VariantInputs(name, variant.label or name, apply_variant(config, name), inputs)
    return opened


def refusal(title: str, folder: Path, previous: Manifest, sections: dict[str, Any], consumed: dict[str, str]) -> str:
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


def holds_work(folder: Path) -> bool:
    """Whether a stage's folder holds more than the note that it was begun: a mistyped path leaves nothing to lose."""
    # drift.json alone says why an export was refused: the cure it names changes the config
    nothing_lost = ("manifest.json", "metrics.jsonl", "drift.json", LEASE, HIDDEN_STATES)
    return any(path.name not in nothing_lost for path in folder.iterdir())


def begin_anew(folder: Path, reporter: Reporter) -> None:
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


__all__ = [
    "Attempt",
    "begin_anew",
    "check_still_fits",
    "describe",
    "holds_work",
    "layers_folder",
    "refusal",
    "stage_module",
    "stage_sections",
]
