"""The memory estimate: exact where it counts weights, near where autograd can be asked what it keeps."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from hedgehog.kernels.distill_loss import output_mse_loss
from hedgehog.kernels.feature_maps import FEATURE_MAPS, make_feature_map
from hedgehog.kernels.mapped_attention import mapped_linear_attention
from hedgehog.pipeline.allocation_peak import allocation_peak
from hedgehog.pipeline.bert.shape import BertShape
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.families import HUB_SHAPES, lora_modules
from hedgehog.pipeline.feature_map_checks import feature_map_size
from hedgehog.pipeline.gpt2.shape import GPT2Shape
from hedgehog.pipeline.llama.shape import LlamaShape
from hedgehog.pipeline.memory_estimate import GIB, _Sizes, estimate_memory, saved_per_token, state_bytes
from hedgehog.pipeline.model_shape import ModelShape

LOSS_TERMS = {"output loss", "loss kernel's scratch", "features of some heads", "loss tiles"}
LLAMA_7B = HUB_SHAPES["meta-llama/Llama-2-7b-hf"]
SMALL = LlamaShape(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=128,
    max_length_tokens=512,
)


def make_config(**sections: Any) -> RunConfig:
    model = {"base": "meta-llama/Llama-2-7b-hf", **sections.pop("model", {})}
    return RunConfig.model_validate({"name": "x", "model": model, "data": {"dataset": "a/b"}, **sections})


def stages(config: RunConfig, *, world_size: int = 1, shape: ModelShape = LLAMA_7B) -> dict[str, dict[str, float]]:
    """Title of every stage to its terms' bytes, and `total`."""
    estimates = estimate_memory(config, shape, world_size=world_size, device="cuda")
    return {
        estimate.title: {term.name: term.num_bytes for term in estimate.terms} | {"total": estimate.num_bytes}
        for estimate in estimates
    }


def test_models_have_their_published_numbers_of_weights():
    counts = {name.split("/")[-1]: shape.num_weights for name, shape in HUB_SHAPES.items() if "chat" not in name}
    assert counts == {
        "Llama-2-7b-hf": 6_738_415_616,
        "Llama-2-13b-hf": 13_015_864_320,
        "Llama-2-70b-hf": 68_976_648_192,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "distilgpt2": 81_912_576,
        "bert-base-uncased": 109_482_240,
        "bert-base-cased": 108_310_272,
        "bert-large-uncased": 335_141_888,
        "bert-large-cased": 333_579_264,
    }


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_sizes_of_maps_are_the_registrys(name):
    """Reckoned without torch for login nodes, and held to the maps themselves here."""
    feature_dim = None if FEATURE_MAPS[name].feature_dim_is_head_dim else 24
    made = make_feature_map(name, num_heads=1, head_dim=16, feature_dim=feature_dim, side="key")
    size = feature_map_size(make_config(model={"feature_map": name, "feature_dim": feature_dim}).model, 16)
    assert size.num_features == made.num_features
    assert size.num_weights == sum(weight.numel() for weight in made.parameters())


def test_weights_maps_and_state_of_7b():
    figures = stages(make_config())
    assert figures["distill"]["base weights"] == 2 * 6_738_415_616
    assert figures["distill"]["trained weights"] == 4 * 2 * 32 * 32 * 128**2
    assert state_bytes(make_config(), LLAMA_7B) == 4 * 32 * 32 * 256 * 129
    lora = 4 * 32 * 8 * 4 * (4096 + 4096)
    assert figures["finetune"]["trained weights"] == figures["distill"]["trained weights"] + lora


