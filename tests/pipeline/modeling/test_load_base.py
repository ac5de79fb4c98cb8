"""Every way in which a base model can be wrong is one ModelError that names the file and the cure."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, RobertaConfig

from hedgehog.pipeline.base_folder import check_weights
from hedgehog.pipeline.errors import ModelError
from hedgehog.pipeline.families import shape_from_fields
from hedgehog.pipeline.modeling import load_base as load_base_module
from hedgehog.pipeline.modeling.convert import convert_base
from hedgehog.pipeline.modeling.load_base import check_base, load_base


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sharded(llama, tmp_path):
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_loads(request, llama, token_ids, which):
    loaded = load_base(request.getfixturevalue(which), dtype="float32")
    assert isinstance(loaded, LlamaForCausalLM) and not loaded.training
    ids_BL = token_ids(2, 9)
    assert torch.equal(loaded(ids_BL).logits, llama(ids_BL).logits)


def test_dtype_device_and_attention(folder):
    loaded = load_base(folder, dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
    exact = loaded.model.rotary_emb.inv_freq.clone()
    assert torch.equal(loaded.bfloat16().model.rotary_emb.inv_freq, exact), "RoPE frequencies must stay fp32"
    with pytest.raises(ModelError, match="float16 overflows"):
        load_base(folder, dtype="float16")
    with pytest.raises(ModelError, match="'int8' is not a floating-point type"):
        load_base(folder, dtype="int8")


def refused(path, message, **options):
    with pytest.raises(ModelError, match=message) as caught:
        load_base(path, dtype="float32", **options)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nothing", "nothing: there is no such folder")
    refused("./runs/nothing/base", "there is no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file; a base model is a folder")


def test_not_to_be_converted(tmp_path, llama):
    RobertaConfig().save_pretrained(tmp_path / "roberta")
    refused(tmp_path / "roberta", "has model_type 'roberta'; only Llama, GPT-2 and BERT models can be converted")
    convert_base(llama).save_pretrained(tmp_path / "hedgehog")
    refused(tmp_path / "hedgehog", "is already a Hedgehog-Llama")


def test_config_missing_or_broken(folder):
    config_file = folder / "config.json"
    good = config_file.read_text()
    config_file.write_text(good[:50])
    refused(folder, "config.json: cannot be read as JSON")
    config_file.write_text(json.dumps({**json.loads(good), "hidden_size": "large"}))
    refused(folder, "config.json: not a valid Llama configuration")
    config_file.write_text("[]")
    refused(folder, "model_type None")
    config_file.unlink()
    refused(folder, "has no config.json")


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, f"the index names {shard.name}, which is missing")
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "is not an index of safetensors")


@pytest.mark.parametrize("keep", [4, 200, -64])
def test_truncated_file(sharded, keep):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(sharded, f"{shard.name}: truncated or not a safetensors file")


def test_missing_tensor(sharded):
    index_file = sharded / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    dropped = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != dropped}
    index_file.write_text(json.dumps(index))
    refused(sharded, "the weights lack model.layers.1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 32, "head_dim": 16},
            r"embed_tokens.weight has shape \[61, 64\], config.json makes it \[61, 32\]",
        ),
        ({"intermediate_size": 64}, "gate_proj.weight has shape"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape .* and 1 more"),
        ({"num_hidden_layers": 1}, "layers.1.* is there, config.json has 1 layers"),
        ({"num_hidden_layers": 3}, "the weights lack model.layers.2"),
        ({"attention_bias": True}, r"the weights lack model.layers.0.self_attn.k_proj.bias"),
        ({"num_key_value_heads": 3}, "no multiple of 3 num_key_value_heads"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized already \(gptq\)"),
    ],
)
def test_config_and_weights_of_different_models(sharded, fields, message):
    file = sharded / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    refused(sharded, message)


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_ties_and_biases_are_part_of_the_shape(new_llama, tmp_path, fields):
    new_llama(**fields).save_pretrained(tmp_path)
    load_base(tmp_path, dtype="float32")


def test_a_llama_saved_without_its_output_layer(new_llama, tmp_path):
    new_llama(tie_word_embeddings=True).model.save_pretrained(tmp_path)
    load_base(tmp_path, dtype="float32")


def test_a_mismatch_that_only_loading_shows(folder, monkeypatch):
    """As with a model of the hub, whose weights come after its config was checked."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 64}))
    monkeypatch.setattr(load_base_module, "check_weights", lambda folder, shape: None)
    refused(folder, "config.json and the weights are of different models")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "only pickled weights .*convert them to safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has neither model.safetensors nor")


