"""The jobs of a run and what each waits for: the stages in order, distill and evaluate as arrays where asked for.

    prepare → (distill[groups of layers] → merge → finetune) for main and every variant
            → evaluate[shards of the test rows] → evaluate → export

What is done already is read from the manifests; what is waiting or running is told by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..base_folder import known_shape
from ..config import RunConfig
from ..config_loading import apply_variant, config_differences, flatten
from ..data.base_fingerprint import fingerprint_local_inputs
from ..errors import ConfigError
from ..feature_map_checks import UNTRAINED_MAPS
from ..manifest import Manifest, read_manifest
from ..model_shape import ModelShape
from ..preflight import HUB_TRAIN_ROWS
from ..run_folder import STAGES, RunFolder
from ..stale_inputs import changed_inputs
from .gpu_hours import finetune_gpu_hours, num_training_tokens
from .layer_groups import (
    DistillCost,
    balanced_groups,
    distill_cost,
    distill_flops,
    layers_of,
    layers_text,
)
from .resources import world_size

_ASSUMED_FILL = 0.25
"""Typical row over `data.max_length_tokens` before `prepare` has counted tokens (SAMSum at 1024: 0.2)."""

_SHARDS = "evaluate-shards"
_LIGHT = "merge"
"""The settings of jobs that compute nothing: a merge, or a stage that a variant skips and only has to record."""


@dataclass(frozen=True)
class Job:
    """One job or one array of a run. `name` is unique in the run: `merge`, `soft.finetune`."""

    name: str
    stage: str
    """Key under `slurm` whose settings it gets."""
    variant: str | None
    arguments: tuple[str, ...]
    """Subcommand and options of `hedgehog`, the config left out."""
    parents: tuple[str, ...]
    """Names of the jobs that must succeed first."""
    element_option: str = ""
    """Option that gives an element of an array its part."""
    elements: tuple[str, ...] = ()
    """Parts by array index; empty for a single job."""
    done: bool = False
    done_elements: frozenset[int] = frozenset()
    wanted: bool = True
    """False where --from and --to leave it out."""

    @property
    def run_stage(self) -> str:
        """The stage of the run that this job belongs to: a merge is the end of its stage."""
        return "distill" if self.arguments[0] == "merge" else self.arguments[0]

    @property
    def missing(self) -> tuple[int, ...]:
        """Array indices that are not done."""
        if self.done:
            return ()
        return tuple(index for index in range(len(self.elements)) if index not in self.done_elements)


@dataclass(frozen=True)
class GroupCosts:
    """One conversion's distill: what the elements of its array cost, or the one job."""

    job: str
    cost: DistillCost
    groups: tuple[tuple[int, ...], ...]
    row_tokens: float
    num_tokens: float | None
    assumed_length: bool
    gathers: float | None = None
    """How many times as long a layer waits for its weights under ZeRO-3 as its teacher computes, where above 1."""


@dataclass(frozen=True)
class JobGraph:
    """All jobs of a run, parents before children."""

    jobs: tuple[Job, ...]
    costs: tuple[GroupCosts, ...] = ()
    finetune_gpu_hours: Mapping[str, float] = field(default_factory=dict)
    """By name of the job, where it can be reckoned."""

    def __getitem__(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)


