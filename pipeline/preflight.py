"""What a run would stumble over: files, the base model, feature maps, batches, found before it makes a folder.

`validate` shows all of it, and `run` and `submit` do not begin. Reads the config, a local base model's config.json and
the headers of its weight files, local data files and a DeepSpeed JSON. Touches neither a GPU nor the network.

Each check names the keys that it hangs on: where the value of one could not be used, it has nothing to say.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from .base_folder import (
    check_no_dropout,
    check_not_quantized,
    check_weights,
    kind_fault,
    known_shape,
    lacks_head,
    pair_fault,
    read_base_config,
    read_shapes,
)
from .config import RunConfig
from .config_checks import Problem, untouched, world_errors
from .config_loading import Conversion, Reading
from .errors import CheckpointError, ConfigError, DataError, HedgehogError, ModelError
from .families import FAMILIES
from .feature_map_checks import feature_map_errors, name_errors
from .layer_subset import parse_layers
from .manifest import read_manifest
from .model_shape import ModelShape
from .run_folder import VARIANT_STAGES, RunFolder

HUB_TRAIN_ROWS = {"knkarthick/samsum": 14731}
"""Training rows of datasets that are known without asking the hub."""


@dataclass
class Findings:
    """What is wrong, and what the checks came to know on the way."""

    problems: list[Problem] = field(default_factory=list)
    shape: ModelShape | None = None
    """The base model's; None where only the hub knows it, or nobody."""
    num_rows: int | None = None
    """Training rows (without duplicates and held-out rows, over-long ones included), where they are on this machine."""


def look_at_everything(reading: Reading, *, world_size: int = 1, imports_torch: bool = True) -> Findings:
    """All that can be known to be wrong, beside what is wrong with the config alone.

    Args:
        imports_torch: else rows are not read and feature maps not made: for login nodes.
    """
    main = reading.conversions[0]
    found = look_at_conversions(reading, world_size=world_size, imports_torch=imports_torch)
    found.problems += untouched(
        [
            *_base_errors(reading),
            *_kind_errors(main.config),
            *_tokenizer_errors(main.config),
            *_length_errors(main.config),
        ],
        main.unknown,
    )
    found.num_rows, problems = count_train_rows(main, read=imports_torch)
    found.problems += problems
    return found


def look_at_conversions(reading: Reading, *, world_size: int = 1, imports_torch: bool = True) -> Findings:
    """What is wrong with the conversions themselves, wherever their inputs come from."""
    shape = _shape(reading.conversions[0].config)

    def errors_of(config: RunConfig) -> list[Problem]:
        model = config.model
        maps = feature_map_errors(model, shape and shape.head_dim) if imports_torch else name_errors(model)
        batches = world_errors(config, world_size)
        return [
            *batches,
            *maps,
            *_module_errors(config, shape),
            *_deepspeed_errors(config),
            *_layer_errors(config, shape),
            *_head_errors(config, shape),
        ]

    return Findings(of_all_conversions(reading, errors_of), shape)


def refuse_mistakes(
    reading: Reading,
    stage: str | None,
    *,
    world_size: int,
    variant: str | None = None,
    first: str | None = None,
    force: bool = False,
) -> RunConfig:
    """The config, after all that can be refused before a stage (None: all of them) makes a folder.

    Args:
        variant: whose stage it is; that of another conversion may run on another number of processes.
        first: the stage that a whole run begins with.
        force: whether what `prepare` has done is to be done again.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    if reading.conversions:
        config = reading.conversions[0].config
        if stage in (None, "prepare") and first in (None, "prepare") and (force or not is_prepared(config)):
            found = look_at_everything(reading, world_size=world_size).problems
        else:
            alone = stage in (*VARIANT_STAGES, "merge", "export")
            looked_at = _conversion(reading, variant) if alone else reading
            found = look_at_conversions(looked_at, world_size=world_size).problems
        if stage is not None:
            others = {"prepare", "distill", "finetune", "evaluate", "export"} - {stage}
            found = [problem for problem in found if _section(problem) not in others]
        add_problems(reading, found)
    return reading.valid_config()


def _conversion(reading: Reading, variant: str | None) -> Reading:
    """One of the conversions alone; an unknown variant is told by who runs it."""
    prefix = "" if variant is None else f"variants.{variant}.overrides."
    own = next((one for one in reading.conversions if one.prefix == prefix), reading.conversions[0])
    return replace(reading, conversions=[own])


def add_problems(reading: Reading, found: Sequence[Problem]) -> None:
    """Put them behind the config's own. A batch that does not fit is told once, with the processes."""
    keys = {problem.keys[0] for problem in found if problem.keys[0].endswith("global_batch_size")}
    reading.problems[:] = [*(problem for problem in reading.problems if problem.keys[0] not in keys), *found]


