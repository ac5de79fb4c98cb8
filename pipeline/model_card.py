"""README.md of an exported model: what it is, how to load it, what was measured, whose licence applies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import LABELLED_KINDS, RunConfig
from .families import FAMILIES, lora_modules
from .formatting import code_span
from .model_shape import ModelShape
from .run_folder import atomic_write
from .score_table import comparison_lines

_HUB_ID_PARTS = 2
_MOST_LABELS = 20
"""More classes are not listed: config.json has them."""
_TAGS = {"dialogues": ["- summarization"], "text": [], **{kind: ["- text-classification"] for kind in LABELLED_KINDS}}


@dataclass(frozen=True)
class CardFacts:
    """What the card reports beside the config."""

    family: type[ModelShape]
    """The base model's."""
    drift: Mapping[str, Any]
    licence_files: Sequence[str]
    tokenizer_adds_bos: bool
    """Whether calling the tokenizer gives the tokens of training; if not, the example adds BOS itself."""
    kl_mean_nats: float | None
    scores: Mapping[str, Any] | None
    """rouge.json's entry of this variant, or None where evaluate has not scored these weights."""
    baseline: Mapping[str, Any] | None
    """rouge.json's entry of the softmax baseline, if there is one."""
    num_examples: int | None
    dtype: str
    label_names: Sequence[str] = ()
    """Of rows to classify: the classes, by their number; of rows to score one name."""


def write_model_card(folder: Path, config: RunConfig, facts: CardFacts) -> None:
    """Write README.md."""
    linear = config.model.attention == "linear"
    sections = [
        _front_matter(config, linear),
        _introduction(config, facts, linear),
        _usage(config, facts, linear),
        _scores(facts),
        _training(config, facts, linear),
        _drift(facts),
        _licence(config, facts),
    ]
    atomic_write(folder / "README.md", "\n\n".join(sections) + "\n")


def base_name(config: RunConfig) -> str:
    """What the run starts from: a hub id, a folder's name, or what `prepare` makes."""
    if config.tiny is not None:
        family = FAMILIES[config.tiny.architecture]
        learned = "trained on generated questions" if family.is_encoder else "pretrained on generated dialogues"
        return f"a small {family.title} {learned}"
    return short_name(config.model.base or "a base model")


def short_name(folder_or_id: str) -> str:
    """A hub id as it is; of a local folder only its name, because its path means nothing elsewhere."""
    folder = Path(folder_or_id).expanduser()
    return folder.resolve().name if folder.is_dir() else folder_or_id


def _front_matter(config: RunConfig, linear: bool) -> str:
    task = "text-classification" if config.data.is_labelled else "text-generation"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    name = base_name(config)
    if len(name.split("/")) == _HUB_ID_PARTS:
        lines.append(f"base_model: {name}")
    if config.tiny is None:
        lines += ["license: other", "license_name: licence-of-the-base-model"]
    lines += ["tags:", *_TAGS[config.data.kind]]
    if linear:
        lines += ["- linear-attention", "- hedgehog"]
    return "\n".join([*lines, "---"])


def _introduction(config: RunConfig, facts: CardFacts, linear: bool) -> str:
    base = base_name(config)
    classified = "texts" if config.data.second_text_field is None and config.tiny is None else "pairs of texts"
    purpose = {
        "dialogues": "summarize dialogues",
        "text": "go on with text",
        "classification": f"classify {classified}",
        "regression": f"score {classified}",
    }[config.data.kind]
    state = "" if config.data.is_labelled else ", and the decoding state has a constant size"
    if not linear:
        how, which = ("finetuned with LoRA", "the") if config.finetune.enabled else ("as it was", "a")
        return (
            f"# {config.name}\n\n{base} with its softmax attention, {how}, to {purpose}: {which} baseline of a "
            f"{facts.family.hedgehog_title} conversion. A plain {facts.family.title}."
        )
    return (
        f"# {config.name}\n\nA {facts.family.hedgehog_title}: {base} with every softmax attention replaced by learned "
        f"linear attention (feature map `{config.model.feature_map}`) that imitates it, made to {purpose}. "
        f"Cost grows linearly with length{state}. Method: Zhang, Bhatia, Kumbong, "
        'Ré, "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (2024).'
    )


def _usage(config: RunConfig, facts: CardFacts, linear: bool) -> str:
    code = _code_that_tells(config, linear) if config.data.is_labelled else _code_that_generates(config, facts, linear)
    text = "## How to use it\n\n```python\n" + "\n".join(code) + "\n```"
    if facts.label_names and config.data.kind == "classification":
        shown = ", ".join(code_span(name) for name in facts.label_names[:_MOST_LABELS])
        more = len(facts.label_names) - _MOST_LABELS
        text += f"\n\nLabels: {shown}" + (f" and {more} more, which `config.json` lists." if more > 0 else ".")
    if linear:
        text += "\n\nThe modeling files beside the weights need torch and transformers (5.17 to 5.24) only."
    return text