def test_weights_of_a_model_are_counted_exactly():
    model = small_llama(num_layers=2, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == SMALL.num_weights


def test_distillation_is_flat_in_depth_and_linear_in_length():
    def activations(length: int, num_layers: int) -> float:
        config = make_config(data={"dataset": "a/b", "max_length_tokens": length})
        shape = LlamaShape(4096, num_layers, 32, 32, 128, 11008, 32000, 4096)
        estimates = estimate_memory(config, shape, world_size=1, device="cuda")
        return sum(term.num_bytes for term in estimates[0].terms if term.kind == "activations")

    assert activations(4096, 8) == activations(4096, 32)
    assert activations(65536, 8) / activations(32768, 8) == pytest.approx(2, rel=0.01)
    assert activations(1 << 18, 8) / activations(1 << 17, 8) == pytest.approx(2, rel=0.1)


def test_the_loss_on_a_gpu_is_the_kernels_where_it_serves():
    """What the kernel itself allocates: tests/kernels/test_distill_triton.py."""

    def terms(**sections: Any) -> dict[str, float]:
        return stages(make_config(**sections))["distill"]

    weights_in_parts, band_of_g = 4 * 32 * 128 * 128 * 34, 2**28
    usual = terms(data={"dataset": "a/b", "max_length_tokens": 4096})
    assert usual["loss kernel's scratch"] == pytest.approx(3 * 2**27 + band_of_g + weights_in_parts, rel=0.02)
    long = terms(data={"dataset": "a/b", "max_length_tokens": 1 << 17})
    assert long["loss kernel's scratch"] == pytest.approx((1 << 17) * 256 * 12 + band_of_g, rel=0.05), (
        "one head at least"
    )
    others = (
        {"model": {"attention_backend": "torch"}},
        {"engine": {"precision": "float32"}},
        {"model": {"feature_map": "taylor"}},
        {"model": {"feature_dim": 96}},
    )
    for sections in others:
        assert "loss kernel's scratch" not in terms(**sections) and terms(**sections)["loss tiles"] > 0


@pytest.mark.parametrize(("head_dim", "feature_dim"), [(64, 64), (128, 128), (32, 128)])
def test_the_output_loss_takes_what_the_estimate_says(head_dim: int, feature_dim: int):
    heads, length = 4, 512
    q, k, v, o = (torch.randn(1, heads, length, head_dim) for _ in range(4))
    sizes = {"num_heads": heads, "head_dim": head_dim, "feature_dim": feature_dim}
    pair = [make_feature_map("hedgehog_softmax", side=side, **sizes) for side in ("query", "key")]
    with allocation_peak("cpu") as peak:
        output_mse_loss(q, k, v, *pair, teacher_output_BHLV=o)
    learned = sum(4 * weight.numel() for feature_map in pair for weight in feature_map.parameters())
    shape = LlamaShape(heads * head_dim, 2, heads, heads, head_dim, 64, 128, 512)

    def activations(weight: float) -> dict[str, float]:
        config = make_config(
            model={"feature_dim": feature_dim},
            data={"dataset": "a/b", "max_length_tokens": length},
            distill={"output_mse_weight": weight, "micro_batch_size": 1},
        )
        estimate = estimate_memory(config, shape, world_size=1, device="cuda")[0]
        return {term.name: term.num_bytes for term in estimate.terms if term.name in LOSS_TERMS}

    assert "output loss" not in activations(0)
    assert sum(activations(1).values()) == pytest.approx(peak.num_bytes - learned, rel=0.1)


@pytest.mark.parametrize("num_key_value_heads", [8, 2])
def test_the_teachers_pass_takes_what_the_estimate_says(num_key_value_heads: int):
    """At Llama-2 7B's proportions, where the MLP decides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hedgehog.pipeline.distillation import Teacher

    length, width, mlp, vocab = 4096, 256, 688, 64
    shape = LlamaShape(width, 3, 8, num_key_value_heads, 32, mlp, vocab, length)
    settings = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        max_position_embeddings=length,
    )
    teacher = Teacher(LlamaForCausalLM(settings), range(3))
    batch = {
        "input_ids": torch.zeros(1, length, dtype=torch.long),
        "mask": torch.ones(1, length, dtype=torch.bool),
        "position_ids": torch.arange(length).unsqueeze(0),
    }
    with allocation_peak("cpu") as peak:
        teacher(batch, False, lambda seen: None)
    config = make_config(
        data={"dataset": "a/b", "max_length_tokens": length},
        engine={"precision": "float32"},
        distill={"micro_batch_size": 1, "query_block": 128},
    )
    terms = estimate_memory(config, shape, world_size=1, device="cpu")[0].terms
    assert "teacher's MLP" in [term.name for term in terms], "else the loss is the peak, not the pass"
    estimated = sum(term.num_bytes for term in terms if term.kind == "activations")
    assert estimated == pytest.approx(peak.num_bytes, rel=0.1)


@pytest.mark.parametrize("mlp", [1024, 2048])
def test_the_pass_of_a_gpt2_teacher_takes_what_the_estimate_says(mlp: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    from hedgehog.pipeline.distillation import Teacher
    from hedgehog.pipeline.modeling.architecture import architecture_of

    length, width, vocab = 4096, 256, 64
    shape = GPT2Shape(width, 3, 8, 8, 32, mlp, vocab, length)
    sizes = {"n_embd": width, "n_inner": mlp, "n_layer": 3, "n_head": 8, "n_positions": length}
    base = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=vocab, bos_token_id=2, eos_token_id=2))
    architecture_of(base).loaded(base)
    batch = {
        "input_ids": torch.zeros(1, length, dtype=torch.long),
        "mask": torch.ones(1, length, dtype=torch.bool),
        "position_ids": torch.arange(length).unsqueeze(0),
    }
    with allocation_peak("cpu") as peak:
        Teacher(base, range(3))(batch, False, lambda seen: None)
    config = make_config(
        data={"dataset": "a/b", "max_length_tokens": length},
        engine={"precision": "float32"},
        distill={"micro_batch_size": 1, "query_block": 128},
    )
    terms = estimate_memory(config, shape, world_size=1, device="cpu")[0].terms
    assert "teacher's MLP" in [term.name for term in terms], "else the loss is the peak, not the pass"
    assert sum(t.num_bytes for t in terms if t.kind == "activations") == pytest.approx(peak.num_bytes, rel=0.1)


BERT, WIDE_BERT = BertShape(64, 2, 4, 4, 16, 160, 128, 512), BertShape(128, 2, 4, 4, 32, 512, 128, 512)
CLASSES = {"kind": "classification", "dataset": "a/b", "max_length_tokens": 256}


def test_the_pass_of_a_bert_teacher_takes_what_the_estimate_says():
    from transformers import BertConfig, BertForSequenceClassification

    from hedgehog.pipeline.distillation import Teacher

    length, width = 4096, 256
    shape = BertShape(width, 3, 8, 8, 32, 2048, 64, length)
    sizes = {"hidden_size": width, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    base = BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, max_position_embeddings=length))
    batch = {
        "input_ids": torch.zeros(1, length, dtype=torch.long),
        "mask": torch.arange(length).unsqueeze(0) < length - 8,
        "position_ids": torch.arange(length).unsqueeze(0),
        "token_type_ids": torch.zeros(1, length, dtype=torch.long),
    }
    with allocation_peak("cpu") as peak:
        Teacher(base, range(3))(batch, False, lambda seen: None)
    config = make_config(
        data={**CLASSES, "max_length_tokens": length},
        engine={"precision": "float32"},
        distill={"micro_batch_size": 1, "query_block": 128},
    )
    terms = estimate_memory(config, shape, world_size=1, device="cpu")[0].terms
    assert "teacher's MLP" in [term.name for term in terms], "else the loss is the peak, not the pass"
    assert sum(t.num_bytes for t in terms if t.kind == "activations") == pytest.approx(peak.num_bytes, rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp", None])
def test_activations_of_an_encoders_layer_are_what_autograd_keeps(precision, feature_map):
    model = {"attention": "softmax"} if feature_map is None else {"feature_map": feature_map}
    config = make_config(model=model, data=CLASSES, engine={"precision": precision})
    measured = measured_bytes_of_a_bert(3, config) - measured_bytes_of_a_bert(2, config)
    estimated = 512 * sum(per_token for _, per_token in saved_per_token(config, BERT, "cpu"))
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "hedgehog_exp", None])
def test_a_step_of_an_encoder_takes_what_the_estimate_says(precision, feature_map):
    model = {"attention": "softmax"} if feature_map is None else {"feature_map": feature_map}
    batches = {"micro_batch_size": 8, "global_batch_size": 8}
    config = make_config(model=model, data=CLASSES, engine={"precision": precision, "zero_stage": 0}, finetune=batches)
    loss, batch = a_bert_in_training(WIDE_BERT, config, rows=8)
    loss(batch).backward()  # gradients are there then
    with allocation_peak("cpu") as peak:
        loss(batch).backward()
    estimates = {e.title: e for e in estimate_memory(config, WIDE_BERT, world_size=1, device="cpu")}
    estimated = sum(term.num_bytes for term in estimates["finetune"].terms if term.kind == "activations")
    assert estimated == pytest.approx(peak.num_bytes, rel=0.1)


def test_an_encoders_linear_attention_keeps_less_of_padded_rows_than_softmax():
    kept = {}
    for attention in ("linear", "softmax"):
        config = make_config(model={"attention": attention}, data=CLASSES, engine={"precision": "float32"})
        kept[attention] = measured_bytes_of_a_bert(3, config) - measured_bytes_of_a_bert(2, config)
    assert kept["linear"] < 0.8 * kept["softmax"]


def measured_bytes_of_a_bert(num_layers: int, config: RunConfig) -> int:
    """As measured_bytes, for two rows of 256 tokens, one of them padded."""
    loss, batch = a_bert_in_training(replace(BERT, num_layers=num_layers), config, rows=2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in loss.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(batch)
        return sum(storage.nbytes() for storage in kept.values())


def a_bert_in_training(shape: BertShape, config: RunConfig, *, rows: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Its loss in stage two, and a batch of rows of 256 tokens, one of them padded."""
    from transformers import BertConfig, BertForSequenceClassification

    from hedgehog.pipeline.classification_head import release_head
    from hedgehog.pipeline.label_loss import LabelLoss
    from hedgehog.pipeline.lora import attach_lora
    from hedgehog.pipeline.modeling.convert import convert_base, feature_map_modules

    sizes = BertConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
    )
    base = BertForSequenceClassification(sizes).to(getattr(torch, config.engine.precision))
    maps = {"feature_map": config.model.feature_map} if config.model.attention == "linear" else {}
    model: Any = convert_base(base, attention=config.model.attention, **maps)
    loss = LabelLoss(attach_lora(model, config.finetune.lora, seed=0))
    release_head(model)
    for module in feature_map_modules(model).values():
        module.requires_grad_(True)
    model.train()
    ids = torch.randint(5, 128, (rows, 256), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, 256, dtype=torch.bool)
    mask[1, 200:] = False
    return loss, {
        "input_ids": ids,
        "mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "row_labels": torch.zeros(rows, dtype=torch.long),
    }