def test_code_in_the_folder_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    assert isinstance(load_base(folder, dtype="float32"), LlamaForCausalLM)


def test_hub_id_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("meta-llama/Llama-2-7b-hf", "nobody/has-this"):
        with pytest.raises(ModelError, match=f"{name}: is no local folder, and cannot be fetched .* give its path"):
            check_base(name)


def test_gradients_of_an_nf4_base_outlive_a_pass_without_them(tmp_path, new_llama, token_ids, monkeypatch):
    """On a CPU with AVX512-BF16, which this one is made to look like."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    new_llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    model = convert_base(load_base(tmp_path / "base", dtype="float32", quantization="nf4", device="cpu"))
    ids_BL = token_ids(2, 9)

    def map_gradients():
        model.train()
        model.zero_grad()
        model(ids_BL, labels=ids_BL).loss.backward()
        return [layer.self_attn.feature_map_q.weight.grad for layer in model.model.layers]

    before = map_gradients()
    with torch.no_grad():
        model.eval()(ids_BL)
    assert all(gradient.abs().max() > 0 for gradient in before)
    assert all(map(torch.equal, map_gradients(), before))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base_converts_and_generates_on_a_cpu(tmp_path, new_llama, token_ids, quantization):
    pytest.importorskip("bitsandbytes")
    llama = new_llama(intermediate_size=128)
    llama.save_pretrained(tmp_path / "base")
    quantized = load_base(tmp_path / "base", dtype="float32", quantization=quantization, device="cpu")
    kind = type(quantized.model.layers[0].self_attn.q_proj).__name__
    assert kind == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    model = convert_base(quantized)
    assert model.model.layers[0].self_attn.q_proj is quantized.model.layers[0].self_attn.q_proj
    assert model.model.layers[0].self_attn.feature_map_q.weight.dtype == torch.float32
    assert getattr(model, "is_loaded_in_4bit", False) == (quantization == "nf4")
    ids_BL = token_ids(2, 9)
    with torch.no_grad():
        logits, exact = model(ids_BL).logits, convert_base(llama)(ids_BL).logits
    assert logits.isfinite().all()
    correlation = torch.corrcoef(torch.stack([logits.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.9, "quantization changes logits a little, not beyond recognition"
    whole = model.generate(ids_BL, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids_BL, max_new_tokens=5, do_sample=False), whole)
    model.train()
    model(ids_BL, labels=ids_BL).loss.backward()
    assert model.model.layers[0].self_attn.feature_map_q.weight.grad.abs().max() > 0


def test_unknown_quantization_and_no_bitsandbytes(folder, monkeypatch):
    refused(folder, "quantization 'nf3' is unknown; known: nf4, int8", quantization="nf3")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    refused(folder, "needs bitsandbytes, which cannot be imported here", quantization="nf4")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.1.self_attn.q_norm.weight"]
)
def test_tensors_that_the_config_has_no_place_for(folder, name):
    """transformers drops them: what is left is another model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    harmless = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {harmless: torch.ones(4)}, file, metadata={"format": "pt"})
    load_base(folder, dtype="float32")
    save_file(tensors | {name: torch.ones(4, 4)}, file, metadata={"format": "pt"})
    shape = shape_from_fields(json.loads((folder / "config.json").read_text()))
    for look in (lambda: load_base(folder, dtype="float32"), lambda: check_weights(folder, shape)):
        with pytest.raises(ModelError, match=rf"the weights hold {re.escape(name)}, which .* has no place for"):
            look()
