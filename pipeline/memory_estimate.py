"""An estimate of each stage's peak memory on one GPU (or in one process on a CPU), term by term.

It is an estimate: it counts the large tensors that the stages are known to hold at their peak, not the allocator's
fragments or a library's scratch. Every term has a name and its formula. Sizes in the formulas:

    W weights of the base, p bytes of `engine.precision` (4 or 2), n processes (GPUs), B micro-batch, T longest row,
    L layers, E hidden size, I MLP width, H query heads, K key/value heads, D head dim, P feature_dim, F features,
    S vocabulary, N_map weights of the feature maps, N_lora weights of the adapters (and of an encoder's head)

Distillation keeps nothing of a layer once it is left, so its activations are flat in depth and linear in T; finetuning
keeps what each layer's backward needs; generation keeps one fp32 state per row. Imports no torch: `submit` shows the
estimate on login nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .assumed_kernels import AttentionKernel, assumed_attention, assumed_loss
from .config import RunConfig
from .deepspeed_settings import prefetch_elements
from .families import lora_modules
from .feature_map_checks import FeatureMapSize, feature_map_size
from .model_shape import ModelShape

GIB = 2**30
MIB = 2**20

CUDA_OVERHEAD_BYTES = 1 * GIB
"""CUDA context, cuBLAS and NCCL workspaces, the allocator's fragments."""
CPU_OVERHEAD_BYTES = 550 * MIB
"""A Python process that has imported torch, transformers, peft and DeepSpeed."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantization: 4 bits, one byte per block of 64, one fp32 per 256 blocks."""
INT8_BYTES = 1.0
ADAM_BYTES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Both moments of a weight; 8-bit ones have an fp32 scale per block of 256."""
BUCKET_BYTES = 200 * 10**6
"""Largest ZeRO communication bucket: 50 M fp32 numbers, never more than what learns."""
GATHERED_WEIGHTS = 10**9
"""Weights that ZeRO-3 lets live at once where they are trained (DeepSpeed's stage3_max_live_parameters)."""
LOGITS_AT_ONCE = 1 << 26
"""Logits that evaluate's loss of references forms at a time."""
SUMMARY_SHARE = 0.25
"""Part of a training row's tokens that belong to the summary and get logits (SAMSum: 0.15 to 0.2)."""
FEATURE_RESULTS = {"hedgehog_exp": 1.5, "performer": 2.0, "taylor": 2.0}
"""Results of φ's size in fp32 that a map keeps for its backward; 1 for the others."""
SPAN_BYTES = {"hedgehog_exp": (16, 35), "exp_t": (26, 51), "performer": (32, 55), "taylor": (16, 41)}
"""Forward and backward, for a number in φ(q) of a span where φ is computed along the way: φ of both sides, what it is
made of, gradients; measured. (14, 28) for the other maps. In bfloat16 backward is 6 more."""

TermKind = Literal["weights", "training", "activations", "overhead"]


@dataclass(frozen=True)
class Term:
    """One part of a stage's peak."""

    name: str
    num_bytes: float
    formula: str
    kind: TermKind = "activations"


@dataclass(frozen=True)
class StageEstimate:
    """The estimated peak of one stage; `where` says in which memory: one GPU's, or the CPU's."""

    stage: str
    variant: str | None
    where: str
    terms: tuple[Term, ...]
    assumes: str | None = None
    """What computes the stage's attention or loss; another implementation takes another amount."""

    @property
    def num_bytes(self) -> float:
        """Sum of the terms."""
        return sum(term.num_bytes for term in self.terms)

    @property
    def title(self) -> str:
        """`finetune`, or `finetune (t2r)` for a variant."""
        return self.stage if self.variant is None else f"{self.stage} ({self.variant})"


def estimate_memory(config: RunConfig, shape: ModelShape, *, world_size: int, device: str) -> list[StageEstimate]:
    """Estimates for every stage that will run, the variants' included.

    Args:
        config: the whole run's config.
        shape: the base model's sizes.
        world_size: processes, one per GPU.
        device: `cuda` or `cpu`.

    Raises:
        ValueError: an unknown feature map.
    """
    from .config_loading import variant_configs

    conversions: dict[str | None, RunConfig] = {None: config, **variant_configs(config)}
    stages = []
    if config.tiny is not None:
        stages.append(_estimate_pretraining(config, shape))
    for name, conversion in conversions.items():
        sizes = _Sizes(conversion, shape, world_size, device)
        if sizes.linear:
            terms = tuple(_distill_terms(sizes))
            stages.append(StageEstimate("distill", name, device, terms, sizes.loss))
        if conversion.finetune.enabled:
            terms = tuple(_finetune_terms(sizes))
            stages.append(StageEstimate("finetune", name, device, terms, sizes.attention))
    every = [_Sizes(conversion, shape, world_size, device) for conversion in conversions.values()]
    evaluations = [
        StageEstimate("evaluate", None, device, tuple(_evaluate_terms(sizes)), sizes.attention) for sizes in every
    ]
    stages.append(max(evaluations, key=lambda estimate: estimate.num_bytes))
    stages.append(StageEstimate("export", None, device, tuple(_export_terms(_Sizes(config, shape, 1, device)))))
    return stages


@dataclass(frozen=True)
class _Sizes:
    """A conversion's config and shape with the quantities that the formulas share."""

    config: RunConfig
    shape: ModelShape
    world_size: int
    device: str

    @property
    def linear(self) -> bool:
        return self.config.model.attention == "linear"

    @property
    def attention(self) -> AttentionKernel:
        return assumed_attention(self.config, self.shape.head_dim, self.device)

    @property
    def loss(self) -> str:
        return assumed_loss(self.config, self.shape.head_dim, self.device)

    @property
    def precision_bytes(self) -> int:
        return 2 if self.config.engine.precision == "bfloat16" else 4

    @property
    def zero_stage(self) -> int:
        return self.config.engine.zero_stage

    @property
    def map_size(self) -> FeatureMapSize:
        """Per head and side; zeros for softmax attention."""
        if not self.linear:
            return FeatureMapSize(0, 0)
        return feature_map_size(self.config.model, self.shape.head_dim)

    @property
    def features_per_token(self) -> int:
        """2 H F: φ(q) and φ(k) of one layer."""
        return 2 * self.shape.num_heads * self.map_size.num_features

    @property
    def has_no_features(self) -> bool:
        """Whether no tensor of φ's size is formed: φ is computed along the way, or inside a kernel."""
        return self.attention not in ("CUDA kernel, φ outside", "PyTorch, bidirectional")

    def span_scratch(self, direction: Literal["forward", "backward"], rows: int, length: int) -> tuple[float, str]:
        """Bytes of φ of a span of tokens, where PyTorch computes it along the way, and their formula; or 0 and ""."""
        from ..kernels.mapped_limits import span_length

        if self.attention != "PyTorch":
            return 0.0, ""
        heads, num_features = self.shape.num_heads, self.map_size.num_features
        span = span_length(self.device, rows, heads, num_features, self.config.model.chunk_size)
        tokens, (forward, backward) = min(span, length), SPAN_BYTES.get(self.config.model.feature_map, (14, 28))
        per_number = float(forward if direction == "forward" else backward + (6 if self.precision_bytes == 2 else 0))
        return per_number * rows * heads * num_features * tokens, f" + {per_number:g} B H F · {tokens} tokens"

    @property
    def num_map_weights(self) -> int:
        return 2 * self.shape.num_layers * self.shape.num_heads * self.map_size.num_weights

    @property
    def num_head_weights(self) -> int:
        """An encoder's pooler, which learns whole; its classifier is a few rows more."""
        return self.shape.hidden_size * (self.shape.hidden_size + 1) if self.shape.is_encoder else 0

    @property
    def num_lora_weights(self) -> int:
        linears = self.shape.linears
        per_layer = sum(sum(linears[name]) for name in self.lora_modules if name in linears)
        return self.shape.num_layers * self.config.finetune.lora.rank * per_layer

    @property
    def lora_modules(self) -> tuple[str, ...]:
        return lora_modules(self.config.finetune.lora, type(self.shape))

    def base_terms(self, *, sharded: bool, forward_only: bool = False) -> list[Term]:
        """The frozen base, quantized or sharded as the config says; as a teacher it runs forward only."""
        shape, p = self.shape, self.precision_bytes
        quantization = self.config.model.quantization
        if quantization is not None:
            bytes_per_weight = NF4_BYTES if quantization == "nf4" else INT8_BYTES
            num_bytes = shape.num_layers * shape.num_layer_weights * bytes_per_weight + shape.num_other_weights * p
            largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
            return [
                Term(
                    "base weights",
                    num_bytes,
                    f"{bytes_per_weight:.3f} B per weight in the layers, p elsewhere",
                    "weights",
                ),
                Term("dequantized weight", largest * p, "p · largest linear weight", "weights"),
            ]
        if sharded and self.zero_stage == 3:
            gathered, formula = min(shape.num_weights, GATHERED_WEIGHTS), "p · min(W, 10⁹)"
            if forward_only:
                largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
                layer = shape.num_layer_weights + prefetch_elements(shape.num_layer_weights) + largest
                gathered = max(layer, shape.vocab_size * shape.hidden_size)
                formula = "p · max(a layer + min(a layer, 5·10⁷) and a matrix ahead, S E)"
            return [
                Term("base weights", shape.num_weights * p / self.world_size, "p · W / n", "weights"),
                Term("gathered weights", gathered * p if self.world_size > 1 else 0, formula, "weights"),
            ]
        return [Term("base weights", shape.num_weights * p, "p · W", "weights")]

    def training_terms(self, num_trained: int, optimizer: str, *, weights_whole: bool) -> list[Term]:
        """What learns, in fp32: weights, gradients, ZeRO's copy, Adam's moments, a communication bucket."""
        stage, n = self.zero_stage, self.world_size
        weight_share = n if stage == 3 and not weights_whole else 1
        gradient_share = n if stage >= 2 else 1
        state_share = n if stage >= 1 else 1
        state_bytes = ADAM_BYTES[optimizer] + (4 if stage >= 1 else 0)
        if self.config.engine.offload_optimizer and self.device == "cuda":
            state_bytes = 0
        return [
            Term(
                "trained weights",
                4 * num_trained / weight_share,
                "4 · N" + (" / n" if weight_share > 1 else ""),
                "training",
            ),
            Term(
                "gradients",
                4 * num_trained / gradient_share,
                "4 · N" + (" / n" if gradient_share > 1 else ""),
                "training",
            ),
            Term(
                "optimizer",
                state_bytes * num_trained / state_share,
                "offloaded to the CPU"
                if state_bytes == 0
                else f"{state_bytes:g} · N" + (" / n" if state_share > 1 else ""),
                "training",
            ),
            Term("ZeRO bucket", min(BUCKET_BYTES, 4 * num_trained) if stage else 0, "4 · min(N, 50 M)", "training"),
        ]

    def overhead_term(self) -> Term:
        if self.device == "cuda":
            return Term("overhead", CUDA_OVERHEAD_BYTES, "CUDA context, workspaces, fragments: 1 GiB", "overhead")
        return Term("overhead", CPU_OVERHEAD_BYTES, "Python and libraries: 0.54 GiB", "overhead")


def _distill_terms(sizes: _Sizes) -> list[Term]:
    distill = sizes.config.distill
    learns = distill.enabled and sizes.num_map_weights > 0
    terms = sizes.base_terms(sharded=True, forward_only=True)
    if learns:
        terms += sizes.training_terms(sizes.num_map_weights, "adamw", weights_whole=True)
        terms.append(Term("dW until the backward", 4 * sizes.num_map_weights, "4 · N_map", "training"))
    else:
        terms.append(Term("feature maps", 4 * sizes.num_map_weights, "4 · N_map", "weights"))
    terms += _teacher_terms(sizes)
    terms.append(sizes.overhead_term())
    return terms


def _teacher_terms(sizes: _Sizes) -> list[Term]:
    """The teacher's pass: while a layer's loss is computed, or else while its MLP or the rotation of q and k runs."""
    shape, distill, p = sizes.shape, sizes.config.distill, sizes.precision_bytes
    tokens = distill.micro_batch_size * sizes.config.data.max_length_tokens
    queries, keys = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    positions, of_positions = shape.positions_at_once(p)
    always = p * shape.hidden_size + of_positions
    seen = tokens * (always + p * (2 * queries + 2 * keys) + 4 * shape.num_heads)
    formula = f"B T (Ep + {positions} + (2HD + 2KD) p + 4H)"
    terms = [Term("teacher's layer", seen, formula), *_loss_terms(sizes)]
    at_the_loss = sum(term.num_bytes for term in terms)
    (inside, of_mlp), (making, of_heads) = shape.mlp_at_once(p), shape.heads_at_once(p)
    mlp = tokens * (always + p * shape.hidden_size + of_mlp)
    heads = tokens * (always + of_heads)
    most, name, formula = max(
        (mlp, "teacher's MLP", f"B T (2Ep + {positions} + {inside})"),
        (heads, "making of the teacher's q, k, v", f"B T (Ep + {positions} + {making})"),
    )
    if most > at_the_loss:
        terms.append(Term(name, most - at_the_loss, f"{formula}, less the layer and its loss, which are gone by then"))
    if distill.cache_hidden_states:
        terms.append(Term("hidden states of the cache", tokens * shape.hidden_size * p, "p · B T E"))
    return terms


def _loss_terms(sizes: _Sizes) -> list[Term]:
    """What the losses of a layer take; the layer's own passes begin when it is gone."""
    from ..kernels.distill_limits import MAX_CELLS

    terms = _attention_loss_terms(sizes)
    distill, num_features = sizes.config.distill, sizes.map_size.num_features
    if distill.output_mse_weight > 0:
        tokens = distill.micro_batch_size * sizes.config.data.max_length_tokens
        cells = MAX_CELLS[sizes.device]
        most = max(sizes.config.data.max_length_tokens, cells // max(1, num_features))
        output = min(sizes.shape.num_heads * tokens, most) * (36 * sizes.shape.head_dim + 26 * num_features)
        attention = sum(term.num_bytes for term in terms)
        if output > attention:
            formula = "(36D + 26F) · min(H B T, max(T, cells / F)), less the attention loss, which is gone by then"
            terms.append(Term("output loss", output - attention, formula))
    return terms


def _attention_loss_terms(sizes: _Sizes) -> list[Term]:
    """The attention loss, as the Triton kernel where that serves."""
    from ..kernels.distill_limits import MAX_CELLS, heads_at_once, scratch_bytes

    shape, distill, length = sizes.shape, sizes.config.distill, sizes.config.data.max_length_tokens
    tokens, num_features = distill.micro_batch_size * length, sizes.map_size.num_features
    projected = sizes.config.model.feature_dim or shape.head_dim
    if sizes.loss == "Triton kernel":
        heads = heads_at_once(shape.num_heads, tokens, num_features)
        batch = distill.micro_batch_size
        scratch = scratch_bytes(shape.num_heads, batch, length, shape.head_dim, projected, num_features)
        formula = (
            f"{heads} heads at once · (B T (12F + F/16 + 16) + 136 D P), and a band of 512 · 128 · 2048 · 2 at most"
        )
        return [Term("loss kernel's scratch", scratch, formula)]
    cells = MAX_CELLS[sizes.device]
    head_tokens = min(shape.num_heads * tokens, max(length, cells // distill.query_block))
    features = head_tokens * 4 * (2 * shape.head_dim + 2 * projected + 6 * num_features)
    tile = min(cells, head_tokens * distill.query_block)
    return [
        Term("features of some heads", features, "4 (2D + 2P + 6F) · min(H B T, max(T, cells / query_block))"),
        Term("loss tiles", 3 * 4 * max(tile, length * distill.query_block), "12 · max(cells, T · query_block)"),
    ]


def _finetune_terms(sizes: _Sizes) -> list[Term]:
    shape, config = sizes.shape, sizes.config
    finetune, p = config.finetune, sizes.precision_bytes
    tokens = finetune.micro_batch_size * config.data.max_length_tokens
    maps_learn = finetune.train_feature_maps and sizes.num_map_weights > 0
    num_trained = sizes.num_lora_weights + sizes.num_head_weights + (sizes.num_map_weights if maps_learn else 0)
    terms = sizes.base_terms(sharded=True)
    terms += sizes.training_terms(num_trained, finetune.optimizer, weights_whole=False)
    if not maps_learn and sizes.num_map_weights:
        terms.append(Term("feature maps", 4 * sizes.num_map_weights, "4 · N_map, frozen", "weights"))
    saved = saved_per_token(config, shape, sizes.device)
    layer = tokens * sum(per_token for _, per_token in saved)
    formula = " + ".join(name for name, _ in saved)
    if finetune.gradient_checkpointing:
        terms.append(Term("layer inputs", shape.num_layers * tokens * shape.hidden_size * p, "p · L B T E"))
        terms.append(Term("one layer's activations", layer, f"B T ({formula})"))
    else:
        terms.append(Term("activations", shape.num_layers * layer, f"L B T ({formula})"))
    attention, formula = sizes.features_per_token * (4.0 + p), "2HF (4 + p)"
    if sizes.attention == "PyTorch, bidirectional":  # computed again: what it keeps of φ, and gradients of that
        results = FEATURE_RESULTS.get(config.model.feature_map, 1.0)
        attention = 4 * (results + 2) * sizes.features_per_token + 20 * shape.num_heads * shape.head_dim
        formula = f"{8 * (results + 2):g}HF + 20HD"
    elif sizes.has_no_features:
        attention, formula = 4.0 * shape.num_heads * shape.head_dim * p, "4HDp"
    span, span_formula = sizes.span_scratch("backward", finetune.micro_batch_size, config.data.max_length_tokens)
    inside, of_mlp = shape.mlp_at_once(p)
    mlp = tokens * of_mlp
    workspace = max(mlp, tokens * attention + span - mlp)
    formula = f"max(B T {inside}, B T {formula}{span_formula} less the MLP's B T {inside}, which is gone by then)"
    terms.append(Term("backward of one layer", workspace, formula))
    is_text = config.data.kind == "text"
    share = 1.0 if finetune.packing or is_text else SUMMARY_SHARE
    if shape.is_encoder:  # a few classes a row
        share = 0.0
    # log-softmax, its gradient and the loss's, each in fp32; the logits themselves are gone by then
    logits = tokens * share * shape.vocab_size * 12
    where = f"{SUMMARY_SHARE:g} of"
    if share == 1:
        where = "all" if is_text else "packed rows: up to all"
    later = workspace + (layer if finetune.gradient_checkpointing else 0)
    if logits > later:
        terms.append(
            Term(
                "logits",
                logits - later,
                f"12 S · {where} B T tokens, less a layer's backward, which begins when they are gone",
            )
        )
    terms.append(sizes.overhead_term())
    return terms


def saved_per_token(config: RunConfig, shape: ModelShape, device: str) -> list[tuple[str, float]]:
    """Bytes that one decoder layer saves for its backward, per token, by name.

    Frozen weights need no inputs; fp32 adapters and maps keep an fp32 copy of theirs.
    """
    sizes = _Sizes(config, shape, 1, device)
    p, lora = sizes.precision_bytes, config.finetune.lora
    queries, keys = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    # in fp32 nothing is cast, and q, k and v share the one normed input
    modules = sizes.lora_modules
    inputs = {name: linear[0] for name, linear in shape.linears.items() if name in modules}
    if p == 4:
        for together in shape.same_input:
            for name in [name for name in together if name in inputs][1:]:
                del inputs[name]
    adapters = 4 * sum(inputs.values()) * (2 if lora.dropout else 1) + 8 * lora.rank * len(modules)
    parts = [shape.saved_by_norms(p), ("adapter inputs", float(adapters)), shape.saved_by_mlp(p)]
    if sizes.attention == "CUDA kernel, φ inside":
        parts.append(("q, k, v, d", float(p * (queries + 2 * keys) + 4 * shape.num_heads)))
    elif sizes.attention == "PyTorch, bidirectional":
        parts.append(("q, k, v", 3.0 * queries * p))
    elif sizes.attention == "PyTorch":
        parts.append(("q, k, v, o, d", float(p * (2 * queries + 2 * keys) + 4 * shape.num_heads)))
    elif sizes.linear:
        if config.finetune.train_feature_maps and sizes.num_map_weights:
            parts.append(("map inputs 8HD", 8.0 * queries))
        results = FEATURE_RESULTS.get(config.model.feature_map, 1.0)
        parts.append((f"maps {8 * results:g}HF", 4.0 * results * sizes.features_per_token))
        parts.append(("φ 2HFp", float(sizes.features_per_token * p)))
        parts.append(("v, o, d", float(p * (keys + queries) + 4 * shape.num_heads)))
    else:
        parts.append(("q, k, v, o", float(p * (2 * queries + 2 * keys) + 4 * shape.num_heads)))
        if shape.is_encoder:  # what padding hides, for every pair
            parts.append(("mask Tp", float(p * config.data.max_length_tokens)))
    return parts


def _evaluate_terms(sizes: _Sizes) -> list[Term]:
    shape, config = sizes.shape, sizes.config
    evaluate, p = config.evaluate, sizes.precision_bytes
    # else nothing is generated: neither beams, nor what is kept between tokens
    generates = config.data.kind == "dialogues"
    rows = evaluate.batch_size * (evaluate.num_beams if generates else 1)
    terms = sizes.base_terms(sharded=False)
    adapter = 4 * (sizes.num_lora_weights + sizes.num_head_weights) if config.finetune.enabled else 0
    terms.append(Term("maps and adapter", 4 * sizes.num_map_weights + adapter, "4 (N_map + N_lora)", "weights"))
    length = config.data.max_length_tokens
    if not generates:
        pass
    elif sizes.linear:
        state = rows * state_bytes(config, shape)
        terms.append(Term("decoding state", state, "4 L H F (D + 1) · batch · beams"))
    else:
        per_token = 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * p
        longest = length + evaluate.max_new_tokens
        terms.append(Term("key/value cache", rows * per_token * longest, "2p L K D (T + new) · batch · beams"))
    tokens = rows * length
    attention, formula = sizes.features_per_token * (8 + p), "2HF (8 + p)"
    if sizes.has_no_features:
        attention, formula = 4 * shape.num_heads * shape.head_dim * p, "4HDp"
    span, span_formula = sizes.span_scratch("forward", rows, length)
    (inside, of_mlp), (positions, of_positions) = shape.mlp_at_once(p), shape.positions_at_once(4)
    layer = max(tokens * attention + span, tokens * of_mlp)
    prompt = tokens * ((4 + 3 * p) * shape.hidden_size + of_positions) + layer
    formula = f"batch T (4E + 3Ep + {positions}) + max(batch T {formula}{span_formula}, batch T {inside})"
    terms.append(Term("one layer of the prompts", prompt, formula))
    if shape.is_encoder:
        if not sizes.linear:
            terms.append(Term("mask", rows * length**2 * (1 + p), "(1 + p) batch T²"))
        return [*terms, sizes.overhead_term()]
    columns = evaluate.max_new_tokens if generates else length
    targets = evaluate.batch_size * (columns if evaluate.perplexity else 1)
    at_once = max(evaluate.batch_size * shape.vocab_size, LOGITS_AT_ONCE)
    logits = max(min(targets * shape.vocab_size, at_once), rows * shape.vocab_size) * (p + 8)
    terms.append(Term("logits", logits, f"(p + 8) min(S · batch · targets, {at_once:,})"))
    terms.append(sizes.overhead_term())
    return terms


def state_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Decoding state of one row, fp32: 4 L H F (D + 1), whatever was generated."""
    num_features = feature_map_size(config.model, shape.head_dim).num_features
    return 4 * shape.num_layers * shape.num_heads * num_features * (shape.head_dim + 1)


def _export_terms(sizes: _Sizes) -> list[Term]:
    """The unmerged model, or after it the exported one in a process of its own, whichever is larger."""
    maps, adapter = 4 * sizes.num_map_weights, 4 * sizes.num_lora_weights if sizes.config.finetune.enabled else 0
    unmerged = sizes.base_terms(sharded=False)
    unmerged.append(Term("maps and adapter", maps + adapter, "4 (N_map + N_lora)", "weights"))
    export_bytes = 4 if sizes.config.export.dtype == "float32" else 2
    exported = export_bytes * sizes.shape.num_weights + maps
    terms = unmerged
    if exported > sum(term.num_bytes for term in unmerged):
        terms = [Term("exported model", exported, "bytes of export.dtype · W + 4 · N_map", "weights")]
    overhead = sizes.overhead_term()
    return [*terms, overhead, Term("clean process", overhead.num_bytes, "a second process for the reload", "overhead")]


def _estimate_pretraining(config: RunConfig, shape: ModelShape) -> StageEstimate:
    assert config.tiny is not None
    tokens = config.tiny.pretrain_batch_size * config.data.max_length_tokens
    per_layer = 4 * (8 * shape.hidden_size + 4 * shape.intermediate_size)
    terms = (
        Term("model and AdamW", 16 * shape.num_weights, "16 · W", "training"),
        Term("activations", shape.num_layers * tokens * per_layer, "4 L B T (8E + 4I)"),
        Term("logits", 0 if shape.is_encoder else tokens * shape.vocab_size * 12, "12 S B T"),
        Term("overhead", CPU_OVERHEAD_BYTES, "Python and libraries: 0.54 GiB", "overhead"),
    )
    return StageEstimate("prepare", None, "cpu", terms)
