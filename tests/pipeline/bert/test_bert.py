"""A converted BERT: the numbers of transformers where it must have them, attention written down where it has not."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

from hedgehog.kernels.feature_maps import FEATURE_MAPS
from hedgehog.kernels.linear_attention import quadratic_linear_attention
from hedgehog.pipeline.base_folder import check_weights
from hedgehog.pipeline.bert.configuration_hedgehog_bert import HedgehogBertConfig
from hedgehog.pipeline.bert.shape import BertShape
from hedgehog.pipeline.errors import ModelError
from hedgehog.pipeline.families import HUB_SHAPES, family_of_config, shape_from_fields
from hedgehog.pipeline.modeling.convert import convert_base, feature_map_modules, load_feature_maps, save_feature_maps
from hedgehog.pipeline.modeling.load_base import load_base
from hedgehog.pipeline.modeling.shipping import ship_modeling_files
from hedgehog.pipeline.modeling.teacher import TeacherForward

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.1,
}


def make_bert(**fields: Any) -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return BertForSequenceClassification(BertConfig(**{**SIZES, **fields})).eval()


@pytest.fixture
def base() -> BertForSequenceClassification:
    return make_bert()


def a_batch(pad: str = "right") -> dict[str, torch.Tensor]:
    """Pairs of 9 and 6 tokens."""
    random = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.long)
    if pad == "right":
        mask[1, 6:] = 0
    elif pad == "holes":
        mask[1, 2::3] = 0
    types = torch.zeros(2, 9, dtype=torch.long)
    types[:, 4:] = 1
    ids = torch.randint(5, 97, (2, 9), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("pad", ["none", "right", "holes"])
def test_with_softmax_attention_it_is_that_bert(base, pad):
    model, batch = convert_base(base, attention="softmax"), a_batch(pad)
    expected = base(**batch, output_hidden_states=True)
    found = model(**batch, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    for state, right in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(state, right)
    labels = torch.tensor([2, 0])
    assert torch.equal(model(**batch, labels=labels).loss, base(**batch, labels=labels).loss)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("pad", ["none", "right", "holes"])
def test_linear_attention_is_its_definition_in_every_layer(base, pad, name):
    model, batch = convert_base(base, feature_map=name).double(), a_batch(pad)
    for parameter in (p for module in feature_map_modules(model).values() for p in module.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
    bert, real = model.bert, batch["attention_mask"].bool()
    hidden = bert.embeddings(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
    for layer in bert.encoder.layer:
        attention = layer.attention.self
        q, k, v = (getattr(attention, n)(hidden).view(2, 9, 4, 16).transpose(1, 2) for n in ("query", "key", "value"))
        positions = torch.arange(9).expand(2, 9)
        phi_q, phi_k = attention.feature_map_q(q, positions), attention.feature_map_k(k, positions)
        o = quadratic_linear_attention(phi_q, phi_k, v, causal=False, mask_BL=real)
        hidden = layer.attention.output(o.transpose(1, 2).reshape(2, 9, 64), hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    found = model(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found[real], hidden[real])
    torch.testing.assert_close(model(**batch).logits, model.classifier(bert.pooler(hidden)))


def test_padding_changes_nothing(base):
    model, batch = convert_base(base), a_batch("right")
    whole = model(**batch).logits
    alone = model(**{name: x[1:, :6] for name, x in batch.items()}).logits
    torch.testing.assert_close(whole[1:], alone)
    batch["input_ids"][1, 6:] = 5
    assert torch.equal(model(**batch).logits, whole)


def test_a_later_token_is_seen_by_those_before_it(base):
    model, batch = convert_base(base), a_batch("none")
    before = model(**batch, output_hidden_states=True).hidden_states[-1][:, 0]
    batch["input_ids"][:, -1] = 7
    assert not torch.allclose(model(**batch, output_hidden_states=True).hidden_states[-1][:, 0], before)


def test_everything_is_shared_and_dropout_of_attention_left_out(base):
    model = convert_base(base)
    assert base.config.attention_probs_dropout_prob == 0.1 and model.config.attention_probs_dropout_prob == 0
    own = {id(p) for module in feature_map_modules(model).values() for p in module.parameters()}
    of_base = {id(p) for p in base.parameters()}
    assert {id(p) for p in model.parameters()} == own | of_base
    assert set(dict(model.named_parameters())) - set(dict(base.named_parameters())) == {
        f"bert.encoder.layer.{layer}.attention.self.feature_map_{side}.weight" for layer in (0, 1) for side in "qk"
    }
    assert model.config.id2label == base.config.id2label and model.config.num_labels == 3


@pytest.mark.parametrize("pad", ["none", "right", "holes"])
def test_the_teacher_is_the_base_layer_by_layer(base, pad):
    batch, seen = a_batch(pad), []
    hooks = [
        layer.attention.self.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        for layer in base.bert.encoder.layer
    ]
    base(**batch)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool()
    layers = list(
        TeacherForward(base)(
            batch["input_ids"],
            mask_BL=batch["attention_mask"],
            token_type_ids_BL=batch["token_type_ids"],
            position_ids_BL=torch.arange(9).expand(2, 9),
        )
    )
    assert [layer.layer_index for layer in layers] == [0, 1] and not any(layer.is_causal for layer in layers)
    for layer, expected in zip(layers, seen, strict=True):
        o = layer.o_BHLV.transpose(1, 2).reshape(2, 9, 64)
        torch.testing.assert_close(o[real], expected[real], rtol=1e-4, atol=1e-5)
        assert (o[~real] == 0).all()
        logits = (layer.q_BHLD @ layer.k_BKLD.transpose(-1, -2) * layer.scale).masked_fill(~real[:, None, None], -1e30)
        by_hand = (logits.softmax(-1) @ layer.v_BKLV).transpose(1, 2).reshape(2, 9, 64)
        torch.testing.assert_close(by_hand[real], expected[real], rtol=1e-4, atol=1e-5)


def test_the_teacher_counts_positions_of_padded_rows_from_the_first_token(base):
    """prepare pads on the right, where this is what BERT does by itself."""
    batch = a_batch("right")
    *_, last = TeacherForward(base)(batch["input_ids"], mask_BL=batch["attention_mask"])
    *_, alone = TeacherForward(base)(batch["input_ids"][1:, :6])
    torch.testing.assert_close(last.o_BHLV[1:, :, :6], alone.o_BHLV)


def test_packed_rows_are_refused(base):
    ids = a_batch()["input_ids"]
    with pytest.raises(ValueError, match="padded, not packed"):
        next(iter(TeacherForward(base)(ids, segment_ids_BL=torch.zeros_like(ids))))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_maps_and_head(base, checkpointed):
    model = convert_base(base).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    model(**a_batch(), labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    maps = [p for module in feature_map_modules(model).values() for p in module.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in maps)


def test_bfloat16_keeps_maps_in_float32(base):
    model = convert_base(base).to(torch.bfloat16)
    assert {p.dtype for module in feature_map_modules(model).values() for p in module.parameters()} == {torch.float32}
    low, exact = model(**a_batch()).logits, convert_base(make_bert())(**a_batch()).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)


def test_maps_go_to_a_file_and_back(base, tmp_path):
    model, other = convert_base(base, feature_dim=8), convert_base(base, feature_dim=8)
    for module in feature_map_modules(model).values():
        for parameter in module.parameters():
            parameter.data.normal_()
    save_feature_maps(tmp_path / "maps.safetensors", model)
    load_feature_maps(tmp_path / "maps.safetensors", other)
    assert torch.equal(model(**a_batch()).logits, other(**a_batch()).logits)


def test_what_runs_is_said_once(base):
    model, said = convert_base(base), []
    model.report_to(said.append)
    model(**a_batch()), model(**a_batch())
    assert len(said) == 1 and "linear attention" in said[0]


@pytest.mark.parametrize(
    "fault,words",
    [
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, "attention_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"encoder_hidden_states": torch.zeros(2, 9, 64)}, "encoder_hidden_states"),
        ({"inputs_embeds": torch.zeros(2, 9, 64)}, "exactly one"),
        ({"input_ids": torch.zeros(2, 33, dtype=torch.long), "attention_mask": None, "token_type_ids": None}, "33"),
    ],
)
def test_what_does_not_fit_is_named(base, fault, words):
    with pytest.raises(ValueError, match=words):
        convert_base(base)(**{**a_batch(), **fault})


def test_a_bert_that_decodes_is_refused(base):
    with pytest.raises(ModelError, match="is_decoder"):
        convert_base(make_bert(is_decoder=True))
    with pytest.raises(ModelError, match="is_decoder"):
        shape_from_fields({**BertConfig(**SIZES, is_decoder=True).to_dict()})
    with pytest.raises(ValueError, match="attention_probs_dropout_prob"):
        HedgehogBertConfig(attention_probs_dropout_prob=0.1)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_are_refused(kind):
    """transformers would read such a checkpoint as one with absolute positions."""
    with pytest.raises(ModelError, match=f"position_embedding_type '{kind}'"):
        shape_from_fields({**BertConfig(**SIZES).to_dict(), "position_embedding_type": kind})


def test_what_a_bases_config_says_of_outputs_is_not_carried_on(base, tmp_path):
    base.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"return_dict": False, "output_hidden_states": True, "problem_type": "multi_label_classification"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    names = [f"class {number}" for number in range(base.config.num_labels)]
    loaded = load_base(tmp_path, dtype="float32", label_names=names)
    assert type(loaded.config.return_dict) is bool and loaded.config.return_dict
    assert loaded.config.problem_type == "single_label_classification"
    outputs = convert_base(loaded)(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([1]))
    assert outputs.hidden_states is None
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([1]))
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("field", [{"hidden_act": "nonsense"}, {"hidden_dropout_prob": 1.5}])
def test_a_config_that_makes_no_model_is_one_message(base, tmp_path, field):
    base.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | field))
    with pytest.raises(ModelError, match=r"cannot load it as a BERT|not a valid BERT configuration"):
        load_base(tmp_path, dtype="float32")


@pytest.mark.parametrize("name", ["bert.pooler.dense.bias", "classifier.weight"])
def test_half_a_module_of_the_head_is_a_damaged_file(base, tmp_path, name):
    base.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"the weights lack {name}"):
        load_base(tmp_path, dtype="float32", label_names=("a", "b", "c"))


def test_shapes_on_the_meta_device(base):
    """As for counting a model's work without computing."""
    model = convert_base(base).to("meta")
    for train in (False, True):
        model.train(train)
        batch = {name: tensor.to("meta") for name, tensor in a_batch().items()}
        assert model(**batch).logits.shape == (2, 3)


