"""The config keeps its fields through JSON and refuses what cannot be."""

from __future__ import annotations

import json

import pytest

from hedgehog.pipeline.llama.configuration_hedgehog_llama import HedgehogLlamaConfig


def test_defaults_follow_the_model():
    config = HedgehogLlamaConfig(hidden_size=64, num_attention_heads=4)
    assert config.model_type == "hedgehog_llama"
    assert (config.feature_map, config.attention, config.attention_backend) == ("hedgehog_softmax", "linear", "auto")
    assert config.feature_dim == config.head_dim == 16
    assert config.feature_map_options == {}
    assert 0 < config.attention_eps < 1e-20  # far below the smallest denominator


def test_round_trip(tmp_path):
    fields = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "feature_map": "hedgehog_exp",
        "feature_dim": 24,
        "feature_map_options": {"init": "identity"},
        "feature_map_seed": 3,
        "attention_eps": 1e-25,
        "chunk_size": 32,
        "attention_backend": "torch",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    }
    HedgehogLlamaConfig(**fields).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hedgehog_llama"
    loaded = HedgehogLlamaConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(loaded, name) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_map": "hedgehog"}, "feature_map: 'hedgehog' is unknown; known: .*hedgehog_softmax"),
        ({"attention": "flash"}, "attention: 'flash' is unknown; known: linear, softmax"),
        ({"feature_dim": 0}, "feature_dim: expected a whole number"),
        ({"feature_dim": 2.5}, "feature_dim: expected a whole number"),
        ({"chunk_size": True}, "chunk_size: expected a whole number"),
        ({"attention_eps": -1e-9}, "attention_eps: expected a number"),
        ({"feature_map_options": ["identity"]}, "feature_map_options: expected a mapping"),
        ({"num_key_value_heads": 3}, "must be a multiple of"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, but linear attention"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HedgehogLlamaConfig(hidden_size=64, num_attention_heads=4, **fields)


def test_dropout_is_softmax_attentions_own():
    assert HedgehogLlamaConfig(attention="softmax", attention_dropout=0.1).attention_dropout == 0.1