def _code_that_tells(config: RunConfig, linear: bool) -> list[str]:
    trust = ", trust_remote_code=True" if linear else ""
    asked, answer = "to classify", "model.config.id2label[logits.argmax().item()]"
    if config.data.kind == "regression":
        asked, answer = "to score", "logits.item()"
    pair = ', "the text beside it"' if config.data.second_text_field is not None or config.tiny is not None else ""
    return [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its hub id',
        f'model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto"{trust})',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f'longest = {{"truncation": True, "max_length": {config.data.max_length_tokens}}}',
        f'inputs = tokenizer("the text {asked}"{pair}, return_tensors="pt", **longest)',
        "logits = model(**inputs).logits",
        f"print({answer})",
    ]


def _code_that_generates(config: RunConfig, facts: CardFacts, linear: bool) -> list[str]:
    trust = ", trust_remote_code=True" if linear else ""
    prompt = ['prompt = "Once upon a time"']
    if config.data.kind == "dialogues":
        template = json.dumps(config.data.prompt_template, ensure_ascii=False)
        said = '    "{dialogue}", "Ann: Lunch at one? Bob: Yes, see you there!"'
        prompt = [f"prompt = {template}.replace(", said, ")"]
    bos = "" if facts.tokenizer_adds_bos else "tokenizer.bos_token + "
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its hub id',
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        *prompt,
        f'inputs = tokenizer({bos}prompt, return_tensors="pt", return_token_type_ids=False)',
        f"output = model.generate(**inputs, max_new_tokens={config.evaluate.max_new_tokens})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _scores(facts: CardFacts) -> str:
    title = "## Scores\n\n"
    if facts.scores is None:
        return title + "Not measured: these weights had not been scored by `hedgehog evaluate` when they were exported."
    if facts.scores["all"].get("accuracy") is not None:
        return title + _scores_of_classes(facts, facts.scores)
    if facts.scores["all"].get("pearson") is not None:
        return title + _correlations(facts, facts.scores)
    entries = [facts.scores] + ([facts.baseline] if facts.baseline is not None else [])
    has_rouge = facts.scores["all"].get("rouge1") is not None
    columns = ["ROUGE-1 (95 % interval)", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"] * has_rouge
    columns += ["loss (nats a token)", "perplexity"]
    lines = ["| | " + " | ".join(columns) + " |", "|:--|" + "--:|" * len(columns)]
    for entry in entries:
        scores = entry["all"]
        cells = [entry["label"]]
        if has_rouge:
            cells += [_with_interval(scores["rouge1"])]
            cells += [f"{scores[key]['value']:.2f}" for key in ("rouge2", "rougeL", "rougeLsum")]
        cells += [
            f"{scores[key]['value']:{form}}" if key in scores else "–"
            for key, form in (("loss_nats_per_token", ".4f"), ("perplexity", ".2f"))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ratio = facts.scores["all"].get("rouge1_ratio")
    what = "test dialogues, ROUGE F1 x 100 with stemming" if has_rouge else "test rows of text, each read by itself"
    sentence = f"Unmerged weights, {facts.num_examples} {what}."
    if ratio is not None and facts.baseline is not None:
        sentence += f" ROUGE-1 is {ratio['value']:.1%} of {facts.baseline['label']}'s."
    return title + "\n".join(lines) + "\n\n" + sentence


def _scores_of_classes(facts: CardFacts, scores: Mapping[str, Any]) -> str:
    lines = ["| | accuracy (95 % interval) | F1 | MCC | loss (nats a row) |", "|:--|--:|--:|--:|--:|"]
    for entry in [scores] + ([facts.baseline] if facts.baseline is not None else []):
        figures = entry["all"]
        cells = [entry["label"].replace("|", "\\|"), _with_interval(figures["accuracy"])]
        cells += [f"{figures[key]['value']:{form}}" for key, form in _CLASS_FIGURES]
        lines.append("| " + " | ".join(cells) + " |")
    f1 = f"that of {code_span(facts.label_names[1])}" if len(facts.label_names) == 2 else "the mean over the classes"
    sentence = f"Unmerged weights, {facts.num_examples} test rows. All but the loss × 100; F1 is {f1}, MCC is Matthews "
    sentence += "correlation."
    return "\n".join(lines) + "\n\n" + sentence + _compared(facts, scores)


def _correlations(facts: CardFacts, scores: Mapping[str, Any]) -> str:
    lines = ["| | Pearson (95 % interval) | Spearman | squared error |", "|:--|--:|--:|--:|"]
    for entry in [scores] + ([facts.baseline] if facts.baseline is not None else []):
        figures = entry["all"]
        cells = [entry["label"].replace("|", "\\|"), _with_interval(figures["pearson"])]
        cells += [f"{figures['spearman']['value']:.2f}", f"{figures['mean_squared_error']['value']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    sentence = (
        f"Unmerged weights, {facts.num_examples} test rows. Correlations of the given with the rows' scores × 100."
    )
    return "\n".join(lines) + "\n\n" + sentence + _compared(facts, scores)


def _compared(facts: CardFacts, scores: Mapping[str, Any]) -> str:
    """One sentence for the softmax baseline, where there is one."""
    if facts.baseline is None:
        return ""
    lines = comparison_lines({"this": scores, "baseline": facts.baseline}, "baseline")
    return "".join(f" {line}." for line in lines)


_CLASS_FIGURES = (("f1", ".2f"), ("mcc", ".2f"), ("loss_nats_per_row", ".4f"))


def _with_interval(figure: Mapping[str, float | None]) -> str:
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _training(config: RunConfig, facts: CardFacts, linear: bool) -> str:
    lines = ["## How it was made", ""]
    if linear:
        dimension = config.model.feature_dim or "head_dim"
        lines.append(
            f"- Feature map `{config.model.feature_map}`, feature_dim {dimension}, one map for each query head."
        )
        kl = (
            ""
            if facts.kl_mean_nats is None
            else f" Mean KL from softmax attention: {facts.kl_mean_nats:.4f} nats (mean over tokens, heads and layers)."
        )
        how = "trained to reproduce the attention weights" if config.distill.enabled else "left at their start"
        lines.append(f"- Stage one: the maps were {how}.{kl}")
    lora = config.finetune.lora
    modules = lora_modules(lora, facts.family)
    if config.finetune.enabled:
        along = ["maps"] * (linear and config.finetune.train_feature_maps)
        along += ["head"] * config.data.is_labelled
        maps = f" The {' and the '.join(along)} trained along." if along else ""
        lines.append(
            f"- Stage two: LoRA, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(modules)}; merged in "
            f"float32.{maps}"
        )
    else:
        lines.append("- No finetuning.")
    if config.model.quantization is not None:
        lines.append(
            f"- The frozen weights were quantized to {config.model.quantization} while training; here they are "
            "dequantized, so they are what the adapter was trained on and not the base model's original weights."
        )
    lines.append(f"- Weights: {facts.dtype}" + ("; feature maps: float32." if linear else "."))
    return "\n".join(lines)


def _drift(facts: CardFacts) -> str:
    drift = facts.drift
    if facts.label_names:
        differ = "scores" if len(facts.label_names) == 1 else "logits"
        compared = (
            "## Merged against unmerged\n\n"
            "Reloaded in a fresh process with plain transformers and compared with the unmerged model on test rows: "
            f"{differ} differ by at most {drift['logits_max_abs']:.3g} (mean {drift['logits_mean_abs']:.3g}, relative "
            f"{drift['logits_relative']:.3g})"
        )
        if len(facts.label_names) == 1:
            return f"{compared}, on {drift['num_positions']} rows."
        return compared + (
            f", KL of the classes {drift['kl_mean_nats']:.3g} nats, the same class for "
            f"{drift['equal_argmax_share']:.1%} of {drift['num_positions']} rows."
        )
    return (
        "## Merged against unmerged\n\n"
        "Reloaded in a fresh process with plain transformers and compared with the unmerged model on test rows: logits "
        f"differ by at most {drift['logits_max_abs']:.3g} (mean {drift['logits_mean_abs']:.3g}, relative "
        f"{drift['logits_relative']:.3g}), next-token KL {drift['kl_mean_nats']:.3g} nats, equal argmax at "
        f"{drift['equal_argmax_share']:.1%} of {drift['num_positions']} positions, equal greedy tokens "
        f"{drift['equal_generated_share']:.1%} of {drift['num_generated_tokens']}."
    )


def _licence(config: RunConfig, facts: CardFacts) -> str:
    if config.tiny is not None:
        return "## Licence\n\nMade from generated data only: no base model's licence applies."
    base = base_name(config)
    text = f"## Licence\n\nThe weights derive from {base}: its licence stays with them{facts.family.licence}."
    if facts.licence_files:
        return text + f" It lies beside the weights: {', '.join(f'`{name}`' for name in facts.licence_files)}."
    return text + " No licence file lay beside the base model's weights; add it before you pass these weights on."