def test_the_shape_is_that_of_the_model(base):
    shape = shape_from_fields(base.config.to_dict())
    assert isinstance(shape, BertShape) and shape.is_encoder
    assert family_of_config(convert_base(base).config) is BertShape
    found = {name: tuple(p.shape) for name, p in base.named_parameters()}
    head = {name for name in found if name.startswith(("classifier.", "bert.pooler."))}
    assert {name: sizes for name, sizes in found.items() if name not in head} == shape.tensor_shapes()
    of_classifier = sum(p.numel() for p in base.classifier.parameters())
    assert shape.num_weights == sum(p.numel() for p in base.parameters()) - of_classifier
    modules = dict(base.named_modules())
    for name, (inputs, outputs) in shape.linears.items():
        place = f"attention.self.{name}" if name in ("query", "key", "value") else name
        assert modules[f"bert.encoder.layer.1.{place}"].weight.shape == (outputs, inputs)
    assert HUB_SHAPES["google-bert/bert-base-uncased"].num_weights == 109_482_240


@pytest.mark.parametrize("kind", ["classifier", "pretrained", "oldest", "alone"])
def test_checkpoints_of_each_kind_are_whole(base, kind, tmp_path):
    """With a head, with those of pretraining, with the names that norms had once, and the encoder alone."""
    model = base if kind == "classifier" else BertForPreTraining(base.config)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind == "oldest":
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p
            for name, p in tensors.items()
        }
    if kind == "alone":
        tensors = {name.removeprefix("bert."): p for name, p in tensors.items() if name.startswith("bert.")}
    save_file(tensors, tmp_path / "model.safetensors")
    shape = shape_from_fields(base.config.to_dict())
    check_weights(tmp_path, shape)
    name = next(name for name in tensors if name.endswith("encoder.layer.1.output.dense.weight"))
    save_file({n: p for n, p in tensors.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lack"):
        check_weights(tmp_path, shape)


def test_an_exported_folder_loads_without_the_project(base, tmp_path):
    model = convert_base(base).eval()
    model.save_pretrained(tmp_path)
    ship_modeling_files(tmp_path)
    batch = a_batch()
    save_file({**batch, "logits": model(**batch).logits.detach().contiguous()}, tmp_path / "batch.safetensors")
    script = """
import sys
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
batch = load_file(sys.argv[1] + "/batch.safetensors")
expected = batch.pop("logits")
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert (model(**batch).logits - expected).abs().max() < 1e-5
assert not any(name.partition(".")[0] == "hedgehog" for name in sys.modules)
print(type(model).__name__)
"""
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "HedgehogBertForSequenceClassification"
    assert "AutoModelForSequenceClassification" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
