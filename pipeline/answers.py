"""What a run's variants make of a text of the user's own: the work of `hedgehog generate`.

The model is the one that `evaluate` scores: base weights, feature maps and adapter as `finetune` left them, unmerged.
It reads the prompt at once and then one token at a time, with the constant state of linear attention, or the growing
cache of softmax attention.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .attempt import check_still_fits, open_input
from .config import LABELLED_KINDS
from .config_loading import apply_variant, config_differences, flatten, load_config
from .data.tokenize import TextEncoder, choose_pad_id, load_prepared_tokenizer, render_prompt
from .distributed import discover_world
from .errors import CheckpointError, ConfigError, ModelError, ResourceError
from .families import table_length
from .generation import check_room, make_generation_config
from .manifest import StageInput
from .modeling.hedgehog_cache import CACHE_NAME
from .run_folder import MAIN, RunFolder
from .status import find_run_folder
from .text_stream import TextStream
from .variants import load_variant_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from .config import RunConfig
    from .distributed import World

_CONSUMES = ("prepare", "distill", "finetune")
_TEMPLATE = "data.prompt_template"
_PLACES = ("model.base", "model.tokenizer")
"""Where what prepare read lies today; that it is the same, their fingerprints say."""
_MAY_CHANGE = ("evaluate.", "engine.", "model.attention_backend", "model.chunk_size", _TEMPLATE, *_PLACES)
"""How a finished run answers; every other key is part of what it is."""
_COOLEST = 1e-3
"""The smallest temperature above 0: logits are divided by it in the model's type."""
_NUM_WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Answer:
    """What one variant made of the prompt."""

    variant: str
    label: str
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    """Without the end token."""
    truncated: bool
    """The limit came before the model ended."""
    seconds: float
    """From the prompt to the last token, on a model that is warm."""
    first_token_s: float | None
    """Of them until the first token, the prompt's reading. None with beams, which have no first one."""
    tokens_per_s: float | None
    """After the first, the end token among them. None with beams, or where there was only one."""
    state_bytes: int
    """What was kept between the last tokens: the state of linear attention, or softmax attention's keys and values."""


@dataclass(frozen=True)
class Question:
    """A text, and how to answer it."""

    text: str
    raw: bool = False
    """The text is the whole prompt; else it is a dialogue, and goes into the template that prepare used."""
    temperature: float = 0.0
    """0: the most likely tokens, or beams, as `evaluate` does."""
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    """The main conversion or a variant of a run, with the finished stages behind it."""

    name: str
    config: RunConfig
    inputs: Mapping[str, StageInput]
    prompt_template: str

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.config.label or self.name


def open_variants(run: str, names: Sequence[str] = (), overrides: Sequence[str] = ()) -> list[Variant]:
    """Find what answers, before anything slow.

    Args:
        run: a run folder, its name under `runs/`, or a YAML that names it.
        names: of variants; "main" is the conversion itself, and what is taken where none is given.
        overrides: `section.key=value` over the run's config, of keys that say how it answers: evaluate.max_new_tokens,
            engine.device … `model.base` says where the base lies today.

    Raises:
        ConfigError: no such run or variant, or an override that would be another model.
        CheckpointError: a stage that is needed is not finished, or what it was made from was made anew.
    """
    folder = RunFolder(find_run_folder(run))
    given = [override.partition("=")[0].strip() for override in overrides]
    for key in given:
        if not key.startswith(_MAY_CHANGE):
            raise ConfigError(
                f"{key}: a finished run answers as it is. What can be given here: evaluate.*, engine.*, "
                f"{', '.join(_MAY_CHANGE[2:])}"
            )
    if not folder.config_file.is_file():
        raise ConfigError(f"{folder.root}: has no {folder.config_file.name}; run `hedgehog prepare CONFIG` first")
    config = load_config(folder.config_file, overrides)
    if _TEMPLATE in given and config.data.kind != "dialogues":
        raise ConfigError(f"{_TEMPLATE}: this run goes on with the text it is given; there is no template around it")
    return [_open(folder, name, _conversion(config, name), given) for name in dict.fromkeys(names or [MAIN])]


def _conversion(config: RunConfig, name: str) -> RunConfig:
    if name == MAIN:
        return config
    if name not in config.variants:
        known = ", ".join([MAIN, *config.variants])
        raise ConfigError(f"--variant {name}: there is no such variant in {config.name} (there are: {known})")
    return apply_variant(config, name)


