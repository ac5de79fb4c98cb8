"""The whole model on the kernels (emulated) against the same model on PyTorch, both bf16: roundings apart, the same."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from hedgehog.kernels.cuda import gradients
from hedgehog.pipeline.modeling.convert import convert_base

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the emulated kernels need g++ on Linux"
)


@pytest.fixture
def models(new_base):
    """(on PyTorch, on the emulated kernels), the same weights; two query heads of 64 (a Llama's share a key head)."""

    def make(*, num_layers=2, **config):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        base = new_base(hidden_size=128, num_hidden_layers=num_layers, **heads)
        models = []
        for backend in ("torch", "emulated"):
            torch.manual_seed(0)
            model = convert_base(base, attention_backend=backend, **config).to(torch.bfloat16).eval()
            for name, weight in model.named_parameters():
                if "feature_map" in name:  # bf16 numbers, as the kernel will round them
                    weight.data.add_(0.05 * torch.randn_like(weight)).copy_(weight.data.bfloat16())
            models.append(model)
        return models

    return make


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "relu"])
def test_logits_of_a_padded_batch(models, feature_map, token_ids, left_padded):
    on_torch, on_kernels = models(feature_map=feature_map, feature_dim=64 if feature_map != "relu" else 128)
    ids, mask = left_padded([token_ids(1, 70)[0], token_ids(1, 9, seed=1)[0]])
    with torch.no_grad():
        expected, logits = (model(ids, attention_mask=mask).logits.float() for model in (on_torch, on_kernels))
    real = mask.bool()
    assert (logits - expected)[real].norm() <= 0.02 * expected[real].norm()
    backend = on_kernels.decoder._attention_backend(torch.device("cpu"), torch.bfloat16)
    assert (backend.name, backend.fused is not None) == ("emulated", feature_map == "hedgehog_softmax")


def test_prefill_and_decoding(models, token_ids):
    on_torch, on_kernels = models(feature_map="hedgehog_exp", feature_dim=64)
    ids = token_ids(1, 12)
    logits = []
    with torch.no_grad():
        for model in (on_torch, on_kernels):
            cache = model(ids[:, :9], use_cache=True).past_key_values
            steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(9, 12)]
            logits.append(torch.cat(steps, dim=1).float())
    assert (logits[1] - logits[0]).norm() <= 0.02 * logits[0].norm()


def test_training_step(models, token_ids):
    ids = token_ids(2, 20)
    gradients = []
    for model in models(feature_map="hedgehog_softmax", feature_dim=64):
        model.train()
        model(ids, labels=ids).loss.backward()
        attention = next(model.decoder.attentions())
        names = ("k_proj", "v_proj") if hasattr(attention, "k_proj") else ("c_attn",)
        gradients.append([getattr(attention, name).weight.grad for name in ("feature_map_q", *names)])
    for expected, ours in zip(*gradients, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours - expected).float().norm() <= 0.1 * expected.float().norm()


def gradients_of(model, compiled, ids):
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_compiled_training_runs_the_kernels(models, token_ids, monkeypatch):
    """One graph, forward and backward, with the check that a GPU makes of the backward kernels."""
    model = models(feature_map="hedgehog_softmax", feature_dim=64, num_layers=1)[1].train()
    ids = token_ids(1, 20)
    expected = gradients_of(model, model, ids)
    monkeypatch.setattr(gradients, "UNCHECKED_DEVICES", ())
    gradients.backward_obstacle.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients_of(model, compiled, ids)
    assert gradients.backward_obstacle(torch.device("cpu"), 128, 64, "hedgehog_softmax") is None
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name

    monkeypatch.setattr(gradients, "backward_obstacle", lambda *_: "they are not there")
    monkeypatch.setattr(gradients, "backward_kernels", None)
    for name, grad in gradients_of(model, compiled, ids).items():
        assert (grad - expected[name]).float().norm() <= 0.1 * expected[name].float().norm(), name
    torch._dynamo.reset()


def test_decoding_follows_weights_that_change(models, token_ids):
    model = models(feature_map="hedgehog_softmax", feature_dim=64)[1]
    ids = token_ids(1, 10)

    def logits():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        return model(ids[:, 9:], past_key_values=cache).logits

    with torch.no_grad():
        before = logits()
        weight = next(model.decoder.attentions()).feature_map_q.weight
        weight.mul_(-1)
        changed = logits()
        assert not torch.equal(changed, before)
        weight.mul_(-1)
        assert torch.equal(logits(), before)
        model.train()
        weight.data.mul_(-1)  # as DeepSpeed's optimizers write
        model.eval()
        assert torch.equal(logits(), changed)
    with torch.inference_mode():
        assert torch.equal(logits(), changed)
        for name, weight in list(model.named_parameters()):
            model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(
                weight.clone(), requires_grad=False
            )
        assert torch.equal(logits(), changed)


def test_the_choice_and_a_fallback_are_reported_once(models, token_ids, monkeypatch):
    model = models(feature_map="hedgehog_softmax", feature_dim=64)[1]
    said = []
    model.decoder.report = said.append
    for _ in range(2):
        model(token_ids(1, 9))
    assert said == ["linear attention: emulated (requested; φ inside the kernel)"]
    monkeypatch.setattr("hedgehog.kernels.cuda.attention.backward_obstacle", lambda *_: "they fail here")
    model.train()
    model(token_ids(1, 9))
    assert said[1:] == [said[0].replace(")", "; gradients by PyTorch: they fail here)")]
