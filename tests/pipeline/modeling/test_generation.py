"""generate() with the recurrent state gives what recomputing the whole text gives; the cache's methods."""

from __future__ import annotations

import copy

import pytest
import torch

from hedgehog.pipeline.modeling.convert import convert_base
from hedgehog.pipeline.modeling.hedgehog_cache import HedgehogCache
from hedgehog.pipeline.modeling.hedgehog_decoder import HedgehogCausalLM

GREEDY = {"do_sample": False, "max_new_tokens": 12}
MODES = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "max_new_tokens": 12, "top_k": 20, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 4, "max_new_tokens": 12},
    "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10},
    "beam sampling": {"do_sample": True, "num_beams": 3, "max_new_tokens": 8},
}


@pytest.fixture(params=["hedgehog_softmax", "cosformer"])
def hedgehog(base, request) -> HedgehogCausalLM:
    return convert_base(base, feature_map=request.param, chunk_size=8)


def generate(model, ids_BL, **options) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(ids_BL, **options)


@pytest.mark.parametrize("mode", MODES)
def test_with_the_state_as_without(hedgehog, token_ids, left_padded, mode):
    ids_BL, mask_BL = left_padded([token_ids(1, 7, seed=1)[0], token_ids(1, 15, seed=2)[0]])
    options = {"attention_mask": mask_BL, **MODES[mode]}
    with_state = generate(hedgehog, ids_BL, use_cache=True, **options)
    assert torch.equal(with_state, generate(hedgehog, ids_BL, use_cache=False, **options))


def test_beams_are_really_reordered(hedgehog, token_ids, monkeypatch):
    """The comparison above proves something only if beams change places."""
    seen = []
    original = HedgehogCache.reorder_cache

    def spy(self, beam_idx):
        seen.append(beam_idx.tolist())
        original(self, beam_idx)

    monkeypatch.setattr(HedgehogCache, "reorder_cache", spy)
    generate(hedgehog, token_ids(1, 9), **MODES["beams"])
    assert any(order != sorted(set(order)) for order in seen[1:])


