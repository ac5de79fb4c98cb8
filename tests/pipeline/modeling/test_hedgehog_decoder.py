"""The model as a function: recurrent, chunked, packed and padded forms agree; dtypes, losses, gradients."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from hedgehog.kernels.backends import Backend
from hedgehog.kernels.feature_maps import FEATURE_MAPS
from hedgehog.kernels.linear_attention import quadratic_linear_attention
from hedgehog.pipeline.modeling import hedgehog_decoder
from hedgehog.pipeline.modeling.architecture import architecture_of
from hedgehog.pipeline.modeling.convert import convert_base
from hedgehog.pipeline.modeling.hedgehog_cache import CACHE_NAME, HedgehogCache
from hedgehog.pipeline.modeling.hedgehog_decoder import HedgehogCausalLM

ALL_MAPS = sorted(FEATURE_MAPS)


def perturbed(model: HedgehogCausalLM) -> HedgehogCausalLM:
    """Feature maps away from the identity, different for q and k and in each head."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "feature_map" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def projection(model: Any, layer: int) -> torch.nn.Module:
    """The first projection of a layer's attention."""
    family = architecture_of(model)
    return getattr(getattr(family.layers(model)[layer], family.attention_name), family.of_attention[0])


@pytest.fixture
def hedgehog(base) -> HedgehogCausalLM:
    return perturbed(convert_base(base, chunk_size=8))