@dataclass(frozen=True)
class Queued:
    """What waits or runs of a run's arrays, so that a new graph keeps to it."""

    elements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Job name to the layers or shards of its elements."""
    whole: frozenset[str] = frozenset()
    """Names of jobs without an array."""


def build_graph(
    config: RunConfig, folder: RunFolder, queued: Queued | None = None, stages: Sequence[str] = STAGES
) -> JobGraph:
    """The graph of a run as it stands; jobs of other than these stages are in it, but not wanted.

    Raises:
        ConfigError: layers cannot be grouped; a finished or begun stage has another config or input, or lacks files.
        ModelError: the base model's folder cannot be read.
        CheckpointError: a manifest cannot be read.
    """
    queued = queued or Queued()
    for variant in (None, *config.variants):
        if (config if variant is None else apply_variant(config, variant)).distill.layers is not None:
            key = "distill.layers" if variant is None else f"variants.{variant}.overrides.distill.layers"
            raise ConfigError(
                f"{key}: `submit` chooses the layers of each element; remove the key, and set slurm.layer_groups."
            )
    jobs = [Job("prepare", "prepare", None, ("prepare",), (), done=_done(folder.stage("prepare")))]
    costs: list[GroupCosts] = []
    hours: dict[str, float] = {}
    shape = known_shape(config)
    last: list[str] = []
    for variant in (None, *config.variants):
        conversion = config if variant is None else apply_variant(config, variant)
        prefix = f"{variant}." if variant else ""
        options = ("--variant", variant) if variant else ()
        stage_folder = folder.stage("distill", variant)
        done = _done(stage_folder)
        grouped = None if done else _groups(conversion, folder, variant, f"{prefix}distill", queued)
        if grouped is None:
            if not done and _trains(conversion) and shape is not None:
                costs.append(_costs(conversion, folder, shape, f"{prefix}distill"))
            settings = _LIGHT if conversion.model.attention == "softmax" else "distill"
            jobs.append(Job(f"{prefix}distill", settings, variant, ("distill", *options), ("prepare",), done=done))
            parent = f"{prefix}distill"
        else:
            costs.append(grouped)
            elements = tuple(layers_text(group) for group in grouped.groups)
            finished = frozenset(
                index for index, text in enumerate(elements) if _done(folder.stage("distill", variant, text))
            )
            jobs.append(
                Job(
                    f"{prefix}distill",
                    "distill",
                    variant,
                    ("distill", *options),
                    ("prepare",),
                    element_option="--layers",
                    elements=elements,
                    done_elements=finished,
                )
            )
            parent = f"{prefix}merge"
            jobs.append(Job(parent, "merge", variant, ("merge", *options), (f"{prefix}distill",)))
        last.append(f"{prefix}finetune")
        finished_tuning = _done(folder.stage("finetune", variant))
        if shape is not None and conversion.finetune.enabled and not finished_tuning:
            rows, length, _ = _train_rows(conversion, folder)
            reckoned = finetune_gpu_hours(conversion, shape, length, rows, world_size(conversion, "finetune"))
            if reckoned is not None:
                hours[last[-1]] = reckoned
        settings = "finetune" if conversion.finetune.enabled else _LIGHT
        jobs.append(Job(last[-1], settings, variant, ("finetune", *options), (parent,), done=finished_tuning))
    jobs += _evaluation(config, folder, tuple(last), queued)
    jobs.append(Job("export", "export", None, ("export",), ("evaluate",), done=_done(folder.stage("export"))))
    jobs = [replace(job, wanted=job.run_stage in stages) for job in jobs]
    _check_manifests(config, folder, [job for job in jobs if job.wanted or job.name == "prepare"])
    return JobGraph(tuple(jobs), tuple(costs) if "distill" in stages else (), hours if "finetune" in stages else {})


def _evaluation(config: RunConfig, folder: RunFolder, parents: tuple[str, ...], queued: Queued) -> list[Job]:
    """One job, or an array and the job that joins it. What waits or runs keeps its number of shards."""
    done = _done(folder.stage("evaluate"))
    running = queued.elements.get(_SHARDS, ())
    num_shards = int(running[0].partition("/")[2]) if running else config.slurm.evaluate_shards
    # an `evaluate` in the queue without shards is the whole stage, or joins shards that are done
    if done or num_shards == 1 or ("evaluate" in queued.whole and not running):
        return [Job("evaluate", "evaluate", None, ("evaluate",), parents, done=done)]
    shards = tuple(f"{index}/{num_shards}" for index in range(num_shards))
    finished = frozenset(index for index, shard in enumerate(shards) if _done(folder.shard(shard)))
    return [
        Job(
            _SHARDS,
            "evaluate",
            None,
            ("evaluate",),
            parents,
            element_option="--shard",
            elements=shards,
            done_elements=finished,
        ),
        Job("evaluate", "merge", None, ("evaluate",), (_SHARDS,)),
    ]


def _done(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.status == "done"


def _trains(conversion: RunConfig) -> bool:
    """Whether distill has maps to train, and so layers to spread over an array."""
    model = conversion.model
    return model.attention == "linear" and conversion.distill.enabled and model.feature_map not in UNTRAINED_MAPS


def _groups(
    conversion: RunConfig, folder: RunFolder, variant: str | None, name: str, queued: Queued
) -> GroupCosts | None:
    """Groups of layers for the array, or None for one job. Subsets that were begun stay as they are."""
    begun = [path.name.removeprefix("layers-") for path in folder.subsets(variant) if read_manifest(path) is not None]
    kept = list(dict.fromkeys([*begun, *queued.elements.get(name, ())]))
    whole_begun = (folder.stage("distill", variant) / "checkpoints").is_dir() or name in queued.whole
    if not kept and (conversion.slurm.layer_groups == 1 or whole_begun or not _trains(conversion)):
        return None
    shape = _shape(conversion, folder)
    groups = [layers_of(text) for text in kept]
    taken = [layer for group in groups for layer in group]
    twice = sorted({layer for layer in taken if taken.count(layer) > 1})
    beyond = [layer for layer in taken if layer >= shape.num_layers]
    if twice or beyond:
        fault = f"layer {twice[0]} is in two of them" if twice else f"the model has {shape.num_layers} layers"
        raise ConfigError(
            f"{folder.stage('distill', variant)}: its subsets ({', '.join(f'layers-{text}' for text in kept)}) do not "
            f"fit together: {fault}. Remove the folders that you do not want, then submit again."
        )
    costs = _costs(conversion, folder, shape, name)
    rest = [layer for layer in range(shape.num_layers) if layer not in taken]
    if rest:
        groups += balanced_groups(rest, max(1, conversion.slurm.layer_groups - len(groups)), costs.cost)
    groups.sort()
    return replace(costs, groups=tuple(tuple(group) for group in groups))


def _costs(conversion: RunConfig, folder: RunFolder, shape: ModelShape, name: str) -> GroupCosts:
    """What layers cost, as if all were one group."""
    rows, length, assumed = _train_rows(conversion, folder)
    cost = distill_cost(conversion, shape, length, rows, world_size(conversion, "distill"))
    gathers = cost.forward / distill_flops(conversion, shape, length)[0]
    return GroupCosts(
        job=name,
        cost=cost,
        groups=(tuple(range(shape.num_layers)),),
        row_tokens=length,
        num_tokens=num_training_tokens(conversion, conversion.distill, rows, length),
        assumed_length=assumed,
        gathers=gathers if gathers > 1 else None,
    )


def _shape(config: RunConfig, folder: RunFolder) -> ModelShape:
    """The base model's sizes, which grouping its layers needs."""
    shape = known_shape(config)
    if shape is None:
        raise ConfigError(
            f"model.base: {config.model.base} is on the hub, and its number of layers is not known here; give a local "
            "folder, or set slurm.layer_groups=1 (distill in one job)."
        )
    return shape


