"""Merged tensors against sums written out, for plain, tied and quantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hedgehog.pipeline.merging import merged_tensors
from hedgehog.pipeline.modeling.convert import convert_base
from hedgehog.pipeline.modeling.load_base import load_base


def make_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            **options,
        )
    ).eval()


def with_adapter(model: LlamaForCausalLM, targets: list[str]):
    """`model` with LoRA layers in place, and {module: scaling * B A}."""
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, weight in peft_model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) / 8
            weights[name.removeprefix("base_model.model.")] = weight.data
    deltas = {
        name.removesuffix(".lora_A.default.weight"): 3 * (weights[name.replace("lora_A", "lora_B")] @ weight)
        for name, weight in weights.items()
        if "lora_A" in name
    }
    return peft_model.get_base_model(), deltas


def test_weights_are_base_plus_update_rounded_once():
    llama = make_llama().to(torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    model, deltas = with_adapter(llama, ["q_proj", "v_proj"])
    merged = merged_tensors(model, torch.bfloat16)
    assert list(merged) == list(base) and len(deltas) == 2
    for name, tensor in merged.items():
        delta = deltas.get(name.removesuffix(".weight"), 0)
        expected = (base[name].float() + delta).bfloat16()
        assert torch.equal(tensor.compute(), expected), name
        assert tensor.num_bytes == expected.numel() * 2


def test_feature_maps_and_their_buffers_stay_float32():
    model = convert_base(make_llama().to(torch.bfloat16), feature_map="performer")
    merged = merged_tensors(model, torch.bfloat16)
    assert set(merged) == set(model.state_dict())
    maps = [name for name in merged if "feature_map" in name]
    assert maps
    for name, tensor in merged.items():
        wanted = torch.float32 if name in maps else torch.bfloat16
        assert (tensor.dtype, tensor.compute().dtype) == (wanted, wanted)
        assert torch.equal(tensor.compute(), model.state_dict()[name])


def test_tied_weights_are_written_once_unless_an_adapter_parts_them():
    assert "lm_head.weight" not in merged_tensors(make_llama(tie_word_embeddings=True), torch.float32)
    model, deltas = with_adapter(make_llama(tie_word_embeddings=True), ["lm_head"])
    merged = merged_tensors(model, torch.float32)
    embedding = merged["model.embed_tokens.weight"].compute()
    torch.testing.assert_close(merged["lm_head.weight"].compute(), embedding + deltas["lm_head"])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_dequantized_before_merging(quantization: str, tmp_path: Path):
    original = make_llama()
    original.save_pretrained(tmp_path)
    quantized = load_base(tmp_path, dtype="float32", quantization=quantization, device="cpu")
    model, deltas = with_adapter(quantized, ["q_proj"])
    merged = {name: tensor.compute() for name, tensor in merged_tensors(model, torch.float32).items()}
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == {
        name: tuple(tensor.shape) for name, tensor in original.state_dict().items()
    }
    merged_llama = LlamaForCausalLM(original.config).eval()
    merged_llama.load_state_dict(merged)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        unmerged_logits, logits = model(ids).logits, merged_llama(ids).logits
    # int8's matmul also rounds activations; NF4 computes with the very weights that are merged
    tolerance = 1e-4 if quantization == "nf4" else 0.05
    assert (logits - unmerged_logits).abs().max() <= tolerance * unmerged_logits.abs().max()
    name = "model.layers.0.self_attn.q_proj.weight"
    rounding = (merged[name] - deltas["model.layers.0.self_attn.q_proj"] - original.state_dict()[name]).abs().max()
    assert 0 < rounding < 0.02
