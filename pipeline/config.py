"""One YAML is one run. The schema of that YAML: frozen pydantic models, a docstring under every field.

Unknown keys are errors (`extra="forbid"`); loading, overriding and reporting live in `config_loading.py`.
Lengths are counted in tokens, sizes of batches in sequences, unless a name says otherwise.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .config_section import Section, combination_error
from .formatting import parse_bytes
from .slurm_config import SlurmConfig

LAYERS_PATTERN = r"\d+(-\d+)?(,\d+(-\d+)?)*"


class ModelConfig(Section):
    """The base model and the attention that replaces its softmax."""

    base: str | None = None
    """Hub id or local folder of a Llama, GPT-2 or BERT. Null only where the `tiny` section builds one."""
    tokenizer: str | None = None
    """Hub id or local folder of the tokenizer. Null: the base model's own."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of base and tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer. Code of the base model is never run, whatever stands here."""
    attention: Literal["linear", "softmax"] = "linear"
    """`linear`: Hedgehog. `softmax`: leave the attention as it is (the baseline)."""
    feature_map: str = "hedgehog_softmax"
    """Name in `hedgehog.kernels.feature_maps.FEATURE_MAPS`."""
    feature_dim: int | None = Field(default=None, ge=1)
    """Width of the learned map W (head_dim x feature_dim) before ± concatenation. Null: head_dim."""
    feature_map_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that feature map (see its docstring)."""
    attention_eps: float = Field(default=1e-30, gt=0, le=1e-2)
    """Added to the denominator of linear attention."""
    chunk_size: int = Field(default=64, ge=16, le=1024)
    """Tokens per chunk of the chunked linear attention."""
    attention_backend: Literal["auto", "torch"] = "auto"
    """Implementation of linear attention and of the loss that distills it; `auto` takes the fastest that works and
    logs why. `torch`: none of this project's GPU kernels."""
    quantization: Literal["nf4", "int8"] | None = None
    """Quantize the frozen base weights (bitsandbytes). Null: keep them in `engine.precision`."""


LABELLED_KINDS = ("classification", "regression")
"""Values of `data.kind` for rows of a text, or of a pair, and its label."""