def test_an_encoder_has_neither_logits_nor_a_cache_and_trains_its_head():
    estimates = stages(make_config(data=CLASSES), shape=BERT)
    assert {"logits", "decoding state", "key/value cache"}.isdisjoint(estimates["finetune"] | estimates["evaluate"])
    maps, lora = 2 * 2 * 4 * 16 * 16, 2 * 8 * 4 * (64 + 64)
    assert estimates["finetune"]["trained weights"] == 4 * (maps + lora + 64 * 65)
    wider = replace(BERT, vocab_size=30_000)
    assert stages(make_config(data=CLASSES), shape=wider)["distill"]["total"] > estimates["distill"]["total"]


def test_what_each_setting_saves():
    base = stages(make_config(engine={"zero_stage": 1}), world_size=8)
    assert stages(make_config(engine={"zero_stage": 2}), world_size=8)["finetune"]["gradients"] == pytest.approx(
        base["finetune"]["gradients"] / 8
    )
    sharded = stages(make_config(engine={"zero_stage": 3}), world_size=8)
    assert sharded["distill"]["base weights"] == base["distill"]["base weights"] / 8
    assert sharded["distill"]["gathered weights"] == 2 * (202_375_168 + 50_000_000 + 4096 * 11008)
    assert sharded["evaluate"]["base weights"] == base["evaluate"]["base weights"], "evaluate does not shard"
    assert sharded["distill"]["trained weights"] == base["distill"]["trained weights"]
    checkpointed = stages(make_config(finetune={"gradient_checkpointing": True}), world_size=8)
    assert checkpointed["finetune"]["total"] < 0.75 * base["finetune"]["total"]
    eight_bit = stages(make_config(finetune={"optimizer": "adamw8bit"}), world_size=8)
    assert eight_bit["finetune"]["optimizer"] < base["finetune"]["optimizer"]
    offloaded = stages(make_config(engine={"offload_optimizer": True}), world_size=8)
    assert offloaded["distill"]["optimizer"] == 0
    nf4 = stages(make_config(model={"quantization": "nf4"}), world_size=8)
    assert 0.25 < nf4["distill"]["base weights"] / base["distill"]["base weights"] < 0.3


