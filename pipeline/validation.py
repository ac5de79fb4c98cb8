"""`hedgehog validate`: everything that can be wrong before a GPU or the network is touched, and what a run will need.

Reads the config, a local base model's config.json and the headers of its weight files, local data files and a DeepSpeed
JSON. Never loads weights.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base_folder import check_convertible, check_not_quantized, check_weights, read_llama_config
from .config import RunConfig
from .config_checks import notes, schedules, world_errors
from .config_loading import load_config, variant_configs
from .errors import ConfigError, DataError, HedgehogError, ModelError
from .feature_map_checks import feature_map_errors, feature_map_size
from .hidden_state_size import describe_cache
from .memory_estimate import StageEstimate, estimate_memory, state_bytes
from .model_shape import ModelShape, known_shape

HUB_TRAIN_ROWS = {"knkarthick/samsum": 14731}
"""Training rows of datasets that are known without asking the hub."""


@dataclass(frozen=True)
class BatchArithmetic:
    """How one training stage's steps come about."""

    stage: str
    num_rows: int | None
    """Training rows before over-long ones are dropped; None where only the hub knows."""
    num_steps: int | None
    global_batch_size: int
    micro_batch_size: int
    world_size: int
    num_accumulation: int
    max_tokens_per_step: int


@dataclass
class ValidationReport:
    """What `validate` found out about one config. It is valid when `errors` is empty."""

    file: str
    world_size: int
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: RunConfig | None = None
    shape: ModelShape | None = None
    device: str = "cuda"
    batches: list[BatchArithmetic] = field(default_factory=list)
    memory: list[StageEstimate] = field(default_factory=list)


def validate_config(file: Path | str, overrides: Sequence[str] = (), *, world_size: int = 1) -> ValidationReport:
    """Check one config. Faults are collected in the report, not raised."""
    report = ValidationReport(str(file), world_size)
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        report.errors.append(str(error))
        return report
    report.config, report.device = config, reckoned_device(config)
    report.errors += [str(problem) for problem in world_errors(config, world_size)]
    try:
        report.shape = known_shape(config)
        if report.shape is None:
            report.notes.append(f"model.base: {config.model.base} is on the hub; its sizes are known after `prepare`.")
        else:
            _check_local_base(config, report.shape)
    except ModelError as error:
        report.errors.append(f"model.base: {error}")
    map_errors = feature_map_errors(config, report.shape.head_dim if report.shape else None)
    report.errors += [str(problem) for problem in map_errors]
    report.errors += [*_tokenizer_errors(config), *_adapter_errors(config), *_deepspeed_errors(config)]
    if report.shape is not None:
        report.errors += _layer_errors(config, report.shape)
    num_rows, data_errors = count_train_rows(config)
    report.notes += config_notes(config, report.shape, num_rows)
    report.errors += data_errors
    if not report.errors:
        report.batches = batch_arithmetic(config, num_rows, world_size)
        if report.shape is not None:
            report.memory = estimate_memory(config, report.shape, world_size=world_size, device=report.device)
    return report


def config_notes(config: RunConfig, shape: ModelShape | None, num_rows: int | None = None) -> list[str]:
    """What is allowed and deserves a look. Imports no torch.

    Args:
        shape: the base model's, where known.
        num_rows: training rows, where known.
    """
    found = [str(note) for note in notes(config)]
    if shape is not None:
        found += [*_length_notes(config, shape), *_cache_notes(config, shape, num_rows)]
    return found


def validate_configs(files: Sequence[str], overrides: Sequence[str], *, world_size: int, as_json: bool) -> bool:
    """Check and print every config; True when all are valid."""
    from .validation_report import print_reports

    reports = [validate_config(file, overrides, world_size=world_size) for file in files]
    print_reports(reports, as_json=as_json)
    return not any(report.errors for report in reports)


def reckoned_device(config: RunConfig) -> str:
    """The device that the estimate is for: `auto` is taken for a GPU, for the tiny section's model for a CPU."""
    if config.engine.device == "auto":
        return "cpu" if config.tiny is not None else "cuda"
    return config.engine.device


def batch_arithmetic(config: RunConfig, num_rows: int | None, world_size: int) -> list[BatchArithmetic]:
    """Global batch = micro-batch x processes x accumulation, and the number of steps, of every training stage."""
    found = []
    for stage, schedule in schedules(config):
        steps = schedule.max_steps
        if steps is None and num_rows is not None and not schedule.packing:
            steps = max(1, math.ceil(schedule.epochs * num_rows / schedule.global_batch_size - 1e-9))
        found.append(
            BatchArithmetic(
                stage=stage,
                num_rows=num_rows,
                num_steps=steps,
                global_batch_size=schedule.global_batch_size,
                micro_batch_size=schedule.micro_batch_size,
                world_size=world_size,
                num_accumulation=schedule.global_batch_size // (schedule.micro_batch_size * world_size),
                max_tokens_per_step=schedule.global_batch_size * config.data.max_length_tokens,
            )
        )
    return found


def count_train_rows(config: RunConfig) -> tuple[int | None, list[str]]:
    """Training rows (without duplicates and held-out rows, over-long ones included) where they are on this machine."""
    data = config.data
    if config.tiny is not None:
        limit = data.max_train_examples or config.tiny.num_train_dialogues
        return min(limit, config.tiny.num_train_dialogues), []
    on_hub = data.dataset is not None and not Path(data.dataset).exists() and data.dataset.count("/") == 1
    if on_hub and not data.dataset.startswith((".", "/")):  # type: ignore[union-attr]
        missing = [
            f"data.{split}_file: there is no file {file}"
            for split in ("train", "validation", "test")
            if (file := getattr(data, f"{split}_file")) is not None and not Path(file).is_file()
        ]
        rows = HUB_TRAIN_ROWS.get(str(data.dataset)) if data.train_file is None else None
        return rows if rows is None else min(rows, data.max_train_examples or rows), missing
    import torch

    from .data.sources import resolve_splits

    try:
        splits = resolve_splits(data, lambda name: torch.Generator().manual_seed(0))
    except DataError as error:
        message = str(error)
        return None, [message if message.startswith("data.") else f"data: {message}"]
    return splits["train"].counts.used, []