class DataConfig(Section):
    """Rows of text, and how they become tokens."""

    kind: Literal["dialogues", "text", "classification", "regression"] = "dialogues"
    """`dialogues`: rows of a dialogue and its summary. `text`: running text, cut into rows of `max_length_tokens`; both
    stages learn on it, and `evaluate` measures its perplexity. A BERT needs, and only a BERT has: `classification`:
    rows of a text, or of a pair, and its class, which `evaluate` counts right or wrong; or `regression`: and its score,
    with which `evaluate` correlates those that the model gives."""
    dataset: str | None = None
    """Hub id, or a folder with train, validation (val, valid) and test files (.json, .jsonl; of text also .txt; of
    labelled rows also .tsv and .csv, and dev for validation). Instead of the files below."""
    dataset_config: str | None = None
    """Which of its configurations, where a dataset on the hub has several."""
    validation_split: str | None = None
    """Which split of `dataset` is for validation, by its file's name in a folder. Null: `validation`, unless it is the
    `test_split`: then some of train."""
    test_split: str | None = None
    """Which split of `dataset` `evaluate` scores, likewise. Null: `test`. Take `validation` where the labels of test
    are kept secret, as in GLUE."""
    train_file: str | None = None
    """JSON (a list of objects) or JSONL file of training rows; of text also a file of plain text, of labelled rows
    a .tsv or .csv whose first line names its columns."""
    validation_file: str | None = None
    """Rows for KL and loss while training. Null: `num_validation_examples` are held out of train."""
    test_file: str | None = None
    """Rows that `evaluate` scores."""
    id_field: str = "id"
    """Key of a row's identifier (rows without one are numbered)."""
    dialogue_field: str = "dialogue"
    """Key of the dialogue text."""
    summary_field: str = "summary"
    """Key of the reference summary."""
    text_field: str = "text"
    """Key of the text, where `kind` is not dialogues."""
    second_text_field: str | None = None
    """Key of a pair's second text, where rows are labelled. Null: single texts."""
    label_field: str = "label"
    """Key of the class (text, or a whole number), or of the score (a number)."""
    text_end: Literal["eos", "nothing"] = "eos"
    """What stands behind each text, of which a plain file is one; `nothing` where the rows of a JSON file or of the hub
    are lines of a single text."""
    prompt_template: str = "Summarize this dialogue.\n{dialogue}\n---\nSummary:\n"
    """Text before the summary; must contain {dialogue} exactly once."""
    max_length_tokens: int = Field(default=1024, ge=16)
    """Longest prompt + summary, or labelled text. Longer rows follow `overlong`. Rows of text have this length."""
    overlong: Literal["drop", "truncate_dialogue", "truncate"] = "drop"
    """A longer row is dropped, or cut at its end: its dialogue (`truncate_dialogue`; a summary is never cut), or the
    labelled text (`truncate`; of a pair the longer one). Both are counted."""
    num_validation_examples: int = Field(default=200, ge=1)
    """Held out of train when there is no validation file; at most this many are used for validation otherwise."""
    max_train_examples: int | None = Field(default=None, ge=1)
    """Use a seeded sample of this many training rows. Null: all."""
    max_test_examples: int | None = Field(default=None, ge=1)
    """Use the first this many test rows. Null: all."""
    drop_train_duplicates: bool = True
    """Drop training rows whose dialogue and summary, or texts and label, repeat an earlier row word for word."""

    @property
    def is_labelled(self) -> bool:
        """Whether rows are texts with a class or a score, which an encoder learns to tell."""
        return self.kind in LABELLED_KINDS

    @field_validator("prompt_template")
    @classmethod
    def _template_has_one_dialogue(cls, value: str) -> str:
        if value.count("{dialogue}") != 1:
            raise ValueError("must contain {dialogue} exactly once")
        return value