def _train_rows(config: RunConfig, folder: RunFolder) -> tuple[int | None, float, bool]:
    """Number of training rows, their mean length in tokens, and whether that is assumed: `prepare` counts them."""
    manifest = read_manifest(folder.stage("prepare"))
    train = manifest.summary.get("splits", {}).get("train", {}) if manifest is not None else {}
    if train.get("used") and train.get("tokens"):
        return int(train["used"]), train["tokens"] / train["used"], False
    rows = HUB_TRAIN_ROWS.get(str(config.data.dataset))
    if config.tiny is not None:
        rows = config.tiny.num_train_dialogues
    if config.data.kind == "text":
        return config.data.max_train_examples, config.data.max_length_tokens, True
    rows = rows if rows is None else min(rows, config.data.max_train_examples or rows)
    return rows, _ASSUMED_FILL * config.data.max_length_tokens, True


def _check_manifests(config: RunConfig, folder: RunFolder, jobs: Sequence[Job]) -> None:
    """Refuse what the stages themselves would refuse after hours in a queue: a stage of another config or input, or
    whose files are gone.

    Raises:
        ConfigError: with the differences.
    """
    main = flatten(config)
    faults: list[str] = []
    for job in jobs:
        values = main if job.variant is None else flatten(apply_variant(config, job.variant))
        stage = job.run_stage
        folders = [folder.stage(stage, job.variant)]
        if job.element_option == "--layers":
            folders += [folder.stage(stage, job.variant, text) for text in job.elements]
        if job.element_option == "--shard":
            folders += [folder.shard(text) for text in job.elements]
        for path in folders:
            manifest = read_manifest(path)
            if manifest is None or not any(
                file.name not in ("manifest.json", "metrics.jsonl") for file in path.iterdir()
            ):
                continue
            known = {key: values[key] for key in manifest.config if key in values} if job.wanted else manifest.config
            if stage == "evaluate":  # a variant that came later is in no manifest
                known |= {key: value for key, value in values.items() if key.startswith("variants.")}
            for line in config_differences(manifest.config, known):
                state = "finished" if manifest.status == "done" else "begun"
                faults.append(f"  {path} was {state} with another config: {line}")
            conversion = config if job.variant is None else apply_variant(config, job.variant)
            faults += [f"  {path} {fault}" for fault in _input_faults(conversion, folder, job, path, manifest)]
    if faults:
        raise ConfigError(
            "the run folder holds stages of another config or input:\n"
            + "\n".join(dict.fromkeys(faults))
            + "\nUndo the change, or choose another name=…. Or move the folders of those stages away and submit again, "
            "which makes them anew; `hedgehog <stage> CONFIG --force` does it without Slurm."
        )


def _input_faults(conversion: RunConfig, folder: RunFolder, job: Job, path: Path, manifest: Manifest) -> Iterator[str]:
    """What a stage was made of and is another thing now; of a finished one, what is gone of it."""
    state = "finished" if manifest.status == "done" else "begun"
    for source in changed_inputs(folder, manifest, job.variant):
        yield f"was {state} with an earlier {source}: it ran anew since"
    if job.name == "prepare":
        now = fingerprint_local_inputs(conversion.model, conversion.data)
        for name in sorted(now.keys() | manifest.consumed.keys()):
            if now.get(name) != manifest.consumed.get(name):
                yield f"was {state} with another input: {name}: the file changed"
    if manifest.status == "done" and job.name != "export":  # what nothing consumes may have been moved away
        gone = [artifact.path for artifact in manifest.artifacts.values() if not (path / artifact.path).exists()]
        if gone:
            yield f"has lost {', '.join(gone[:3])}{' …' if len(gone) > 3 else ''}"