def _open(folder: RunFolder, name: str, config: RunConfig, given: Sequence[str]) -> Variant:
    inputs = {stage: open_input(folder, stage, None if name == MAIN else name) for stage in _CONSUMES}
    check_still_fits(inputs, None if name == MAIN else name)
    now = flatten(config)
    for stage, entry in inputs.items():
        option = f" --variant {name}" if name != MAIN and stage != "prepare" else ""
        cure = f"`hedgehog {stage} CONFIG{option} --force` makes it anew"
        then = {key: value for key, value in entry.manifest.config.items() if key.startswith("model.")}
        then = {key: value for key, value in then.items() if key not in _PLACES}
        changed = config_differences(then, {key: now.get(key) for key in then})
        if changed and not entry.skipped:
            lines = "\n".join(f"  {line}" for line in changed)
            raise CheckpointError(f"{entry.folder}: was made with another model section; {cure}:\n{lines}")
    prepare = inputs["prepare"]
    if prepare.summary.get("kind") in LABELLED_KINDS:
        raise ConfigError(
            f"{folder.root}: its model tells classes and generates nothing; the README.md of its export says how to "
            "ask it"
        )
    template = config.data.prompt_template
    if _TEMPLATE not in given:  # evaluate reads the prompts that prepare made, whatever the config says since
        template = prepare.manifest.config.get(_TEMPLATE, template)
    if prepare.summary.get("kind") == "text":
        template = "{dialogue}"  # it goes on with the text
    return Variant(name, config, {**inputs, "prepare": _found_today(prepare, config, given)}, template)


def _found_today(prepare: StageInput, config: RunConfig, given: Sequence[str]) -> StageInput:
    """With paths that hold here: those given, else from where prepare ran; and a base that it made moves along."""
    summary = dict(prepare.summary)
    own = prepare.manifest.artifacts.get("base_model")
    if own is None or not {"base_model", "tokenizer"} <= summary.keys():
        raise CheckpointError(
            f"{prepare.folder / 'manifest.json'}: does not say which base model was prepared; "
            "`hedgehog prepare CONFIG --force` writes it anew"
        )
    made, base = prepare.folder / own.path, summary["base_model"]
    for key in ("base_model", "tokenizer"):
        there = Path(prepare.manifest.directory, summary[key])
        if "model.tokenizer" in given and key == "tokenizer":
            summary[key] = config.model.tokenizer
        elif "model.base" in given and summary[key] == base:
            summary[key] = config.model.base
        elif made.is_dir() and summary[key] == base:
            summary[key] = str(made)
        elif prepare.manifest.directory and there.exists():
            summary[key] = str(there)
    return StageInput(prepare.folder, prepare.manifest.model_copy(update={"summary": summary}))


