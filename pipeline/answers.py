"""What a run's variants make of a text of the user's own: the work of `hedgehog generate`.

The model is the one that `evaluate` scores: base weights, feature maps and adapter as `finetune` left them, unmerged.
It reads the prompt at once and then one token at a time, with the constant state of linear attention, or the growing
cache of softmax attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from .attempt import open_input
from .config_loading import apply_variant, config_differences, flatten, load_config
from .data.tokenize import TextEncoder, choose_pad_id, load_tokenizer, render_prompt
from .distributed import discover_world
from .errors import CheckpointError, ConfigError
from .generation import make_generation_config
from .llama.hedgehog_cache import CACHE_NAME
from .manifest import StageInput
from .run_folder import RunFolder
from .status import find_run_folder
from .variants import load_variant_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from .config import RunConfig
    from .distributed import World

MAIN = "main"
"""The name of the conversion itself among its variants."""
_CONSUMES = ("prepare", "distill", "finetune")


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
    """From the prompt to the last token."""
    first_token_s: float | None
    """Until the first new token, the prompt's reading. None with beams, which have no first one."""
    state_bytes: int
    """What was kept between the last tokens: the state of linear attention, or softmax attention's keys and values."""


@dataclass(frozen=True)
class Question:
    """A text, and how to answer it."""

    text: str
    raw: bool = False
    """The text is the whole prompt; else it is a dialogue, and goes into `data.prompt_template`."""
    temperature: float = 0.0
    """0: the most likely tokens, or beams, as `evaluate` does."""
    seed: int = 0


