"""`hedgehog validate`: everything that can be wrong before a GPU or the network is touched, and what a run will need.

The finding is preflight.py's and the config loader's; here it becomes a report, with the arithmetic of what is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import RunConfig
from .config_checks import Problem, notes, schedules
from .config_loading import described, read_config, variant_configs
from .data.sources import on_hub
from .errors import ConfigError
from .feature_map_checks import feature_map_size
from .formatting import format_bytes
from .hidden_state_size import describe_cache
from .memory_estimate import StageEstimate, estimate_memory, state_bytes
from .model_shape import ModelShape
from .preflight import add_problems, look_at_everything
from .slurm.layout_checks import layout_errors


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
    unreadable: str | None = None
    """Why the file could not be read as a config; then nothing else is known."""
    problems: list[Problem] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    """Where the keys come from: `line 3`, `command line`."""
    notes: list[str] = field(default_factory=list)
    config: RunConfig | None = None
    shape: ModelShape | None = None
    device: str = "cuda"
    batches: list[BatchArithmetic] = field(default_factory=list)
    memory: list[StageEstimate] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Everything that is wrong, without the places of the keys."""
        found = [str(problem) for problem in self.problems]
        return found if self.unreadable is None else [self.unreadable]

    @property
    def placed_errors(self) -> list[str]:
        """The same, each key with its line."""
        found = dict.fromkeys(described(problem, self.origins) for problem in self.problems)
        return list(found) if self.unreadable is None else [self.unreadable]


def validate_config(file: Path | str, overrides: Sequence[str] = (), *, world_size: int = 1) -> ValidationReport:
    """Check one config. Faults are collected in the report, not raised."""
    report = ValidationReport(str(file), world_size)
    try:
        reading = read_config(file, overrides)
    except ConfigError as error:
        report.unreadable = str(error)
        return report
    report.origins, report.problems = reading.origins, reading.problems
    if not reading.conversions:
        return report
    config = reading.conversions[0].config
    found = look_at_everything(reading, world_size=world_size)
    add_problems(reading, [*found.problems, *layout_errors(reading)])
    if report.problems:
        return report
    report.config, report.device, report.shape = config, reckoned_device(config), found.shape
    if report.shape is None:
        report.notes.append(f"model.base: {config.model.base} is on the hub; its sizes are known after `prepare`.")
    if found.num_rows is None and on_hub(config.data):
        report.notes.append(f"data.dataset: {config.data.dataset} is on the hub; its rows are known after `prepare`.")
    report.notes += config_notes(config, report.shape, found.num_rows)
    report.batches = batch_arithmetic(config, found.num_rows, world_size)
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


def _length_notes(config: RunConfig, shape: ModelShape) -> list[str]:
    limit, longest = shape.max_length_tokens, config.data.max_length_tokens
    new = config.evaluate.max_new_tokens
    if limit is None:
        return []
    if longest > limit:
        return [f"data.max_length_tokens: {longest} is more than the {limit} tokens that the base model was made for."]
    if longest + new > limit and config.data.kind == "dialogues":
        return [
            f"evaluate.max_new_tokens: {longest} tokens of a prompt and {new} new ones pass the base model's {limit}."
        ]
    return []


def _cache_notes(config: RunConfig, shape: ModelShape, num_rows: int | None) -> list[str]:
    def notes_of(conversion: RunConfig) -> list[str]:
        note = describe_cache(conversion, shape.hidden_size, num_rows)
        return [] if note is None else [note]

    return _of_all_conversions(config, notes_of)


def _of_all_conversions(config: RunConfig, notes_of: Callable[[RunConfig], list[str]]) -> list[str]:
    """The main conversion's notes, and those that a variant's overrides bring in."""
    found = notes_of(config)
    for name, variant in variant_configs(config).items():
        found += [f"variants.{name}.overrides.{note}" for note in notes_of(variant) if note not in found]
    return found


def describe_model(report: ValidationReport) -> str:
    """One line: the base model's sizes, the features per head, and the decoding state."""
    shape, config = report.shape, report.config
    assert shape is not None and config is not None
    heads = f"{shape.num_heads} heads"
    if shape.num_key_value_heads != shape.num_heads:
        heads += f" ({shape.num_key_value_heads} for keys and values)"
    line = f"{_millions(shape.num_weights)} weights, {shape.num_layers} layers, {heads} x {shape.head_dim}"
    if config.model.attention == "linear":
        size = feature_map_size(config.model, shape.head_dim)
        learned = 2 * shape.num_layers * shape.num_heads * size.num_weights
        line += f"; {config.model.feature_map}: {size.num_features} features a head, {_millions(learned)} weights"
        if not shape.is_encoder:
            line += f", state {format_bytes(state_bytes(config, shape))} a row"
    return line


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 50_000 or not number else f"{number / 1e3:,.1f} k"


def report_as_json(report: ValidationReport) -> dict[str, Any]:
    """The report as JSON values; every memory term with its formula."""
    from dataclasses import asdict

    return {
        "file": report.file,
        "valid": not report.errors,
        "errors": report.placed_errors,
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