class TinyConfig(Section):
    """Inputs that `prepare` makes itself: a dialogue corpus, a tokenizer and a small model pretrained on it."""

    architecture: Literal["llama", "gpt2", "bert"] = "llama"
    """Family of the model: `llama` with a sentencepiece tokenizer, `gpt2` with a byte-level BPE, or, where `data.kind`
    is classification, `bert` with WordPiece: trained to answer questions about the dialogues."""

    num_train_dialogues: int = Field(default=4000, ge=10)
    """Generated training rows."""
    num_validation_dialogues: int = Field(default=100, ge=1)
    """Generated validation rows."""
    num_test_dialogues: int = Field(default=100, ge=1)
    """Generated test rows."""
    vocab_size: int = Field(default=1024, ge=300)
    """Pieces of the tokenizer."""
    hidden_size: int = Field(default=128, ge=16)
    """Width of the model."""
    num_layers: int = Field(default=4, ge=1)
    """Layers."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(default=2, ge=1)
    """Key/value heads (fewer than num_heads: grouped-query attention). A GPT-2 or BERT has as many as query heads."""
    intermediate_size: int = Field(default=384, ge=16)
    """Width of the MLP."""
    pretrain_steps: int = Field(default=600, ge=1)
    """Optimizer steps of pretraining on the dialogues."""
    pretrain_batch_size: int = Field(default=16, ge=1)
    """Sequences a step."""
    pretrain_learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyConfig:
        if self.architecture in ("gpt2", "bert"):
            usual = type(self).model_fields["num_key_value_heads"].default  # what stands there when nobody asked
            if self.num_key_value_heads not in (usual, self.num_heads):
                raise combination_error(
                    f"a {self.architecture} has as many as query heads: leave it out",
                    *("num_key_value_heads", "architecture"),
                )
            if self.hidden_size % self.num_heads:
                raise combination_error("must be a multiple of num_heads", "hidden_size", "num_heads")
        elif self.hidden_size % self.num_heads or self.num_heads % self.num_key_value_heads:
            raise combination_error(
                "must be a multiple of num_heads, and num_heads of num_key_value_heads",
                *("hidden_size", "num_heads", "num_key_value_heads"),
            )
        return self


class ScheduleConfig(Section):
    """What both training stages share: batches, steps and the learning rate's course."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows. Ignored where `max_steps` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Null: from `epochs`."""
    global_batch_size: int = Field(default=8, ge=1)
    """Sequences an optimizer step, over all processes and accumulation."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences a process runs at once. global_batch_size must be a multiple of micro_batch_size x world size."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course after warm-up; cosine and linear end at `min_lr_ratio` of the peak."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate over the peak."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps with a linearly rising rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta2: float = Field(default=0.99, gt=0, lt=1)
    """AdamW's second-moment decay (beta1 is 0.9)."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm (distill: per layer and micro-batch, so that layers stay independent). Null: none."""
    packing: bool = False
    """Join rows into sequences of `data.max_length_tokens`, attention and state reset at their borders."""
    save_every_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last two and the best are kept."""
    eval_every_steps: int | None = Field(default=None, ge=1)
    """Steps between validations. Null: only at the end."""
    log_every_steps: int = Field(default=1, ge=1)
    """Steps between progress lines (metrics.jsonl has every step)."""


class DistillConfig(ScheduleConfig):
    """Stage one: feature maps learn to reproduce the frozen softmax attention, layer by layer."""

    enabled: bool = True
    """False: the maps stay at their start (T2R's recipe: they learn in stage two only). The KL is still measured."""
    layers: str | None = None
    """Subset such as `8-15` or `0,2,5-7`. Null: all. Subsets are joined by `hedgehog merge`."""
    cross_entropy_weight: float = Field(default=1.0, ge=0)
    """Weight of the soft cross-entropy between attention weights (Hedgehog's loss)."""
    output_mse_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error between attention outputs (LoLCATs' loss), relative to the outputs' variance."""
    loss_eps: float = Field(default=1e-6, gt=0, le=1e-2)
    """epsilon of s' = s + eps in the loss: keeps a gradient where the student's similarity is zero."""
    query_block: int = Field(default=64, ge=16)
    """Query rows a tile of the loss."""
    query_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the query rows that the loss looks at in a step, drawn anew each time: less work where rows are long,
    and worse maps for as many steps (README: 0.05 to 0.08 nats of KL for each halving)."""
    cache_hidden_states: bool = False
    """Keep the hidden states that enter the first trained layer on disk, in the stage's folder until it is done, so
    that the layers below it run once per row and not in every epoch. Helps a subset of `layers` that begins above layer
    0, from the second epoch on. Takes tokens x hidden size x bytes of `engine.precision`: 8 KiB a token for Llama-2 7B
    in bfloat16. `validate` tells the size; slurm/README.md has a measurement."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_ranges(cls, value: Any) -> Any:
        """YAML reads a single layer as a number."""
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            value = value.replace(" ", "")
            if not re.fullmatch(LAYERS_PATTERN, value):
                raise ValueError("expected layers such as 8-15 or 0,2,5-7")
            for span in value.split(","):
                first, _, last = span.partition("-")
                if last and int(last) < int(first):
                    raise ValueError(f"the range {span} runs backwards")
        return value

    @model_validator(mode="after")
    def _some_objective(self) -> DistillConfig:
        if self.cross_entropy_weight + self.output_mse_weight <= 0:
            raise combination_error(
                "this and output_mse_weight cannot both be 0", "cross_entropy_weight", "output_mse_weight"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(default=8, ge=1)
    """r."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: tuple[str, ...] | None = None
    """Linear modules that get an adapter. Null: the attention's projections (a Llama's q_proj, k_proj, v_proj
    and o_proj, a GPT-2's c_attn and attn.c_proj, a BERT's query, key, value and attention.output.dense)."""


class FinetuneConfig(ScheduleConfig):
    """Stage two: LoRA on the summaries, loss on their tokens only; on text or labels, as `data.kind` says."""

    enabled: bool = True
    """False: evaluate and export the model without an adapter (zero-shot)."""
    lora: LoraConfig = LoraConfig()
    """The adapter."""
    train_feature_maps: bool = True
    """Let the feature maps learn along with the adapter."""
    feature_map_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the feature maps. Null: `learning_rate`."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit`: bitsandbytes' 8-bit AdamW."""
    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""


class EvaluateConfig(Section):
    """Stage three: generate on the test rows, ROUGE, perplexity of the references; or what `data.kind` asks for."""

    batch_size: int = Field(default=16, ge=1)
    """Dialogues generated together (left-padded), or rows classified together."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest generated summary."""
    num_beams: int = Field(default=1, ge=1)
    """1: greedy."""
    min_new_tokens: int = Field(default=1, ge=0)
    """Shortest generated summary."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """Forbid repeating n-grams of this size. 0: allow."""
    bootstrap_samples: int = Field(default=1000, ge=0)
    """Resamples for the 95 % intervals. 0: none."""
    perplexity: bool = True
    """Also measure the loss on the reference summaries."""


class ExportConfig(Section):
    """Stage four: one folder that plain transformers loads."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the written weights (feature maps stay float32)."""
    max_shard_size: str = "5GB"
    """Largest weight file: a number and B, KB, MB, GB, TB (in 1000s) or KiB, MiB, GiB, TiB (in 1024s)."""
    max_logit_drift: float | None = Field(default=None, gt=0)
    """Fail when merged and unmerged logits differ by more than this (max absolute). Null: report only."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+(/[\w.-]+)?$", max_length=96)
    """Repository id (owner/name) to upload the folder to. Null: never."""

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        parse_bytes(value)
        return value


class EngineConfig(Section):
    """DeepSpeed and the machine."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: 1 shards optimizer states, 2 also gradients, 3 also the weights."""
    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON merged over what this section makes (for experts). Relative to the config file."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of frozen weights and activations. Feature maps, adapters and optimizer stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda where torch finds it."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of a process on a CPU. Null: OMP_NUM_THREADS where a process alone has it set, else cores / processes."""


class LoggingConfig(Section):
    """What is written besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write TensorBoard event files beside metrics.jsonl."""


class VariantConfig(Section):
    """A baseline converted beside the main run and scored in the same table: dotted keys over the main config."""

    label: str | None = None
    """Name in the table. Null: the variant's key."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """For example {model.attention: softmax}. Only sections model, distill and finetune may differ."""


class RunConfig(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder: letters, digits and . _ - behind a letter or digit."""
    output_dir: str = "runs"
    """Folder that holds the run folders, relative to the working directory."""
    seed: int = Field(default=0, ge=0)
    """Seed of every named random generator."""
    label: str | None = None
    """Name of the main conversion in tables. Null: `main`."""
    model: ModelConfig = ModelConfig()
    """Base model and attention."""
    data: DataConfig = DataConfig()
    """Dataset and tokenization."""
    tiny: TinyConfig | None = None
    """Make the inputs (corpus, tokenizer, model) instead of reading them."""
    distill: DistillConfig = DistillConfig()
    """Stage one."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Stage two."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Stage three."""
    export: ExportConfig = ExportConfig()
    """Stage four."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed, precision, device."""
    logging: LoggingConfig = LoggingConfig()
    """TensorBoard."""
    slurm: SlurmConfig = SlurmConfig()
    """What `hedgehog submit` asks of Slurm. Without effect on any result."""
    variants: dict[str, VariantConfig] = Field(default_factory=dict)
    """Baselines for the table, by name."""

    @field_validator("seed")
    @classmethod
    def _seed_fits_a_generator(cls, value: int) -> int:
        if value >= 2**63:
            raise ValueError("must be below 2^63")
        return value
