"""What GPT-2 has and Llama has not: a table of positions, projections that are fused, turned and biased, dropout."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hedgehog.pipeline.allocation_peak import allocation_peak
from hedgehog.pipeline.config import LoraConfig, RunConfig
from hedgehog.pipeline.errors import ConfigError, ModelError
from hedgehog.pipeline.families import shape_from_fields
from hedgehog.pipeline.generation import check_room
from hedgehog.pipeline.gpt2.configuration_hedgehog_gpt2 import HedgehogGPT2Config
from hedgehog.pipeline.lora import attach_lora
from hedgehog.pipeline.memory_estimate import estimate_memory
from hedgehog.pipeline.merging import merged_tensors
from hedgehog.pipeline.modeling.architecture import architecture_of
from hedgehog.pipeline.modeling.convert import convert_base, feature_map_modules
from hedgehog.pipeline.modeling.load_base import load_base
from hedgehog.pipeline.summary_loss import SummaryLoss


def make_gpt2(**fields: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    ids = {"bos_token_id": 2, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **fields})).eval()


@pytest.fixture
def ids_BL() -> torch.Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fields", [{}, {"n_inner": 100, "tie_word_embeddings": False}], ids=str)
def test_the_shape_is_what_is_saved(tmp_path, fields):
    model = make_gpt2(**fields)
    model.save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    shape = shape_from_fields(json.loads((tmp_path / "config.json").read_text()))
    assert shape.tensor_shapes() == saved
    assert shape.num_weights == sum(weight.numel() for weight in model.parameters())
    for name, (inputs, outputs) in shape.linears.items():
        places = [place for place in saved if f".{place}".endswith(f".{name}.weight")]
        assert [saved[place] for place in places] == [(inputs, outputs)] * 2, name


def test_openais_own_files_load(tmp_path, ids_BL):
    """Saved without the head: no prefix, and the causal mask of every layer among the weights."""
    model = make_gpt2()
    model.save_pretrained(tmp_path)
    weights = {n.removeprefix("transformer."): w for n, w in load_file(tmp_path / "model.safetensors").items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in (0, 1)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old = {"model_type": "gpt2", "n_ctx": 32, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps({**old, "vocab_size": 61}))
    loaded = load_base(tmp_path, dtype="float32")
    torch.testing.assert_close(loaded(ids_BL).logits, model(ids_BL).logits, rtol=1e-5, atol=1e-5)
    assert loaded.config.activation_function == "gelu_pytorch_tanh", "the same function in one operation"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 32}, r"wte\.weight has shape \[61, 64\], config.json makes it \[61, 32\]"),
        ({"n_layer": 1}, r"h\.1.* is there, config.json has 1 layers"),
        ({"n_layer": 3}, r"the weights lack transformer\.h\.2"),
        ({"n_positions": 64}, r"wpe\.weight has shape \[32, 64\], config.json makes it \[64, 64\]"),
        ({"n_head": 3}, "n_embd 64, no multiple of n_head 3"),
        ({"n_head": 0}, "config.json lacks n_head, or they are no positive numbers"),
        ({"n_inner": 0}, "config.json lacks n_inner, or they are no positive numbers"),
        ({"add_cross_attention": True}, "add_cross_attention: only a GPT-2 by itself"),
        ({"model_type": "hedgehog_gpt2"}, "already a Hedgehog-GPT-2; a run starts from the GPT-2"),
        ({"n_embd": "large"}, "config.json: not a valid GPT-2 configuration|config.json lacks n_embd"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, fields, message):
    make_gpt2().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ModelError, match=message):
        load_base(tmp_path, dtype="float32")


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_a_position_beyond_the_table_is_refused(attention):
    model = convert_base(make_gpt2(), attention=attention)
    ids_BL = torch.full((1, 33), 5)
    with pytest.raises(ValueError, match="position 32, and this model's table of positions ends at 31"):
        model(ids_BL)
    with torch.no_grad():
        cache = model(ids_BL[:, :32], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position 32"):
            model(ids_BL[:, 32:], past_key_values=cache)
        # padding has no position: a longer row of as many real tokens is none too many
        mask_BL = torch.tensor([[0] * 4 + [1] * 29])
        padded = model(ids_BL, attention_mask=mask_BL, position_ids=(mask_BL.cumsum(1) - 1).clamp_min(0)).logits[:, 4:]
        torch.testing.assert_close(padded, model(ids_BL[:, 4:]).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="fewer new tokens"):
            model.generate(ids_BL[:, :30], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert model.generate(ids_BL[:, :30], max_new_tokens=3, min_new_tokens=3).shape == (1, 33)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_a_step_takes_what_the_estimate_says(attention):
    """Weights, AdamW's moments and what a training step of stage two allocates, the embedding's dropout included."""
    width, length = 128, 512
    sizes = {"n_embd": width, "n_layer": 4, "vocab_size": 256, "n_positions": length}
    base = make_gpt2(**sizes)
    architecture_of(base).loaded(base)
    model: Any = convert_base(base, attention=attention)
    values = {
        "name": "x",
        "model": {"base": "gpt2", "attention": attention},
        "data": {"dataset": "a/b", "max_length_tokens": length},
        "engine": {"precision": "float32", "zero_stage": 0},
        "finetune": {"micro_batch_size": 4},
    }
    config = RunConfig.model_validate(values)
    adapted: Any = attach_lora(model, config.finetune.lora, seed=0).train()
    for feature_map in feature_map_modules(model).values():
        feature_map.requires_grad_(True)
    ids_BL = torch.randint(3, 256, (4, length), generator=torch.Generator().manual_seed(0))
    labels_BL = ids_BL.masked_fill(torch.arange(length)[None] < length * 3 // 4, -100)
    batch = {"input_ids": ids_BL, "labels": labels_BL, "position_ids": torch.arange(length)[None].expand(4, -1)}
    loss = SummaryLoss(adapted, packed=False)
    loss(batch).backward()  # gradients are there from the first step on
    with allocation_peak("cpu") as peak:
        loss.zero_grad(set_to_none=True)
        loss(batch).backward()
    learned = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    measured = sum(p.nbytes for p in adapted.parameters()) + 8 * learned + peak.num_bytes
    shape = shape_from_fields(model.config.to_dict() | {"model_type": "gpt2"})
    terms = next(e for e in estimate_memory(config, shape, world_size=1, device="cpu") if e.stage == "finetune").terms
    estimated = sum(term.num_bytes for term in terms if term.kind != "overhead")
    assert estimated == pytest.approx(measured, rel=0.1)


def test_the_activation_keeps_half_as_much_and_says_the_same(ids_BL):
    """What autograd keeps of a whole training pass with transformers' gelu_new, and with the one operation."""
    base = make_gpt2(resid_pdrop=0, embd_pdrop=0)
    converted: list[Any] = [convert_base(base), None]
    kept, logits = [], []
    for which in (0, 1):
        if which:
            architecture_of(base).loaded(base)
            converted[1] = convert_base(base)
        model: Any = attach_lora(converted[which], LoraConfig(), seed=0).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, storages=storages, weights=weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        ids = torch.cat([ids_BL] * 3, dim=1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits.append(model(ids, logits_to_keep=1).logits)
            kept.append(sum(storage.nbytes() for storage in storages.values()))
        model.unload()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert kept[1] < 0.55 * kept[0]


def test_room_for_new_tokens():
    check_room(None, 10**6, 10**6, "the prompt", "a shorter text")
    check_room(32, 30, 3, "the prompt", "a shorter text")  # the last token is not read
    with pytest.raises(ConfigError, match=r"has 30 tokens, with 4 new ones .*: evaluate.max_new_tokens=3, or a"):
        check_room(32, 30, 4, "the prompt", "a shorter text")
    with pytest.raises(ConfigError, match="positions that the base model has: a shorter text"):
        check_room(32, 40, 4, "the prompt", "a shorter text")


def test_a_position_given_beyond_the_table_is_refused(ids_BL):
    with pytest.raises(ValueError, match="position 40, and"):
        convert_base(make_gpt2())(ids_BL, position_ids=torch.arange(32, 41)[None])


def test_a_derived_size_in_config_json_is_passed_over(tmp_path, ids_BL):
    make_gpt2().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "head_dim": 16}))
    assert convert_base(load_base(tmp_path, dtype="float32"))(ids_BL).logits.isfinite().all()


