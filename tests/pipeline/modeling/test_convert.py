"""Conversion shares the base's weights; feature maps travel through safetensors with strict checks."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from hedgehog.pipeline.errors import ModelError
from hedgehog.pipeline.feature_map_file import read_feature_maps, write_feature_maps
from hedgehog.pipeline.modeling.convert import (
    convert_base,
    feature_map_metadata,
    feature_map_modules,
    load_feature_maps,
    load_hedgehog,
    save_feature_maps,
)

LEARNED = ["hedgehog_softmax", "hedgehog_exp", "hedgehog_joint", "relu"]


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in feature_map_modules(model).values():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def maps_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "feature_map" in name}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_shared_not_copied(new_base, token_ids, tied):
    base = new_base(tie_word_embeddings=tied)
    before = base(token_ids(1, 5)).logits
    model = convert_base(base)
    theirs = dict(base.named_parameters(remove_duplicate=False))
    ours = dict(model.named_parameters(remove_duplicate=False))
    place, attention = ("model.layers", "self_attn") if base.config.model_type == "llama" else ("transformer.h", "attn")
    assert set(ours) - set(theirs) == {
        f"{place}.{i}.{attention}.{name}.weight" for i in (0, 1) for name in ("feature_map_q", "feature_map_k")
    }
    for name, parameter in theirs.items():
        assert ours[name] is parameter
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert torch.equal(base(token_ids(1, 5)).logits, before), "the base itself must go on working"


@pytest.mark.parametrize("feature_map", LEARNED)
def test_maps_start_as_the_identity_in_float32(base, feature_map):
    model = convert_base(base.to(torch.bfloat16), feature_map=feature_map)
    for module in feature_map_modules(model).values():
        assert module.weight.dtype == torch.float32 and module.weight.requires_grad
        assert torch.equal(module.weight, torch.eye(16).expand(4, 16, 16))


def test_fields_reach_the_maps(base):
    model = convert_base(base, feature_map="performer", feature_dim=40, feature_map_seed=5, chunk_size=16)
    assert model.config.chunk_size == 16
    directions = [module.directions for module in feature_map_modules(model).values()]
    assert directions[0].shape == (4, 16, 40)
    other = convert_base(base, feature_map="performer", feature_dim=40, feature_map_seed=6)
    assert not torch.equal(next(iter(feature_map_modules(other).values())).directions, directions[0])
    scaled = convert_base(base, feature_map_options={"init_scale": 0.5})
    assert torch.equal(next(iter(feature_map_modules(scaled).values())).weight[0], torch.eye(16) / 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_map": "hedgehogs"}, "hedgehogs"),
        ({"feature_map": "elu", "feature_dim": 32}, "no projection"),
        ({"feature_map_options": {"initt": 1}}, "initt"),
        ({"attention_dropout": 0.2, "attn_pdrop": 0.2}, "(attention_dropout|attn_pdrop) is 0.2, but linear attention"),
    ],
)
def test_impossible_fields_are_a_model_error(base, fields, message):
    with pytest.raises(ModelError, match=message):
        convert_base(base, **fields)


def test_rope_frequencies_survive_a_cast_to_bfloat16(new_llama):
    llama = new_llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    exact = llama.model.rotary_emb.inv_freq.clone()
    model = convert_base(llama).to(torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_no_attention_weight_is_dropped_where_gpt2_did(new_gpt2):
    for attention in ("linear", "softmax"):
        assert convert_base(new_gpt2(attn_pdrop=0.1), attention=attention).config.attn_pdrop == 0
    with pytest.raises(ModelError, match="add_cross_attention"):
        convert_base(new_gpt2(), add_cross_attention=True)


@pytest.mark.parametrize("feature_map", [*LEARNED, "performer"])
def test_feature_maps_round_trip(base, tmp_path, feature_map):
    model = randomize(convert_base(base, feature_map=feature_map, feature_dim=24))
    save_feature_maps(tmp_path / "maps.safetensors", model, {"base_fingerprint": "abc"})
    assert [file.name for file in tmp_path.iterdir()] == ["maps.safetensors"]
    with safe_open(tmp_path / "maps.safetensors", framework="pt") as opened:
        weight = "directions" if feature_map == "performer" else "weight"
        assert set(opened.keys()) == {f"layers.{i}.feature_map_{side}.{weight}" for i in (0, 1) for side in "qk"}
    fresh = convert_base(base, feature_map=feature_map, feature_dim=24)
    metadata = load_feature_maps(tmp_path / "maps.safetensors", fresh)
    assert metadata == {
        "base_fingerprint": "abc",
        "feature_map": feature_map,
        "feature_dim": 24,
        "feature_map_options": {},
        "head_dim": 16,
        "num_attention_heads": 4,
    }
    for name, tensor in maps_of(model).items():
        assert torch.equal(maps_of(fresh)[name], tensor)
    loaded = load_hedgehog(base, tmp_path / "maps.safetensors", chunk_size=16)  # takes the file's kind of map
    assert (loaded.config.feature_map, loaded.config.feature_dim, loaded.config.chunk_size) == (feature_map, 24, 16)
    for name, tensor in maps_of(model).items():
        assert torch.equal(maps_of(loaded)[name], tensor)


def test_maps_of_a_subset_of_layers(base, tmp_path):
    model = randomize(convert_base(base))
    file = tmp_path / "layer1.safetensors"
    save_feature_maps(file, model, layers=[1])
    tensors, _ = read_feature_maps(file)
    assert set(tensors) == {"layers.1.feature_map_q.weight", "layers.1.feature_map_k.weight"}
    fresh = convert_base(base)
    start = {name: tensor.clone() for name, tensor in maps_of(fresh).items()}
    with pytest.raises(ModelError, match=r"lacks layers\.0\.feature_map_q\.weight; distill layer 0"):
        load_feature_maps(file, fresh)
    assert all(torch.equal(maps_of(fresh)[name], tensor) for name, tensor in start.items()), "a refused file changed it"
    load_feature_maps(file, fresh, layers=[1])
    for name, tensor in maps_of(fresh).items():
        assert torch.equal(tensor, maps_of(model)[name] if ".1." in name else start[name])
    with pytest.raises(ModelError, match=r"layers \[7\] do not exist"):
        load_feature_maps(file, fresh, layers=[7])
    # a dict of tensors and the metadata: what a merge writes
    write_feature_maps(tmp_path / "again.safetensors", tensors, feature_map_metadata(model.config))
    assert set(read_feature_maps(tmp_path / "again.safetensors")[0]) == set(tensors)
    with pytest.raises(ValueError, match="lacks feature_map"):
        write_feature_maps(tmp_path / "bad.safetensors", tensors, {"head_dim": 16})


def test_files_that_do_not_fit(base, new_base, tmp_path):
    file = tmp_path / "maps.safetensors"
    save_feature_maps(file, convert_base(base))
    for other, message in (
        (convert_base(base, feature_map="hedgehog_exp"), "feature_map = 'hedgehog_softmax', the model has"),
        (convert_base(base, feature_dim=8), "feature_dim = 16, the model has 8"),
        (convert_base(new_base(num_attention_heads=8), feature_dim=16), "head_dim = 16, the model has 8"),
        (convert_base(new_base(num_hidden_layers=3)), "lacks layers.2"),
    ):
        with pytest.raises(ModelError, match=message):
            load_feature_maps(file, other)
    tensors, metadata = read_feature_maps(file)
    tensors["layers.0.feature_map_q.weight"] = torch.zeros(4, 16, 8)
    write_feature_maps(file, tensors, metadata)
    with pytest.raises(ModelError, match=r"has shape \(4, 16, 8\), the model needs \(4, 16, 16\)"):
        load_feature_maps(file, convert_base(base))


def test_files_that_are_no_maps(base, tmp_path):
    model = convert_base(base)
    with pytest.raises(ModelError, match=r"missing\.safetensors: there is no such file"):
        load_feature_maps(tmp_path / "missing.safetensors", model)
    file = tmp_path / "maps.safetensors"
    save_feature_maps(file, model)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"maps\.safetensors: truncated"):
        load_feature_maps(file, model)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="not a file of feature maps"):
        load_feature_maps(tmp_path / "base" / "model.safetensors", model)


def test_dynamic_rotations_depend_on_nothing_that_came_before(new_llama):
    """transformers keeps the frequencies of the longest row it has seen: a resumed run would end otherwise."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = convert_base(new_llama(max_position_embeddings=16, rope_parameters=scaling), attention="softmax").eval()
    plain = new_llama(max_position_embeddings=16, rope_parameters=scaling).eval()
    ids = torch.arange(3, 43).remainder(50).unsqueeze(0)
    with torch.no_grad():
        first = [model(ids[:, :length]).logits for length in (10, 24, 16)]
        model(ids)
        again = [model(ids[:, :length]).logits for length in (10, 24, 16)]
        torch.testing.assert_close(first[1], plain(ids[:, :24]).logits)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