@torch.no_grad()
def test_logits_of_a_llama_follow_the_definition(llama, token_ids):
    """Layer by layer with the quadratic oracle, φ and repeated key heads written out."""
    hedgehog: Any = perturbed(convert_base(llama, chunk_size=8))
    ids_BL = token_ids(2, 19)
    hidden = hedgehog.model.embed_tokens(ids_BL)
    position_embeddings = hedgehog.model.rotary_emb(hidden, torch.arange(19)[None].expand(2, -1))
    for layer in hedgehog.model.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            projection(normed).view(2, 19, -1, 16).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        z_q = torch.einsum("bhld,hdf->bhlf", q, attention.feature_map_q.weight)
        z_k = torch.einsum("bhld,hdf->bhlf", repeat_kv(k, 2), attention.feature_map_k.weight)
        phi_q, phi_k = (torch.cat([z.softmax(-1), (-z).softmax(-1)], -1) for z in (z_q, z_k))
        o = quadratic_linear_attention(phi_q.double(), phi_k.double(), v.double()).float()
        hidden = hidden + attention.o_proj(o.transpose(1, 2).reshape(2, 19, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    expected = hedgehog.lm_head(hedgehog.model.norm(hidden))
    torch.testing.assert_close(hedgehog(ids_BL).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_logits_of_a_gpt2_follow_the_definition(gpt2, token_ids):
    hedgehog: Any = perturbed(convert_base(gpt2, chunk_size=8))
    ids_BL = token_ids(2, 19)
    decoder = hedgehog.transformer
    hidden = decoder.wte(ids_BL) + decoder.wpe.weight[:19]
    for block in decoder.h:
        q, k, v = (
            x.view(2, 19, 4, 16).transpose(1, 2)
            for x in (block.ln_1(hidden) @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, dim=-1)
        )
        z_q = torch.einsum("bhld,hdf->bhlf", q, block.attn.feature_map_q.weight)
        z_k = torch.einsum("bhld,hdf->bhlf", k, block.attn.feature_map_k.weight)
        phi_q, phi_k = (torch.cat([z.softmax(-1), (-z).softmax(-1)], -1) for z in (z_q, z_k))
        o = quadratic_linear_attention(phi_q.double(), phi_k.double(), v.double()).float()
        hidden = hidden + block.attn.c_proj(o.transpose(1, 2).reshape(2, 19, -1))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    expected = hedgehog.lm_head(decoder.ln_f(hidden))
    torch.testing.assert_close(hedgehog(ids_BL).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_map", ALL_MAPS)
@torch.no_grad()
def test_recurrent_equals_parallel(base, token_ids, feature_map):
    model = perturbed(convert_base(base, feature_map=feature_map, chunk_size=8))
    ids_BL = token_ids(2, 21)
    whole = model(ids_BL, use_cache=False).logits
    cache, steps = HedgehogCache(2), []
    for t in range(21):
        steps.append(model(ids_BL[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("pieces", [(13, 8), (1, 20), (7, 7, 1, 6), (20, 1)])
@torch.no_grad()
def test_pieces_of_any_size_equal_the_whole(hedgehog, token_ids, pieces):
    ids_BL = token_ids(2, 21)
    whole = hedgehog(ids_BL, use_cache=False).logits
    cache, logits, start = None, [], 0
    for length in pieces:
        out = hedgehog(ids_BL[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + length
        logits.append(out.logits)
        assert cache.get_seq_length() == start
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("feature_map", ["hedgehog_softmax", "cosformer", "relu"])
@torch.no_grad()
def test_left_padding_changes_no_logit(base, token_ids, left_padded, feature_map):
    model = perturbed(convert_base(base, feature_map=feature_map, chunk_size=8))
    short, long = token_ids(1, 9, seed=1)[0], token_ids(1, 22, seed=2)[0]
    alone = model(short[None]).logits
    ids_BL, mask_BL = left_padded([short, long])
    together = model(ids_BL, attention_mask=mask_BL)
    torch.testing.assert_close(together.logits[0, -9:], alone[0], rtol=1e-4, atol=1e-5)
    # a batch of one with a mask is no special case
    one = model(ids_BL[:1], attention_mask=mask_BL[:1])
    torch.testing.assert_close(one.logits[0, -9:], alone[0], rtol=1e-4, atol=1e-5)
    # and what went into the state is the real tokens only
    next_token = torch.tensor([[5], [6]])
    grown_mask = torch.cat([mask_BL, torch.ones(2, 1, dtype=torch.long)], 1)
    for mask in (grown_mask, grown_mask[:, -1:], None):
        cache = model(ids_BL, attention_mask=mask_BL).past_key_values
        step = model(next_token, attention_mask=mask, past_key_values=cache)
        expected = model(torch.cat([short, torch.tensor([5])])[None]).logits[0, -1]
        torch.testing.assert_close(step.logits[0, -1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_tokens_themselves_do_not_matter(hedgehog, token_ids, left_padded):
    ids_BL, mask_BL = left_padded([token_ids(1, 9)[0], token_ids(1, 14)[0]])
    other_ids_BL = torch.where(mask_BL.bool(), ids_BL, 33)
    logits, other = (hedgehog(ids, attention_mask=mask_BL).logits for ids in (ids_BL, other_ids_BL))
    assert torch.equal(logits[mask_BL.bool()], other[mask_BL.bool()])
    assert logits.isfinite().all()


@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_segments_equal_separate_sequences(base, token_ids, attention, implementation):
    base.config._attn_implementation = implementation
    model = convert_base(base, attention=attention, chunk_size=8)
    a, b, c = token_ids(1, 5, seed=1)[0], token_ids(1, 11, seed=2)[0], token_ids(1, 3, seed=3)[0]
    padding = torch.zeros(4, dtype=torch.long)
    ids_BL = torch.cat([a, b, c, padding])[None]
    # an id may come back later: runs count, not ids
    segment_ids = torch.tensor([[4] * 5 + [9] * 11 + [4] * 3 + [0] * 4])
    mask_BL = torch.tensor([[1] * 19 + [0] * 4])
    packed = model(ids_BL, segment_ids=segment_ids, attention_mask=mask_BL).logits[0, :19]
    separate = torch.cat([model(ids[None]).logits[0] for ids in (a, b, c)])
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)
    explicit = torch.tensor([[*range(5), *range(11), *range(3), 0, 0, 0, 0]])
    given = model(ids_BL, segment_ids=segment_ids, attention_mask=mask_BL, position_ids=explicit).logits[0, :19]
    assert torch.equal(given, packed)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_packed_loss_is_the_loss_of_the_separate_sequences(base, token_ids, attention):
    model = convert_base(base, attention=attention)
    a, b = token_ids(1, 6, seed=1)[0], token_ids(1, 9, seed=2)[0]
    packed_ids = torch.cat([a, b])[None]
    segment_ids = torch.tensor([[0] * 6 + [1] * 9])
    packed = model(packed_ids, segment_ids=segment_ids, labels=packed_ids).loss
    losses = [model(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in (a, b)]
    torch.testing.assert_close(packed, sum(losses) / 13, rtol=1e-5, atol=1e-6)
    per_token = model(packed_ids, segment_ids=segment_ids, labels=packed_ids, num_items_in_batch=26).loss
    torch.testing.assert_close(per_token, packed / 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_softmax_attention_is_exactly_the_familys(base, token_ids, left_padded, implementation):
    base.config._attn_implementation = implementation
    model = convert_base(base, attention="softmax")
    assert not any("feature_map" in name for name in model.state_dict())
    ids_BL, mask_BL = left_padded([token_ids(1, 9)[0], token_ids(1, 14)[0]])
    for inputs in ({"input_ids": ids_BL}, {"input_ids": ids_BL, "attention_mask": mask_BL}):
        ours, theirs = model(**inputs), base(**inputs)
        assert torch.equal(ours.logits, theirs.logits)
        assert isinstance(ours.past_key_values, DynamicCache)
    labelled = {"input_ids": ids_BL, "labels": ids_BL, "attention_mask": mask_BL}
    assert torch.equal(model(**labelled).loss, base(**labelled).loss)
    options = {"attention_mask": mask_BL, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(ids_BL, **options), base.generate(ids_BL, **options))


@torch.no_grad()
def test_logits_to_keep_labels_and_hidden_states(hedgehog, token_ids):
    ids_BL = token_ids(2, 12)
    full = hedgehog(ids_BL, output_hidden_states=True)
    index = torch.tensor([0, 5, 11])
    for keep, kept in ((3, slice(-3, None)), (index, index)):
        logits = hedgehog(ids_BL, logits_to_keep=keep).logits
        torch.testing.assert_close(logits, full.logits[:, kept], rtol=1e-5, atol=1e-6)
    assert len(full.hidden_states) == 3
    assert torch.equal(hedgehog.lm_head(full.hidden_states[-1]), full.logits)
    labels = ids_BL.masked_fill(torch.arange(12)[None] < 4, -100)
    expected = torch.nn.functional.cross_entropy(full.logits[:, 3:-1].flatten(0, 1), ids_BL[:, 4:].flatten())
    torch.testing.assert_close(hedgehog(ids_BL, labels=labels).loss, expected)
    as_tuple = hedgehog(ids_BL, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected)
    embedded = hedgehog(inputs_embeds=hedgehog.get_input_embeddings()(ids_BL)).logits
    assert torch.equal(embedded, full.logits)


def gradients(model: HedgehogCausalLM, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    model(ids_BL, labels=ids_BL).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(base, token_ids, attention, use_reentrant):
    model = convert_base(base, attention=attention)
    ids_BL = token_ids(2, 17)
    plain = gradients(model, ids_BL)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = []
    projection(model, 0).register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, ids_BL)
    assert len(calls) == 2, "the layer was not recomputed"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def test_gradients_equal_those_of_the_quadratic_form(base, token_ids):
    """The chunked autograd function inside the model against autograd through all L × L scores."""
    model = perturbed(convert_base(base, chunk_size=4))
    ids_BL = token_ids(2, 13)
    chunked = gradients(model, ids_BL)

    def quadratic(phi_q, phi_k, v, *, eps, initial_state, chunk_size, return_state, **masks):
        assert initial_state is None and not return_state
        return quadratic_linear_attention(phi_q, phi_k, v, eps=eps, **masks), None

    model.decoder._attention_backend = lambda device, dtype: Backend("quadratic", "a test", quadratic)
    for name, gradient in gradients(model, ids_BL).items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradient_flows_through_the_state(hedgehog, token_ids):
    """Reading a text in two parts with gradients on is the same computation as reading it whole."""
    ids_BL = token_ids(1, 12)
    weight = next(hedgehog.decoder.attentions()).feature_map_k.weight
    whole = torch.autograd.grad(hedgehog(ids_BL, use_cache=False).logits[0, -1].sum(), weight)[0]
    for last in (1, 4):
        cache = hedgehog(ids_BL[:, :-last], use_cache=True).past_key_values
        out = hedgehog(ids_BL[:, -last:], past_key_values=cache)
        in_two = torch.autograd.grad(out.logits[0, -1].sum(), weight)[0]
        torch.testing.assert_close(in_two, whole, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss(hedgehog, token_ids):
    ids_BL = token_ids(4, 16)
    hedgehog.train()
    optimizer = torch.optim.Adam(hedgehog.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = hedgehog(ids_BL, labels=ids_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_training_makes_no_cache_unless_asked(hedgehog, token_ids):
    hedgehog.train()
    assert hedgehog(token_ids(1, 4)).past_key_values is None
    assert isinstance(hedgehog(token_ids(1, 4), use_cache=True).past_key_values, HedgehogCache)
    hedgehog.eval()
    assert isinstance(hedgehog(token_ids(1, 4)).past_key_values, HedgehogCache)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
@torch.no_grad()
def test_feature_maps_and_state_stay_float32(hedgehog, token_ids, cast):
    before = {name: tensor.clone() for name, tensor in hedgehog.state_dict().items() if "feature_map" in name}
    model = cast(hedgehog)
    assert model.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), f"{name} was rounded"
    out = model(token_ids(2, 9))
    assert out.logits.dtype == model.lm_head.weight.dtype
    model(token_ids(2, 1), past_key_values=out.past_key_values)
    for layer in out.past_key_values.layers:
        assert layer.state.kv_state_BHFV.dtype == layer.state.k_sum_BHF.dtype == torch.float32
    assert next(hedgehog.double().decoder.attentions()).feature_map_q.weight.dtype == torch.float64


def test_autocast_leaves_the_feature_maps_alone(hedgehog, token_ids, monkeypatch):
    """Nor does it touch them where the backward pass computes φ again."""
    seen, feature_map = [], next(hedgehog.decoder.attentions()).feature_map_q
    activate = feature_map.activate
    monkeypatch.setattr(feature_map, "activate", lambda *args: seen.append(activate(*args)) or seen[-1])
    ids_BL = token_ids(1, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hedgehog(ids_BL, labels=ids_BL).loss.backward()
    assert len(seen) == 2
    for phi in seen:
        assert phi.dtype == torch.float32
        sums = phi.sum(-1)  # two softmaxes in fp32, not bf16
        torch.testing.assert_close(sums, torch.full_like(sums, 2.0), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_cache_has_two_names(hedgehog, token_ids):
    """transformers says `cache` from 5.24 on, and `past_key_values` before."""
    ids_BL = token_ids(2, 11)
    whole = hedgehog(ids_BL).logits[:, 7:]
    for name in ("past_key_values", "cache"):
        seen = getattr(hedgehog(ids_BL[:, :7], use_cache=True), CACHE_NAME)
        torch.testing.assert_close(hedgehog(ids_BL[:, 7:], **{name: seen}).logits, whole, rtol=1e-4, atol=1e-5)
    one, other = (getattr(hedgehog(ids_BL, use_cache=True), CACHE_NAME) for _ in range(2))
    with pytest.raises(ValueError, match="two names of one argument"):
        hedgehog(ids_BL, past_key_values=one, cache=other)


@torch.no_grad()
def test_layers_that_get_no_cache_are_noticed(hedgehog, token_ids, monkeypatch):
    """As when a version of transformers calls it by a third name."""
    monkeypatch.setattr(hedgehog_decoder, "CACHE_NAME", "memory")
    with pytest.raises(RuntimeError, match=r"does not hand layers their cache as 'memory'.*use_cache=False"):
        hedgehog(token_ids(2, 11), use_cache=True)


@torch.no_grad()
def test_offloaded_weights_come_when_they_are_needed(hedgehog, token_ids):
    """As with `device_map` and too little memory: a hook of each module fetches its own."""
    import accelerate

    ids_BL = token_ids(2, 11)
    expected = hedgehog(ids_BL).logits
    offloaded = accelerate.cpu_offload(hedgehog, execution_device=torch.device("cpu"))
    assert next(offloaded.decoder.attentions()).feature_map_q.weight.device.type == "meta"
    torch.testing.assert_close(offloaded(ids_BL).logits, expected)


def test_a_parameter_of_a_map_beside_its_projection_learns(hedgehog, token_ids):
    feature_map = next(hedgehog.decoder.attentions()).feature_map_q
    feature_map.temperature = torch.nn.Parameter(torch.ones(()))
    activate = feature_map.activate
    feature_map.activate = lambda z, positions: activate(z * feature_map.temperature, positions)
    ids_BL = token_ids(2, 11)
    hedgehog(ids_BL, labels=ids_BL).loss.backward()
    assert feature_map.temperature.grad.abs() > 0 and feature_map.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_save_and_load(hedgehog, token_ids, tmp_path, dtype):
    hedgehog.to(dtype).save_pretrained(tmp_path)
    loaded = type(hedgehog).from_pretrained(tmp_path, dtype=dtype).eval()
    loaded.config._name_or_path = hedgehog.config._name_or_path
    assert loaded.config.to_dict() == hedgehog.config.to_dict()
    for name, tensor in hedgehog.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids_BL = token_ids(2, 11)
    with torch.no_grad():
        assert torch.equal(loaded(ids_BL).logits, hedgehog(ids_BL).logits)


def test_loading_a_plain_folder_gives_identity_maps(base, tmp_path):
    """transformers makes the missing maps: under from_pretrained they still start as the identity, in fp32."""
    base.to(torch.bfloat16).save_pretrained(tmp_path)
    converted = convert_base(base)
    model = type(converted).from_pretrained(tmp_path, config=converted.config, dtype=torch.bfloat16)
    weight = list(model.decoder.attentions())[1].feature_map_k.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.eye(16).expand(4, 16, 16))


def test_packing_as_transformers_collators_say_it(base, token_ids):
    """DataCollatorWithFlattening says it in three ways, each alone; none may leak from one text to the next."""
    model = perturbed(convert_base(base, chunk_size=8)).eval()
    texts = [token_ids(1, length, seed=length)[0].tolist() for length in (5, 1, 9)]
    segment_ids = torch.tensor([[0] * 5 + [1] + [2] * 9])
    for options in (
        {},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_seq_idx": True, "return_flash_attn_kwargs": True},
    ):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": text} for text in texts])
        expected = model(batch["input_ids"], labels=batch["labels"], segment_ids=segment_ids)
        packed = model(**batch)
        assert torch.equal(packed.logits, expected.logits) and torch.equal(packed.loss, expected.loss)
        assert torch.equal(model.decoder(batch["input_ids"], segment_ids=segment_ids)[0], model.decoder(**batch)[0])
        alone = model(torch.tensor([texts[2]])).logits
        torch.testing.assert_close(packed.logits[:, 6:], alone, rtol=1e-4, atol=1e-5)
    whole = batch["input_ids"]
    assert torch.equal(model(whole, position_ids=torch.arange(15)[None]).logits, model(whole).logits)
    rows, starts = torch.cat([whole, whole]), torch.tensor([[*range(15)], [*range(5), *range(10)]])
    two = model(rows, position_ids=starts).logits
    torch.testing.assert_close(two[:1], model(whole).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two[1:, 5:], model(whole[:, 5:]).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="seq_idx has shape"):
        model(rows, seq_idx=segment_ids)
    for ids, ends in ((rows, [0, 5, 15]), (whole, [0, 5, 14]), (whole, [5, 15])):
        with pytest.raises(ValueError, match="for several packed rows give segment_ids".capitalize()):
            model(ids, cu_seq_lens_q=torch.tensor(ends))


def test_what_the_config_says_of_outputs(hedgehog, token_ids):
    ids_BL = token_ids(1, 4)
    hedgehog.config.output_hidden_states = True
    assert len(hedgehog(ids_BL).hidden_states) == len(hedgehog.decoder(ids_BL).hidden_states) == 3
    assert hedgehog(ids_BL, output_hidden_states=False).hidden_states is None
    assert isinstance(hedgehog.decoder(ids_BL, return_dict=False), tuple)
    hedgehog.config.return_dict = False
    assert isinstance(hedgehog(ids_BL), tuple) and isinstance(hedgehog.decoder(ids_BL), tuple)
    assert torch.equal(hedgehog(ids_BL)[0], hedgehog(ids_BL, return_dict=True).logits)
    hedgehog.config._output_attentions = True
    with pytest.raises(ValueError, match="attention weights are never formed"):
        hedgehog(ids_BL)


def test_backend_is_chosen_once_and_logged(hedgehog, token_ids, caplog):
    caplog.set_level(logging.INFO, logger="hedgehog.pipeline.modeling.hedgehog_decoder")
    hedgehog(token_ids(1, 4))
    hedgehog(token_ids(1, 4))
    lines = [record.message for record in caplog.records if "linear attention" in record.message]
    assert len(lines) == 1
    assert "torch" in lines[0]


def test_refusals(hedgehog, token_ids):
    ids_BL = token_ids(1, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        hedgehog()
    with pytest.raises(ValueError, match="attention weights are never formed"):
        hedgehog(ids_BL, output_attentions=True)
    with pytest.raises(ValueError, match="needs a HedgehogCache"):
        hedgehog(ids_BL, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="takes \\(batch, length\\)"):
        hedgehog(ids_BL, attention_mask=torch.ones(1, 1, 4, 4))
    for mask in (torch.ones(1, 9), torch.ones(1, 3), torch.ones(2, 4)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .* here \(1, 4\)$"):
            hedgehog(ids_BL, attention_mask=mask)
    with pytest.raises(ValueError, match=r"here \(1, 4\) or, with what past_key_values has read, \(1, 8\)"):
        hedgehog(ids_BL, attention_mask=torch.ones(1, 7), past_key_values=hedgehog(ids_BL, use_cache=True)[1])
    with pytest.raises(ValueError, match="cannot go on from past_key_values"):
        hedgehog(ids_BL, past_key_values=HedgehogCache(2), segment_ids=torch.zeros_like(ids_BL))