def test_stages_that_will_not_run_are_not_estimated():
    variants = {
        "zero": {"overrides": {"model.attention": "softmax", "finetune.enabled": False}},
        "soft": {"overrides": {"model.attention": "softmax"}},
        "elu": {"overrides": {"model.feature_map": "elu"}},
    }
    figures = stages(make_config(variants=variants))
    assert list(figures) == [
        "distill", "finetune", "finetune (soft)", "distill (elu)", "finetune (elu)", "evaluate", "export",
    ]  # fmt: skip
    assert "optimizer" not in figures["distill (elu)"]
    assert figures["finetune (soft)"]["trained weights"] < figures["finetune"]["trained weights"]


def test_qlora_fits_a_24_gb_card():
    config = make_config(
        model={"quantization": "nf4"},
        finetune={"optimizer": "adamw8bit", "gradient_checkpointing": True},
        evaluate={"batch_size": 8},
    )
    assert max(figures["total"] for figures in stages(config).values()) < 0.9 * 24e9


def test_the_terms_of_a_stage_add_up_and_have_formulas():
    for estimate in estimate_memory(make_config(), LLAMA_7B, world_size=2, device="cuda"):
        assert all(term.formula and term.num_bytes >= 0 for term in estimate.terms)
        assert estimate.num_bytes == sum(term.num_bytes for term in estimate.terms) > GIB