def answer(
    question: Question,
    variants: Sequence[Variant],
    *,
    begin: Callable[[str, str], None] = lambda name, label: None,
    say: Callable[[str], None] | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[Answer]:
    """Let each variant continue the question's prompt, one after the other.

    Args:
        begin: told a variant's name and label before its first words.
        say: given the text in pieces, as it comes.
        report: told which implementation of linear attention runs, and what should be noticed.

    Raises:
        ConfigError: an empty text, a temperature or seed that cannot be used, several processes.
        CheckpointError: an artifact was changed since its stage wrote it.
        ModelError, ResourceError: a model or device cannot be used, a model gives NaN, memory ends.
    """
    _check(question, variants)
    world = discover_world(variants[0].config.engine)
    if world.world_size > 1:
        raise ConfigError("one text is one process's work: start `hedgehog generate` without torchrun, in one task")
    for variant in variants:
        begin(variant.name, variant.label)
        try:
            yield _answer(variant, question, world, say, report)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(
                f"{variant.label}: out of memory ({str(error).splitlines()[0] if str(error) else 'host memory'}). What "
                "lowers it: a shorter text; fewer evaluate.num_beams; engine.precision=bfloat16; engine.device=cpu"
            ) from error


def _check(question: Question, variants: Sequence[Variant]) -> None:
    if not question.text.strip():
        raise ConfigError("the text is empty: give a dialogue with --text, --file or on standard input")
    temperature = question.temperature
    if temperature != 0 and not (math.isfinite(temperature) and temperature >= _COOLEST):
        raise ConfigError(f"--temperature {temperature}: give 0 (the most likely tokens) or {_COOLEST} and more")
    if temperature > 0 and any(variant.config.evaluate.num_beams > 1 for variant in variants):
        raise ConfigError("--temperature draws one text: it means nothing beside evaluate.num_beams above 1")
    if not 0 <= question.seed < 2**63:
        raise ConfigError(f"--seed {question.seed}: give a number from 0 to 2^63 - 1")


def _answer(
    variant: Variant,
    question: Question,
    world: World,
    say: Callable[[str], None] | None,
    report: Callable[[str], None],
) -> Answer:
    config = variant.config
    tokenizer = load_prepared_tokenizer(
        variant.inputs["prepare"], config.model, lambda message: report(f"warning: {message}")
    )
    text = question.text.replace("\r\n", "\n").replace("\r", "\n")
    prompt = text if question.raw else render_prompt(variant.prompt_template, text.strip())
    (prompt_ids,) = TextEncoder(tokenizer).prompts([prompt])
    model = load_variant_model(config, variant.inputs, world.device, config.engine.precision, report)
    settings = _generation_config(config, tokenizer, question.temperature)
    check_room(
        table_length(model.config), len(prompt_ids), config.evaluate.max_new_tokens, "the prompt", "a shorter text"
    )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(prompt_ids) + config.evaluate.max_new_tokens > limit:
        wanted = f"{len(prompt_ids)} tokens and up to {config.evaluate.max_new_tokens} new ones"
        report(f"warning: {wanted}, but the base model was made for {limit}")
    stream = TextStream(tokenizer, say) if settings.num_beams == 1 else None
    _warm_up(model, prompt_ids[-1:], settings)
    torch.manual_seed(question.seed)
    made_ids, seconds, state_bytes = _generate(model, prompt_ids, settings, stream)
    ended = settings.eos_token_id in made_ids
    num_new = made_ids.index(settings.eos_token_id) if ended else len(made_ids)
    decoded = tokenizer.decode(made_ids[:num_new], skip_special_tokens=True).strip()
    if stream is None and say is not None:
        say(decoded)
    first_token_s = None if stream is None else stream.first_token_s
    return Answer(
        variant=variant.name,
        label=variant.label,
        text=decoded,
        num_prompt_tokens=len(prompt_ids),
        num_new_tokens=num_new,
        truncated=not ended,
        seconds=seconds,
        first_token_s=first_token_s,
        tokens_per_s=_rate(len(made_ids) - 1, seconds, first_token_s),
        state_bytes=state_bytes,
    )


def _rate(num_tokens: int, seconds: float, first_token_s: float | None) -> float | None:
    if first_token_s is None or num_tokens < 1:
        return None
    return num_tokens / max(1e-9, seconds - first_token_s)


def _generation_config(config: RunConfig, tokenizer: Any, temperature: float) -> GenerationConfig:
    pad_id, _ = choose_pad_id(tokenizer)
    settings = make_generation_config(
        config.evaluate, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id, pad_id=pad_id
    )
    settings.return_dict_in_generate = True
    if temperature > 0:
        settings.do_sample, settings.temperature, settings.top_k = True, temperature, 0
    return settings


def _warm_up(model: PreTrainedModel, token_ids: Sequence[int], settings: GenerationConfig) -> None:
    """What the first tokens of a process take, threads to start and kernels to try, is not the model's time."""
    few = copy.deepcopy(settings)
    few.max_new_tokens = _NUM_WARM_UP_TOKENS
    few.min_new_tokens = min(few.min_new_tokens or 0, _NUM_WARM_UP_TOKENS)
    _generate(model, token_ids, few, None)


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, prompt_ids: Sequence[int], settings: GenerationConfig, stream: TextStream | None
) -> tuple[list[int], float, int]:
    """New token ids, seconds, and the bytes that were kept between two tokens at the end."""
    device = next(model.parameters()).device
    input_ids_BL = torch.tensor([prompt_ids], device=device)
    model.generation_config = settings  # or fields that are unset here would come from the base's own
    started = time.perf_counter()
    if stream is not None:
        stream.started = started
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=input_ids_BL,
        attention_mask=torch.ones_like(input_ids_BL),
        generation_config=settings,
        logits_processor=LogitsProcessorList([_RefuseNaN()]),
        streamer=stream,
    )
    new_ids = output.sequences[0, len(prompt_ids) :].tolist()  # waits for the device
    cache = output.past_key_values if "past_key_values" in output else output[CACHE_NAME]
    return new_ids, time.perf_counter() - started, sum(map(_num_bytes, cache.layers)) // settings.num_beams


class _RefuseNaN(LogitsProcessor):
    """Of NaN the largest is the first: a broken model would say the same token for ever, and look well."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if bool(scores.isnan().any()):
            raise ModelError(
                "the model gives NaN: its weights or feature maps hold NaN or overflow; look at its distill and "
                "finetune metrics"
            )
        return scores


def _num_bytes(layer: Any) -> int:
    if hasattr(layer, "num_bytes"):
        return layer.num_bytes()
    return sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))


__all__ = ["Answer", "Question", "Variant", "answer", "open_variants"]