def is_prepared(config: RunConfig) -> bool:
    """Whether the run's `prepare` is done."""
    try:
        manifest = read_manifest(RunFolder.of(config).stage("prepare"))
    except CheckpointError:  # the stage itself tells it
        return False
    return manifest is not None and manifest.status == "done"


def of_all_conversions(reading: Reading, errors_of: Callable[[RunConfig], Sequence[Problem]]) -> list[Problem]:
    """The main conversion's errors, and those that a variant's overrides bring in."""
    first, *others = reading.conversions
    errors = untouched(errors_of(first.config), first.unknown)
    already = {str(error) for error in errors}
    errors = [error.under(first.prefix) for error in errors]
    for conversion in others:
        new = untouched(errors_of(conversion.config), conversion.unknown)
        errors += [error.under(conversion.prefix) for error in new if str(error) not in already]
    return errors


def _shape(config: RunConfig) -> ModelShape | None:
    """The base model's, if it can be known; why not is told elsewhere."""
    if config.model.base is None and config.tiny is None:
        return None
    with suppress(ModelError):
        return known_shape(config)
    return None


def _section(problem: Problem) -> str:
    key = problem.keys[0]
    return (key.partition(".overrides.")[2] if key.startswith("variants.") else key).partition(".")[0]


def _module_errors(config: RunConfig, shape: ModelShape | None) -> Iterator[Problem]:
    """Names that no linear module of the base's family has; of any family where only the hub knows which one it is."""
    modules = config.finetune.lora.target_modules
    if modules is None:
        return
    families = list(FAMILIES.values()) if shape is None else [type(shape)]
    known = [name for family in families for name in family.lora_modules]
    theirs = "; ".join(f"a {family.title}'s are {', '.join(family.lora_modules)}" for family in families)
    key = ("finetune.lora.target_modules",)
    if not modules:
        yield Problem(key, f"empty; {theirs}.")
    for module in modules:
        if module not in known:
            near = difflib.get_close_matches(module, known, n=1, cutoff=0.75)
            meant = f"did you mean {near[0]}?" if near else f"{theirs}."
            yield Problem(key, f"unknown module {module}; {meant}")


def _head_errors(config: RunConfig, shape: ModelShape | None) -> list[Problem]:
    """An encoder that nothing ever taught the classes; of a hub id evaluate tells it."""
    base = config.model.base
    if config.tiny is not None or base is None or shape is None or not shape.is_encoder or config.finetune.enabled:
        return []
    with suppress(ModelError):  # told elsewhere
        if Path(base).is_dir() and lacks_head(Path(base), type(shape)):
            message = f"false, but {base} has no head for classes: finetune it, or take one that was finetuned already."
            return [Problem(("finetune.enabled", "model.base"), message)]
    return []


def _deepspeed_errors(config: RunConfig) -> list[Problem]:
    if config.engine.deepspeed_config is None:
        return []
    from .deepspeed_settings import deepspeed_settings

    try:
        deepspeed_settings(
            config.engine,
            micro_batch_size=1,
            num_accumulation=1,
            gradient_clip=1.0,
            num_trainable=1,
            largest_parameter=1,
        )
    except HedgehogError as error:
        decided = ("engine.zero_stage", "engine.offload_optimizer") if "contradicts" in str(error) else ()
        return [_keyed(error, "engine.deepspeed_config", *decided)]
    return []


def _layer_errors(config: RunConfig, shape: ModelShape | None) -> list[Problem]:
    if config.distill.layers is None or shape is None:
        return []
    try:
        parse_layers(config.distill.layers, shape.num_layers)
    except ConfigError as error:
        return [_keyed(error, "distill.layers", "model.base", "tiny.num_layers")]
    return []


def _base_errors(reading: Reading) -> Iterator[Problem]:
    """A base that a run could not start from: what is wrong with its config, and what with its weights."""
    config = reading.conversions[0].config
    base = config.model.base
    if base is None or config.tiny is not None:
        return
    keys = ("model.base", "tiny")
    fields, shape = None, None
    try:
        shape = known_shape(config)
    except ModelError as error:
        yield Problem(keys, str(error))
    folder = Path(base)
    if not folder.is_dir():
        return
    with suppress(ModelError):  # told above
        fields = read_base_config(folder)
    linear = [one for one in reading.conversions if one.config.model.attention == "linear"]
    checks: list[Callable[[], object]] = []
    if fields is not None:
        checks.append(lambda: check_not_quantized(base, fields))
        if any(untouched([Problem(("model.attention",), "")], one.unknown) for one in linear):
            checks.append(lambda: check_no_dropout(base, fields))
    if shape is not None:
        checks.append(lambda: check_weights(folder, shape))
    elif (folder / "config.json").is_file():  # else it is another folder altogether
        checks.append(lambda: read_shapes(folder))
    for check in checks:
        try:
            check()
        except ModelError as error:
            yield Problem(keys, str(error))


