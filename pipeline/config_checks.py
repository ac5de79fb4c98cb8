"""Rules that join several keys of a config. Pure: no files, no network, no torch.

`errors` make a run impossible; `notes` are settings that are allowed but have no effect or deserve a look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import LABELLED_KINDS, RunConfig, ScheduleConfig
from .errors import ConfigError
from .run_folder import STAGES

VARIANT_SECTIONS = ("model", "distill", "finetune")
VARIANT_FIXED_KEYS = ("model.base", "model.tokenizer", "model.revision", "model.trust_remote_code")
"""Shared by all variants, because `prepare` runs once."""
RESERVED_VARIANT_NAMES = ("main", *STAGES)


@dataclass(frozen=True)
class Problem:
    """Something wrong with a config: the keys it concerns, the first of which leads the message, and what to do."""

    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"

    def under(self, prefix: str) -> Problem:
        """The same of a variant, whose keys stand under `variants.<name>.overrides.`."""
        return Problem(tuple(prefix + key for key in self.keys), self.message)


def untouched(problems: Iterable[Problem], unknown: Sequence[str]) -> list[Problem]:
    """The problems that hang on none of the keys whose values are not known."""
    return [problem for problem in problems if not any(_overlap(key, path) for key in problem.keys for path in unknown)]


def _overlap(key: str, path: str) -> bool:
    return key == path or key.startswith(path + ".") or path.startswith(key + ".") or not path


def cross_field_errors(config: RunConfig) -> list[Problem]:
    """Every combination of keys that cannot work, whatever the number of processes."""
    return [
        *_input_errors(config),
        *_kind_errors(config),
        *_batch_errors(config),
        *_engine_errors(config),
        *_evaluate_errors(config),
    ]


def world_errors(config: RunConfig, world_size: int) -> list[Problem]:
    """Batches that cannot be split over `world_size` processes."""
    problems = []
    for name, schedule in schedules(config):
        whole = schedule.micro_batch_size * world_size
        if schedule.global_batch_size % whole:
            below = schedule.global_batch_size // whole * whole
            choices = " or ".join(str(size) for size in (below, below + whole) if size)
            processes = f" x {world_size} processes = {whole}" if world_size > 1 else ""
            problems.append(
                Problem(
                    tuple(f"{name}.{key}" for key in ("global_batch_size", "micro_batch_size")),
                    f"{schedule.global_batch_size} is not a multiple of micro_batch_size {schedule.micro_batch_size}"
                    f"{processes}; take {choices}, or another micro_batch_size.",
                )
            )
    return problems


def check_world(config: RunConfig, world_size: int, stage: str | None = None) -> None:
    """Refuse a world size that the batches cannot be split over: those of `stage`, or of all stages.

    Raises:
        ConfigError: names every stage that does not fit.
    """
    problems = world_errors(config, world_size)
    if stage is not None:
        problems = [problem for problem in problems if problem.keys[0].startswith(f"{stage}.")]
    if problems:
        raise ConfigError("\n".join(str(problem) for problem in problems))


_READ_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("data", "dialogue_field"): ("dialogues",),
    ("data", "summary_field"): ("dialogues",),
    ("data", "id_field"): ("dialogues", *LABELLED_KINDS),
    ("data", "prompt_template"): ("dialogues",),
    ("data", "overlong"): ("dialogues", *LABELLED_KINDS),
    ("data", "drop_train_duplicates"): ("dialogues", *LABELLED_KINDS),
    ("evaluate", "max_new_tokens"): ("dialogues", "text"),
    ("evaluate", "num_beams"): ("dialogues",),
    ("evaluate", "min_new_tokens"): ("dialogues",),
    ("evaluate", "no_repeat_ngram_size"): ("dialogues",),
    ("data", "text_field"): ("text", *LABELLED_KINDS),
    ("data", "text_end"): ("text",),
    ("data", "second_text_field"): LABELLED_KINDS,
    ("data", "label_field"): LABELLED_KINDS,
    ("evaluate", "perplexity"): ("dialogues", "text"),
    ("model", "chunk_size"): ("dialogues", "text"),
}
"""Keys, with their section, that not every run looks at, and the kinds of data whose runs do."""


_OF_GIVEN_DATA = ("dataset_config", "validation_split", "test_split")
_OF_GIVEN_LABELS = ("text_field", "second_text_field", "label_field")
"""Keys of `data` that say nothing of what a tiny run makes."""


def notes(config: RunConfig) -> list[Problem]:
    """Settings without effect, which somebody may have meant otherwise."""
    return list(_notes(config))


def schedules(config: RunConfig) -> list[tuple[str, ScheduleConfig]]:
    """The training stages that will run, with their schedules."""
    found: list[tuple[str, ScheduleConfig]] = []
    if config.model.attention == "linear" and config.distill.enabled:
        found.append(("distill", config.distill))
    if config.finetune.enabled:
        found.append(("finetune", config.finetune))
    return found


def _input_errors(config: RunConfig) -> Iterator[Problem]:
    model, data = config.model, config.data
    if config.tiny is not None:
        made = [f"model.{name}" for name in ("base", "tokenizer", "revision") if getattr(model, name)]
        made += [
            f"data.{name}" for name in ("dataset", "train_file", "validation_file", "test_file") if getattr(data, name)
        ]
        if data.kind == "text":
            yield Problem(
                ("data.kind", "tiny"), "the section `tiny` makes dialogues; leave this out, or set tiny: null."
            )
        elif data.kind == "regression":
            yield Problem(
                ("data.kind", "tiny"),
                "the section `tiny` makes no scores; set it to classification, or give files and tiny: null.",
            )
        elif data.kind == "classification" and config.tiny.architecture != "bert":
            yield Problem(
                ("data.kind", "tiny.architecture"),
                f"classification needs an encoder, and a tiny {config.tiny.architecture} is none; set "
                "tiny.architecture to bert, or leave this out.",
            )
        elif data.kind != "classification" and config.tiny.architecture == "bert":
            yield Problem(
                ("tiny.architecture", "data.kind"),
                "a bert is an encoder, which is for classification; set data.kind to classification.",
            )
        for key in made:
            yield Problem(
                (key, "tiny"), "the section `tiny` makes this input itself; remove this key, or set tiny: null."
            )
        return
    if model.base is None:
        yield Problem(
            ("model.base", "tiny"),
            "left open; give the folder or hub id of a "
            f"{'BERT' if data.is_labelled else 'Llama or GPT-2'}, here or on the command line: "
            "model.base=…",
        )
    if data.dataset is None:
        for split in ("train", "test"):
            if getattr(data, f"{split}_file") is None:
                more = ".txt, " if data.kind == "text" else ".tsv, .csv, " if data.is_labelled else ""
                files = f"{more}.json or .jsonl"
                yield Problem(
                    (f"data.{split}_file", "data.dataset", "tiny"),
                    f"left open; give a {files} file, here or on the command line: data.{split}_file=… "
                    "(or data.dataset=…, a folder or hub id).",
                )


def _kind_errors(config: RunConfig) -> Iterator[Problem]:
    kind, overlong = config.data.kind, config.data.overlong
    if config.data.is_labelled:
        for name, schedule in (("distill", config.distill), ("finetune", config.finetune)):
            if schedule.packing:
                yield Problem(
                    (f"{name}.packing", "data.kind"),
                    f"an encoder's rows are not joined; set it to false (data.kind is {kind}).",
                )
        if overlong == "truncate_dialogue":
            yield Problem(
                ("data.overlong", "data.kind"), "labelled rows have no dialogue to cut; take truncate, or drop."
            )
        if config.data.second_text_field in (config.data.text_field, config.data.label_field):
            yield Problem(
                ("data.second_text_field", "data.text_field", "data.label_field"),
                f"{config.data.second_text_field} is the text or the label already; name the pair's second text, or "
                "leave it out for single texts.",
            )
        if config.data.label_field == config.data.text_field:
            yield Problem(
                ("data.label_field", "data.text_field"), f"{config.data.label_field} is the text already; name another."
            )
    elif kind == "dialogues" and overlong == "truncate":
        yield Problem(
            ("data.overlong", "data.kind"),
            "is for labelled rows; of dialogues take truncate_dialogue, or drop.",
        )


def _batch_errors(config: RunConfig) -> Iterator[Problem]:
    yield from world_errors(config, world_size=1)


def _engine_errors(config: RunConfig) -> Iterator[Problem]:
    engine, quantization = config.engine, config.model.quantization
    if quantization is not None and engine.zero_stage == 3:
        yield Problem(
            ("engine.zero_stage", "model.quantization"),
            f"3 shards the weights, and {quantization} weights cannot be sharded; take 0, 1 or 2, or no quantization.",
        )
    if engine.offload_optimizer and engine.zero_stage == 0:
        yield Problem(
            ("engine.offload_optimizer", "engine.zero_stage"), "needs ZeRO; set engine.zero_stage to 1, 2 or 3."
        )
    if engine.offload_optimizer and config.finetune.enabled and config.finetune.optimizer == "adamw8bit":
        yield Problem(
            ("finetune.optimizer", "engine.offload_optimizer"),
            "adamw8bit cannot be offloaded to the CPU; take adamw, or offload_optimizer false.",
        )


def _evaluate_errors(config: RunConfig) -> Iterator[Problem]:
    evaluate = config.evaluate
    if not config.data.is_labelled and evaluate.min_new_tokens > evaluate.max_new_tokens:
        yield Problem(
            ("evaluate.min_new_tokens", "evaluate.max_new_tokens"),
            f"{evaluate.min_new_tokens} is more than max_new_tokens {evaluate.max_new_tokens}.",
        )
    if config.data.kind == "text" and not evaluate.perplexity:
        yield Problem(("evaluate.perplexity", "data.kind"), "false leaves nothing to measure on running text.")


def _notes(config: RunConfig) -> Iterator[Problem]:
    model, finetune = config.model, config.finetune
    if finetune.feature_map_learning_rate is not None and not finetune.train_feature_maps:
        yield Problem(("finetune.feature_map_learning_rate",), "has no effect while train_feature_maps is false.")
    if model.attention == "softmax":
        for key in ("feature_dim", "feature_map_options"):
            if getattr(model, key):
                yield Problem((f"model.{key}",), "has no effect while model.attention is softmax.")
    kind = config.data.kind
    for (section, name), kinds in _READ_BY.items():
        part = getattr(config, section)
        if kind not in kinds and getattr(part, name) != type(part).model_fields[name].default:
            yield Problem((f"{section}.{name}",), f"has no effect while data.kind is {kind}.")
    if config.tiny is not None:
        for name in _OF_GIVEN_DATA + (_OF_GIVEN_LABELS if config.data.is_labelled else ()):
            if getattr(config.data, name) != type(config.data).model_fields[name].default:
                yield Problem((f"data.{name}",), "has no effect while the section `tiny` makes the data.")
    elif config.data.dataset is None:
        for name in _OF_GIVEN_DATA:
            if getattr(config.data, name) is not None:
                yield Problem((f"data.{name}",), "has no effect without data.dataset.")
    else:
        if config.data.dataset_config is not None and Path(config.data.dataset).expanduser().is_dir():
            yield Problem(("data.dataset_config",), "has no effect while data.dataset is a folder.")
        for split in ("validation", "test"):
            if getattr(config.data, f"{split}_split") and getattr(config.data, f"{split}_file"):
                yield Problem((f"data.{split}_split",), f"has no effect while data.{split}_file is set.")
    for name, schedule in (("distill", config.distill), ("finetune", finetune)):
        if (
            schedule.max_steps is not None
            and "epochs" in schedule.model_fields_set
            and "max_steps" in schedule.model_fields_set
        ):
            yield Problem((f"{name}.epochs",), "has no effect while max_steps is set.")
    if config.engine.zero_stage == 3:
        yield Problem(
            ("engine.zero_stage",),
            "3 shards the weights while training only; evaluate and export hold the whole model in every process "
            "(for them alone: model.quantization=nf4 engine.zero_stage=1, or engine.device=cpu).",
        )
    distill, longest = config.distill, config.data.max_length_tokens
    if distill.query_fraction < 1 and longest <= distill.query_block:
        yield Problem(
            ("distill.query_fraction", "distill.query_block", "data.max_length_tokens"),
            f"has no effect on rows of at most {longest} tokens, which are one block of {distill.query_block}; lower "
            "distill.query_block.",
        )
    if config.distill.layers is not None:
        yield Problem(
            ("distill.layers",),
            "trains a subset of the layers; the stages after distill need all of them, joined by `hedgehog merge`.",
        )