def test_arguments_that_would_be_passed_over_are_refused(ids_BL):
    model = convert_base(make_gpt2())
    for name in ("token_type_ids", "encoder_hidden_states"):
        with pytest.raises(ValueError, match=f"{name}: a converted model does not read it"):
            model(ids_BL, **{name: torch.zeros_like(ids_BL)})


def test_dropout_is_the_bases_but_for_attention_weights(ids_BL):
    model = convert_base(make_gpt2())
    assert (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) == (0.1, 0.1, 0)
    with torch.no_grad():
        assert torch.equal(model(ids_BL).logits, model(ids_BL).logits)
        model.train()
        assert not torch.equal(model(ids_BL).logits, model(ids_BL).logits)
    for fields in ({"attn_pdrop": 0.1}, {"n_head": 5}, {"add_cross_attention": True}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            HedgehogGPT2Config(**{"n_embd": 64, "n_head": 4, **fields})
    assert HedgehogGPT2Config(n_embd=64, n_head=4).feature_dim == 16


def test_adapters_sit_on_turned_projections_without_a_warning(ids_BL):
    model = convert_base(make_gpt2())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted: Any = attach_lora(model, LoraConfig(rank=2), seed=0)
    shapes = {name: tuple(p.shape) for name, p in adapted.named_parameters() if "lora_" in name and ".h.0." in name}
    prefix = "base_model.model.transformer.h.0.attn"
    assert shapes == {
        f"{prefix}.c_attn.lora_A.default.weight": (2, 64),
        f"{prefix}.c_attn.lora_B.default.weight": (192, 2),
        f"{prefix}.c_proj.lora_A.default.weight": (2, 64),
        f"{prefix}.c_proj.lora_B.default.weight": (64, 2),
    }
    assert len(feature_map_modules(adapted.get_base_model())) == 4
    with pytest.raises(ConfigError, match="no module named q_proj"):
        attach_lora(convert_base(make_gpt2()), LoraConfig(target_modules=("c_attn", "q_proj")), seed=0)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_merged_weights_have_gpt2s_shapes_and_the_unmerged_answers(tmp_path, ids_BL, quantization):
    """Quantization makes linear layers of Conv1D, and turns their weights; an export has GPT-2's own again."""
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    make_gpt2(n_embd=128).save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype="float32", quantization=quantization, device="cpu")
    modules = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    adapted: Any = attach_lora(convert_base(base), LoraConfig(target_modules=modules), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    tensors = merged_tensors(adapted.get_base_model(), torch.float32)
    plain = convert_base(load_base(tmp_path, dtype="float32"))
    merged = {name: tensor.compute() for name, tensor in tensors.items()}
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == {n: t.shape for n, t in tensors.items()}
    untouched = plain(ids_BL).logits
    plain.load_state_dict(merged, strict=False)
    expected, found = adapted(ids_BL).logits, plain(ids_BL).logits
    # LLM.int8 rounds activations too
    tolerance = 0.15 if quantization == "int8" else 1e-4
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - untouched).norm() > 0.3 * expected.norm()