def answer(
    run: str,
    question: Question,
    *,
    variants: Sequence[str] = (),
    overrides: Sequence[str] = (),
    begin: Callable[[str, str], None] = lambda name, label: None,
    say: Callable[[str], None] = lambda piece: None,
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[Answer]:
    """Let each variant of a run continue the question's prompt, one after the other.

    Args:
        run: a run folder, its name under `runs/`, or a YAML that names it.
        variants: their names; "main" is the conversion itself, and what is taken where none is given.
        overrides: `section.key=value` over the run's config: evaluate.max_new_tokens, engine.device …
        begin: told a variant's name and label before its first words.
        say: given the text in pieces, as it comes.
        report: told which implementation of linear attention runs, and what should be noticed.

    Raises:
        ConfigError: no such run or variant, an empty text, a wrong override, several processes.
        CheckpointError: a stage that is needed is not finished, was made with another config, or was changed since.
        ModelError, ResourceError: a model or device cannot be used.
    """
    if not question.text.strip():
        raise ConfigError("the text is empty: give a dialogue with --text, --file or on standard input")
    folder = RunFolder(find_run_folder(run))
    if not folder.config_file.is_file():
        raise ConfigError(f"{folder.root}: has no {folder.config_file.name}; run `hedgehog prepare CONFIG` first")
    config = load_config(folder.config_file, overrides)
    conversions = {name: _conversion(config, name) for name in dict.fromkeys(variants or [MAIN])}
    if question.temperature > 0 and any(each.evaluate.num_beams > 1 for each in conversions.values()):
        raise ConfigError("--temperature draws one text: it means nothing beside evaluate.num_beams above 1")
    world = discover_world(config.engine)
    if world.world_size > 1:
        raise ConfigError("one text is one process's work: start `hedgehog generate` without torchrun, in one task")
    opened = {name: _open(folder, name, conversion) for name, conversion in conversions.items()}
    for name, inputs in opened.items():
        begin(name, conversions[name].label or name)
        yield _answer(conversions[name], inputs, name, question, world, say, report)


def _conversion(config: RunConfig, name: str) -> RunConfig:
    if name == MAIN:
        return config
    if name not in config.variants:
        known = ", ".join([MAIN, *config.variants])
        raise ConfigError(f"--variant {name}: there is no such variant in {config.name} (there are: {known})")
    return apply_variant(config, name)


def _open(folder: RunFolder, name: str, config: RunConfig) -> dict[str, StageInput]:
    """The finished stages behind a variant, made with this very model section."""
    inputs = {stage: open_input(folder, stage, None if name == MAIN else name) for stage in _CONSUMES}
    now = flatten(config)
    for entry in inputs.values():
        then = {key: value for key, value in entry.manifest.config.items() if key.startswith("model.")}
        changed = config_differences(then, {key: now.get(key) for key in then})
        if changed and not entry.skipped:
            lines = "\n".join(f"  {line}" for line in changed)
            raise CheckpointError(f"{entry.folder}: this stage was made with another model section:\n{lines}")
    return inputs | {"prepare": _found_from_here(inputs["prepare"])}


def _found_from_here(prepare: StageInput) -> StageInput:
    """With paths that hold here: those given may be relative to where prepare ran, and a base it made moves along."""
    made, summary = prepare.folder / prepare.manifest.artifacts["base_model"].path, dict(prepare.summary)
    for key in ("base_model", "tokenizer"):
        given, there = prepare.summary[key], Path(prepare.manifest.directory, prepare.summary[key])
        if made.is_dir() and given == prepare.summary["base_model"]:
            summary[key] = str(made)
        elif not Path(given).exists() and there.exists():
            summary[key] = str(there)
    return StageInput(prepare.folder, prepare.manifest.model_copy(update={"summary": summary}))


def _answer(
    config: RunConfig,
    inputs: Mapping[str, StageInput],
    name: str,
    question: Question,
    world: World,
    say: Callable[[str], None],
    report: Callable[[str], None],
) -> Answer:
    summary = inputs["prepare"].summary
    tokenizer = load_tokenizer(
        summary["tokenizer"], revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    text = question.text.replace("\r\n", "\n").replace("\r", "\n")
    prompt = text if question.raw else render_prompt(config.data.prompt_template, text.strip())
    (prompt_ids,) = TextEncoder(tokenizer).prompts([prompt])
    model = load_variant_model(config, inputs, world.device, config.engine.precision, report)
    settings = _generation_config(config, tokenizer, question.temperature)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(prompt_ids) + config.evaluate.max_new_tokens > limit:
        wanted = f"{len(prompt_ids)} tokens and up to {config.evaluate.max_new_tokens} new ones"
        report(f"warning: {wanted}, but the base model was made for {limit}")
    words = WordStream(tokenizer, say) if settings.num_beams == 1 else None
    torch.manual_seed(question.seed)
    new_ids, seconds, state_bytes = _generate(model, prompt_ids, settings, words)
    ended = settings.eos_token_id in new_ids
    if ended:
        new_ids = new_ids[: new_ids.index(settings.eos_token_id)]
    decoded = tokenizer.decode(new_ids, skip_special_tokens=True).strip()
    if words is None:
        say(decoded)
    return Answer(
        variant=name,
        label=config.label or name,
        text=decoded,
        num_prompt_tokens=len(prompt_ids),
        num_new_tokens=len(new_ids),
        truncated=not ended,
        seconds=seconds,
        first_token_s=None if words is None else words.first_token_s,
        state_bytes=state_bytes,
    )


def _generation_config(config: RunConfig, tokenizer: Any, temperature: float) -> GenerationConfig:
    pad_id, _ = choose_pad_id(tokenizer)
    settings = make_generation_config(
        config.evaluate, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id, pad_id=pad_id
    )
    settings.return_dict_in_generate = True
    if temperature > 0:
        settings.do_sample, settings.temperature, settings.top_k = True, temperature, 0
    return settings


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, prompt_ids: Sequence[int], settings: GenerationConfig, words: WordStream | None
) -> tuple[list[int], float, int]:
    """New token ids, seconds, and the bytes that were kept between two tokens at the end."""
    device = next(model.parameters()).device
    input_ids_BL = torch.tensor([prompt_ids], device=device)
    model.generation_config = settings  # or fields that are unset here would come from the base's own
    started = time.perf_counter()
    if words is not None:
        words.started = started
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=input_ids_BL,
        attention_mask=torch.ones_like(input_ids_BL),
        generation_config=settings,
        streamer=words,
    )
    new_ids = output.sequences[0, len(prompt_ids) :].tolist()  # waits for the device
    cache = output.past_key_values if "past_key_values" in output else output[CACHE_NAME]
    return new_ids, time.perf_counter() - started, sum(map(_num_bytes, cache.layers)) // settings.num_beams


def _num_bytes(layer: Any) -> int:
    if hasattr(layer, "num_bytes"):
        return layer.num_bytes()
    return sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))


class WordStream(BaseStreamer):
    """Says a text word by word as its tokens come, without the blanks around it. Keeps the time of the first token."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._token_ids: list[int] | None = None
        """None until the prompt has passed."""
        self._said = ""
        self.started = 0.0
        self.first_token_s: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._token_ids is None:
            self._token_ids = []
            return
        self._token_ids += value.flatten().tolist()
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.started
        text = self._decode()
        # the last word may be half of one, or half of a character
        self._say_more(text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip())

    def end(self) -> None:
        self._say_more(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=True).strip()

    def _say_more(self, text: str) -> None:
        if text.startswith(self._said) and text != self._said:
            self._say(text[len(self._said) :])
            self._said = text


__all__ = ["MAIN", "Answer", "Question", "WordStream", "answer"]