def test_left_padded_batch_gives_each_row_what_it_gets_alone(hedgehog, token_ids, left_padded):
    rows = [token_ids(1, length, seed=length)[0] for length in (5, 12, 9)]
    ids_BL, mask_BL = left_padded(rows)
    batch = generate(hedgehog, ids_BL, attention_mask=mask_BL, **GREEDY)
    for row, generated in zip(rows, batch[:, 12:], strict=True):
        alone = generate(hedgehog, row[None], **GREEDY)[0, len(row) :]
        length = min(len(alone), len(generated))
        assert torch.equal(generated[:length], alone[:length])
        assert (generated[length:] == 0).all()
    one = generate(hedgehog, ids_BL[:1], attention_mask=mask_BL[:1], **GREEDY)[0, 12:]
    alone = generate(hedgehog, rows[0][None], **GREEDY)[0, 5:]
    assert torch.equal(one, alone)


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_chunked_prefill(hedgehog, token_ids, left_padded, chunk):
    ids_BL, mask_BL = left_padded([token_ids(1, 6)[0], token_ids(1, 17)[0]])
    whole = generate(hedgehog, ids_BL, attention_mask=mask_BL, **GREEDY)
    chunked = generate(hedgehog, ids_BL, attention_mask=mask_BL, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(chunked, whole)


def test_generation_goes_on_from_a_cache(hedgehog, token_ids):
    """A shared prefix is read once; copies of its state serve several continuations."""
    prefix, tail = token_ids(1, 11, seed=1), token_ids(1, 4, seed=2)
    with torch.no_grad():
        state = hedgehog(prefix, use_cache=True).past_key_values
    text = torch.cat([prefix, tail], 1)
    expected = generate(hedgehog, text, **GREEDY)
    for _ in range(2):
        assert torch.equal(generate(hedgehog, text, past_key_values=copy.deepcopy(state), **GREEDY), expected)


@torch.no_grad()
def test_state_is_as_large_after_many_tokens_as_after_one(hedgehog, token_ids):
    cache = hedgehog(token_ids(2, 1), use_cache=True).past_key_values
    state = cache.layer(0).state
    features = next(hedgehog.decoder.attentions()).feature_map_q.num_features
    assert state.kv_state_BHFV.shape == (2, 4, features, 16)
    bytes_after_one = cache.num_bytes()
    assert bytes_after_one == 2 * 2 * 4 * features * (16 + 1) * 4
    for length in (30, 1, 1, 60):
        hedgehog(token_ids(2, length), past_key_values=cache)
    assert cache.num_bytes() == bytes_after_one
    assert cache.get_seq_length() == 93
    assert set(vars(cache.layer(0))) == set(vars(HedgehogCache(1).layer(0)))


@torch.no_grad()
def test_cache_rows_can_be_repeated_selected_and_reset(hedgehog, token_ids, left_padded):
    ids_BL, mask_BL = left_padded([token_ids(1, 6)[0], token_ids(1, 10)[0]])
    step = torch.tensor([[7], [9]])
    expected = hedgehog(step, past_key_values=hedgehog(ids_BL, attention_mask=mask_BL).past_key_values).logits

    cache = hedgehog(ids_BL, attention_mask=mask_BL).past_key_values
    cache.batch_repeat_interleave(3)
    logits = hedgehog(step.repeat_interleave(3, 0), past_key_values=cache).logits
    torch.testing.assert_close(logits, expected.repeat_interleave(3, 0), rtol=1e-5, atol=1e-6)

    for selection in (torch.tensor([1]), torch.tensor([False, True])):
        cache = hedgehog(ids_BL, attention_mask=mask_BL).past_key_values
        cache.batch_select_indices(selection)
        logits = hedgehog(step[1:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[1:], rtol=1e-5, atol=1e-6)

    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_bytes() == 0
    torch.testing.assert_close(
        hedgehog(ids_BL, attention_mask=mask_BL, past_key_values=cache).logits,
        hedgehog(ids_BL, attention_mask=mask_BL).logits,
    )


def test_what_a_state_cannot_do_is_refused(hedgehog, token_ids):
    ids_BL = token_ids(1, 5)
    cache = hedgehog(ids_BL, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="one kind of cache"):
        hedgehog.generate(ids_BL, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        hedgehog.generate(ids_BL, prompt_lookup_num_tokens=3, max_new_tokens=4)


@torch.no_grad()
def test_a_mask_that_hides_what_the_cache_has_read_is_refused(hedgehog, token_ids, left_padded):
    """A second turn of a batch in which one row ended early: its padding is in the state already."""
    ids_BL, mask_BL = left_padded([token_ids(1, 6, seed=1)[0], token_ids(1, 10, seed=2)[0]])
    cache = hedgehog(ids_BL, attention_mask=mask_BL).past_key_values
    answer, ones = token_ids(2, 3, seed=3), mask_BL.new_ones(2, 3)
    for position in range(3):
        seen = torch.cat([mask_BL, ones[:, : position + 1]], dim=1)
        cache = hedgehog(answer[:, position : position + 1], attention_mask=seen, past_key_values=cache).past_key_values
    turn = token_ids(2, 4, seed=4)
    hidden = torch.tensor([[1, 1, 1], [1, 0, 0]])
    untouched = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="row 1: attention_mask has 11 real tokens where past_key_values has read 13"):
        mask = torch.cat([mask_BL, hidden, mask_BL.new_ones(2, 4)], dim=1)
        hedgehog(turn, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask_BL, ones, mask_BL.new_ones(2, 4)], dim=1)
    logits = hedgehog(turn, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(logits, hedgehog(turn, attention_mask=mask, past_key_values=untouched).logits)
    whole = hedgehog(torch.cat([ids_BL, answer, turn], dim=1), attention_mask=mask).logits[:, -4:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused(hedgehog, token_ids):
    ids_BL = token_ids(1, 5)
    cache = hedgehog(ids_BL).past_key_values
    for length in (1, 3):
        with pytest.raises(ValueError, match="holds the state of 1 rows, and the batch has 2: batch_repeat_interleave"):
            hedgehog(token_ids(2, length), past_key_values=cache)
    for seen in (ids_BL, ids_BL[:, :2]):
        with pytest.raises(ValueError, match="has read 5 tokens and the input has"):
            hedgehog.generate(seen, past_key_values=cache, max_new_tokens=3)
    whole = torch.cat([ids_BL, token_ids(1, 2, seed=9)], dim=1)
    with pytest.raises(ValueError, match="use_cache=False beside past_key_values"):
        hedgehog.generate(whole, past_key_values=cache, use_cache=False, max_new_tokens=3)
    expected = hedgehog.generate(whole, max_new_tokens=3, do_sample=False)
    assert torch.equal(hedgehog.generate(whole, past_key_values=cache, max_new_tokens=3, do_sample=False), expected)


@torch.no_grad()
def test_generation_does_not_go_on_from_padding_that_was_read(hedgehog, token_ids):
    """One token is left to read, so that generate() begins with a single step: the mask is looked at before it."""
    ids_BL = token_ids(2, 6)
    cache = hedgehog(ids_BL).past_key_values
    whole, mask = torch.cat([ids_BL, token_ids(2, 1, seed=1)], dim=1), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:6] = 0
    with pytest.raises(ValueError, match="row 1: attention_mask has 4 real tokens where past_key_values has read 6"):
        hedgehog.generate(whole, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="row 1: attention_mask has 4 real tokens"):
        hedgehog(whole[:, 6:], attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 6


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(hedgehog, new_base, token_ids):
    ids_BL = token_ids(1, 5)
    for fields in ({"num_hidden_layers": 3}, {"num_attention_heads": 2, "num_key_value_heads": 1}):
        cache = convert_base(new_base(**fields))(ids_BL).past_key_values
        with pytest.raises(ValueError, match="past_key_values is another model's"):
            hedgehog(ids_BL, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
def test_a_pass_that_failed_midway_is_not_gone_on_from(hedgehog, token_ids, monkeypatch, length):
    """Layer 0 has read the tokens and layer 1 has not: whatever came of that would be wrong."""
    ids_BL, more = token_ids(1, 5), token_ids(1, length, seed=1)
    cache = hedgehog(ids_BL).past_key_values

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("here")

    with monkeypatch.context() as patch:
        patch.setattr(hedgehog.decoder.decoder_layers()[1], "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            hedgehog(more, past_key_values=cache)
    with pytest.raises(ValueError, match="failed midway"):
        hedgehog(more, past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(hedgehog(ids_BL, past_key_values=cache).logits, hedgehog(ids_BL).logits)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("then", [torch.no_grad, torch.enable_grad])
def test_a_cache_made_in_inference_mode_is_used_outside(hedgehog, token_ids, length, then):
    ids_BL, more = token_ids(1, 5), token_ids(1, length, seed=1)
    with torch.inference_mode():
        cache = hedgehog(ids_BL).past_key_values
    with then():
        logits = hedgehog(more, past_key_values=cache).logits
        if logits.requires_grad:
            logits.sum().backward()
            assert next(hedgehog.decoder.decoder_layers()[0].parameters()).grad.abs().sum() > 0
    with torch.no_grad():
        expected = hedgehog(torch.cat([ids_BL, more], dim=1)).logits[:, 5:]
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)


def test_generation_under_gradient_checkpointing_is_refused(hedgehog, token_ids):
    """Every token would be decoded as if it were the first."""
    hedgehog.gradient_checkpointing_enable()
    hedgehog.train()
    with pytest.raises(ValueError, match=r"model.eval\(\) or use_cache=False"):
        hedgehog.generate(token_ids(1, 5), max_new_tokens=3)
    options = {"max_new_tokens": 3, "do_sample": False}
    without = hedgehog.generate(token_ids(1, 5), use_cache=False, **options)
    assert torch.equal(hedgehog.eval().generate(token_ids(1, 5), **options), without)


def test_right_padded_prompts_of_a_scored_batch(hedgehog, token_ids):
    """Scoring pads right: real rows see nothing of it."""
    short, long = token_ids(1, 6, seed=1), token_ids(1, 10, seed=2)
    ids_BL = torch.cat([torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], 1), long])
    mask_BL = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    with torch.no_grad():
        together, alone = hedgehog(ids_BL, attention_mask=mask_BL).logits, hedgehog(short).logits
    torch.testing.assert_close(together[0, :6], alone[0], rtol=1e-5, atol=1e-6)