def _kind_errors(config: RunConfig) -> list[Problem]:
    """An encoder for data that is generated, a decoder for rows to classify (of a tiny run the config tells it), or
    pairs for a model that reads single texts."""
    shape = _shape(config)
    fault = None if shape is None or config.tiny is not None else kind_fault(type(shape), config.data.kind)
    if fault is not None:
        return [Problem(("data.kind", "model.base", "tiny"), fault)]
    fault = None if shape is None else pair_fault(shape, config.data)
    return [] if fault is None else [Problem(("data.second_text_field", "model.base", "tiny"), fault)]


def _length_errors(config: RunConfig) -> list[Problem]:
    """Rows that are longer than the base's table of positions, where it has one."""
    shape, length, new = _shape(config), config.data.max_length_tokens, config.evaluate.max_new_tokens
    if shape is None or not shape.positions_are_a_table:
        return []
    most = shape.max_length_tokens or 0
    found = []
    if length > most:
        keys = ("data.max_length_tokens", "model.base", "tiny.architecture")
        found.append(Problem(keys, f"{length}, but the base model has {most} positions: give at most {most}."))
    if new >= most and config.data.kind == "dialogues":
        keys = ("evaluate.max_new_tokens", "model.base", "tiny.architecture")
        found.append(Problem(keys, f"{new}, but the base model has {most} positions for a prompt and new tokens."))
    return found


def _tokenizer_errors(config: RunConfig) -> list[Problem]:
    given = config.model.tokenizer
    named = given or config.model.base
    if named is None or config.tiny is not None:
        return []
    key, folder = (f"model.{'tokenizer' if given else 'base'}", "model.tokenizer"), Path(named)
    if folder.is_dir():
        there = any(file for pattern in ("tokenizer.*", "vocab.*") for file in folder.glob(pattern))
        cure = "" if given else "; model.tokenizer names one"
        return [] if there else [Problem(key, f"{named} has no tokenizer.json or tokenizer.model{cure}.")]
    if given and (given.startswith((".", "/")) or given.count("/") > 1 or folder.exists()):
        return [Problem(key, f"{given} is no folder.")]
    return []


def count_train_rows(main: Conversion, *, read: bool = True) -> tuple[int | None, list[Problem]]:
    """Training rows where they are on this machine, and all that is wrong with the data that are.

    Args:
        read: whether to read the files, or just to see that they are there.
    """
    data, tiny = main.config.data, main.config.tiny
    if tiny is not None:
        limit = data.max_train_examples or tiny.num_train_dialogues
        return min(limit, tiny.num_train_dialogues), []
    from .data.sources import (
        find_sources,
        first_text_faults,
        missing_splits,
        on_hub,
        read_sources,
        select_examples,
    )

    sources, problems = find_sources(data)
    if data.dataset is not None and not on_hub(data):  # where there is none, the config is said to lack it
        problems += missing_splits(data, sources, problems)
    if data.kind == "text":  # its rows are counted in tokens, by prepare
        problems += first_text_faults(sources, data) if read else []
        return None, untouched(problems, main.unknown)
    splits, unreadable = read_sources(sources, data) if read else ({}, [])
    problems = untouched([*problems, *unreadable], main.unknown)
    if on_hub(data):
        rows = HUB_TRAIN_ROWS.get(str(data.dataset)) if data.train_file is None else None
        return rows if rows is None else min(rows, data.max_train_examples or rows), problems
    if problems or not {"train", "test"} <= splits.keys():
        return None, problems
    import torch

    try:
        return select_examples(splits, data, lambda name: torch.Generator().manual_seed(0))["train"].counts.used, []
    except DataError as error:
        keys = ("data", *(f"data.{name}" for name in type(data).model_fields))
        return None, untouched([Problem(keys, str(error))], main.unknown)


def _keyed(error: HedgehogError, key: str, *others: str) -> Problem:
    """A problem from an error whose message begins with its key."""
    return Problem((key, *others), str(error).removeprefix(f"{key}: "))