def small_llama(num_layers: int, dtype: torch.dtype, shape: LlamaShape = SMALL) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def measured_bytes(
    num_layers: int,
    config: RunConfig,
    dtype: torch.dtype,
    tokens: int,
    shape: LlamaShape = SMALL,
    attention_backend: str = "torch",
) -> int:
    """Bytes that autograd keeps in a forward pass, each storage once, without weights."""
    from peft import LoraConfig, get_peft_model

    from hedgehog.pipeline.modeling.convert import convert_base, feature_map_modules

    model: Any = small_llama(num_layers, dtype, shape)
    if config.model.attention == "linear":
        model = convert_base(model, feature_map=config.model.feature_map, attention_backend=attention_backend)
    lora = config.finetune.lora
    modules = list(lora_modules(lora, type(shape)))
    adapted = get_peft_model(model, LoraConfig(r=lora.rank, target_modules=modules))
    if config.model.attention == "linear":
        for module in feature_map_modules(adapted.get_base_model()).values():
            module.requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, shape.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(input_ids=ids, logits_to_keep=1, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", None])
def test_activations_of_a_layer_are_what_autograd_keeps(precision, feature_map):
    model = {"attention": "softmax"} if feature_map is None else {"feature_map": feature_map}
    config = make_config(model=model, engine={"precision": precision})
    dtype, tokens = getattr(torch, precision), 256
    # the difference of two depths is a layer's own share, without embedding and logits
    measured = measured_bytes(2, config, dtype, tokens) - measured_bytes(1, config, dtype, tokens)
    estimated = tokens * sum(per_token for _, per_token in saved_per_token(config, SMALL, "cpu"))
    assert 0.9 * measured < estimated < 1.25 * measured


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_scratch_of_a_span_is_what_its_attention_allocates(name, precision):
    """Beyond q, k, v, o, d, their gradients and the state; that of the largest of several spans."""
    heads, length, dim = 2, 4096, 32
    shape = LlamaShape(heads * dim, 2, heads, heads, dim, 160, 128, length)
    sizes = _Sizes(make_config(model={"feature_map": name}, engine={"precision": precision}), shape, 1, "cpu")
    maps = [make_feature_map(name, num_heads=heads, head_dim=dim, side=side) for side in ("query", "key")]
    dtype = getattr(torch, precision)
    q, k, v = (torch.randn(1, heads, length, dim, dtype=dtype).requires_grad_() for _ in range(3))
    leaves = [q, k, v, *(weight for feature_map in maps for weight in feature_map.parameters())]
    state = 4 * heads * maps[0].num_features * (dim + 1)
    with torch.no_grad(), allocation_peak("cpu") as forward:
        out, _ = mapped_linear_attention(q, k, v, *maps)
    with torch.enable_grad():
        out, _ = mapped_linear_attention(q, k, v, *maps)
    with allocation_peak("cpu") as backward:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    beside = {
        "forward": out.nbytes + 4 * heads * length + state,
        "backward": sum(leaf.nbytes for leaf in leaves) + out.nbytes + 4 * heads * length + 2 * state,
    }
    for direction, peak in (("forward", forward), ("backward", backward)):
        measured, (estimated, _) = peak.num_bytes - beside[direction], sizes.span_scratch(direction, 1, length)
        too_much = 1.45 if maps[0].trainable else 1.85  # one figure serves the cheap maps too
        assert 0.95 * measured < estimated < too_much * measured, direction


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulated kernels need g++")
def test_the_cuda_kernel_keeps_what_the_estimate_says(monkeypatch):
    """q, k, v and the denominator, as autograd is asked; nothing of φ's size. The kernel itself need not run for it."""
    from hedgehog.kernels.cuda.library import Library

    monkeypatch.setattr(Library, "forward", lambda self, arguments: None)
    shape = LlamaShape(128, 2, 2, 1, 64, 344, 128, 512)
    config = make_config(engine={"precision": "bfloat16"})
    depths = [measured_bytes(layers, config, torch.bfloat16, 128, shape, "emulated") for layers in (2, 1)]
    parts = dict(saved_per_token(config, shape, "cuda"))
    assert sum(parts.values()) == pytest.approx((depths[0] - depths[1]) / 128, rel=0.1)
    assert parts["q, k, v, d"] == 2 * (128 + 2 * 64) + 4 * 2


def test_the_estimate_says_which_implementation_it_assumes():
    def assumed(**sections: Any) -> dict[str, str | None]:
        estimates = estimate_memory(make_config(**sections), LLAMA_7B, world_size=1, device="cuda")
        return {estimate.stage: estimate.assumes for estimate in estimates}

    inside, outside = "CUDA kernel, φ inside", "CUDA kernel, φ outside"
    assert assumed() == {"distill": "Triton kernel", "finetune": inside, "evaluate": inside, "export": None}
    assert assumed(model={"feature_map": "relu"})["finetune"] == outside
    for sections in ({"model": {"attention_backend": "torch"}}, {"engine": {"precision": "float32"}}):
        found = assumed(**sections)
        assert found["distill"] == found["finetune"] == found["evaluate"] == "PyTorch"
    assert assumed(model={"attention": "softmax"})["finetune"] == "softmax"
    kept = {
        backend: stages(make_config(model={"attention_backend": backend}))["finetune"]["activations"]
        for backend in ("auto", "torch")
    }
    assert kept["auto"] < kept["torch"] < 1.1 * kept["auto"], "φ is kept by neither"