def _check_local_base(config: RunConfig, shape: ModelShape) -> None:
    """
    Raises:
        ModelError: the base is a folder here that a run could not start from.
    """
    folder = Path(config.model.base or "")
    if config.model.base is None or not folder.is_dir():
        return
    fields = read_llama_config(folder)
    check_not_quantized(str(folder), fields)
    check_convertible(str(folder), fields, config)
    check_weights(folder, shape)


def _tokenizer_errors(config: RunConfig) -> list[str]:
    given = config.model.tokenizer
    named = given or config.model.base
    if named is None:
        return []
    key, folder = f"model.{'tokenizer' if given else 'base'}", Path(named)
    if folder.is_dir():
        there = any(file for pattern in ("tokenizer.*", "vocab.*") for file in folder.glob(pattern))
        return [] if there else [f"{key}: {named} has no tokenizer.json or tokenizer.model; model.tokenizer names one."]
    if given and (given.startswith((".", "/")) or given.count("/") > 1 or folder.exists()):
        return [f"{key}: {given} is no folder."]
    return []


def _adapter_errors(config: RunConfig) -> list[str]:
    def errors_of(conversion: RunConfig) -> list[str]:
        modules = conversion.finetune.lora.target_modules
        found = [] if modules else [f"empty; a Llama's modules are {', '.join(_LLAMA_LINEARS)}."]
        for module in modules:
            if module not in _LLAMA_LINEARS:
                near = difflib.get_close_matches(module, _LLAMA_LINEARS, n=1)
                meant = f"did you mean {near[0]}?" if near else f"a Llama's are {', '.join(_LLAMA_LINEARS)}."
                found.append(f"unknown module {module}; {meant}")
        return [f"finetune.lora.target_modules: {error}" for error in found]

    return _of_all_conversions(config, errors_of)


_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _deepspeed_errors(config: RunConfig) -> list[str]:
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
        return [str(error)]
    return []


def _layer_errors(config: RunConfig, shape: ModelShape) -> list[str]:
    def errors_of(conversion: RunConfig) -> list[str]:
        if conversion.distill.layers is None:
            return []
        from .distillation import parse_layers

        try:
            parse_layers(conversion.distill.layers, shape.num_layers)
        except ConfigError as error:
            return [str(error)]
        return []

    return _of_all_conversions(config, errors_of)


def _length_notes(config: RunConfig, shape: ModelShape) -> list[str]:
    limit, longest = shape.max_length_tokens, config.data.max_length_tokens
    new = config.evaluate.max_new_tokens
    if limit is None:
        return []
    if longest > limit:
        return [f"data.max_length_tokens: {longest} is more than the {limit} tokens that the base model was made for."]
    if longest + new > limit:
        return [
            f"evaluate.max_new_tokens: {longest} tokens of a prompt and {new} new ones pass the base model's {limit}."
        ]
    return []


def _cache_notes(config: RunConfig, shape: ModelShape, num_rows: int | None) -> list[str]:
    def notes_of(conversion: RunConfig) -> list[str]:
        note = describe_cache(conversion, shape.hidden_size, num_rows)
        return [] if note is None else [note]

    return _of_all_conversions(config, notes_of)


def _of_all_conversions(config: RunConfig, errors_of: Callable[[RunConfig], list[str]]) -> list[str]:
    """The main conversion's errors, and those that a variant's overrides bring in."""
    errors = errors_of(config)
    for name, variant in variant_configs(config).items():
        errors += [f"variants.{name}.overrides.{error}" for error in errors_of(variant) if error not in errors]
    return errors


def describe_model(report: ValidationReport) -> str:
    """One line: the base model's sizes, the features per head, and the decoding state."""
    shape, config = report.shape, report.config
    assert shape is not None and config is not None
    heads = f"{shape.num_heads} heads"
    if shape.num_key_value_heads != shape.num_heads:
        heads += f" ({shape.num_key_value_heads} for keys and values)"
    line = f"{shape.num_weights / 1e6:,.1f} M weights, {shape.num_layers} layers, {heads} x {shape.head_dim}"
    if config.model.attention == "linear":
        size = feature_map_size(config.model, shape.head_dim)
        learned = 2 * shape.num_layers * shape.num_heads * size.num_weights
        line += (
            f"; {config.model.feature_map}: {size.num_features} features a head, {learned / 1e6:,.1f} M weights, "
            f"state {state_bytes(config, shape) / 2**20:,.1f} MiB a row"
        )
    return line


def report_as_json(report: ValidationReport) -> dict[str, Any]:
    """The report as JSON values; every memory term with its formula."""
    from dataclasses import asdict

    return {
        "file": report.file,
        "valid": not report.errors,
        "errors": report.errors,
        "notes": report.notes,
        "world_size": report.world_size,
        "device": report.device,
        "batches": [asdict(entry) for entry in report.batches],
        "memory": [
            {
                "stage": estimate.stage,
                "variant": estimate.variant,
                "where": estimate.where,
                "assumes": estimate.assumes,
                "num_bytes": round(estimate.num_bytes),
                "terms": [{**asdict(term), "num_bytes": round(term.num_bytes)} for term in estimate.terms],
            }
            for estimate in report.memory
        ],
    }
