"""The layer-wise teacher sees what the model itself computes, runs no layer too many, and forms no L × L matrix."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hedgehog.pipeline.modeling.architecture import architecture_of
from hedgehog.pipeline.modeling.teacher import TeacherForward, attention_spans


def projections(base, which: int) -> list[torch.nn.Module]:
    """Of each layer's attention: the first (0), or the last (-1), which is given its output."""
    family = architecture_of(base)
    attentions = (getattr(layer, family.attention_name) for layer in family.layers(base))
    return [getattr(attention, family.of_attention[which]) for attention in attentions]


def attention_outputs(base, **inputs) -> list[torch.Tensor]:
    """What each layer's output projection receives inside the model itself, (B, L, H·V)."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for module in projections(base, -1)
    ]
    with torch.no_grad():
        base(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def flat(o_BHLV: torch.Tensor) -> torch.Tensor:
    return o_BHLV.transpose(1, 2).flatten(2)


ROPE = {
    "plain": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_equals_llama_exactly(new_llama, token_ids, rope, num_key_value_heads):
    settings = {"rope_theta": 10_000.0, **(ROPE[rope] or {"rope_type": "default"})}
    llama = new_llama(
        num_hidden_layers=3,
        num_key_value_heads=num_key_value_heads,
        rope_parameters=settings,
        max_position_embeddings=16 if rope == "dynamic" else 128,
    )
    ids_BL = token_ids(2, 23)
    expected = attention_outputs(llama, input_ids=ids_BL, use_cache=False)
    layers = list(TeacherForward(llama)(ids_BL))
    assert [layer.layer_index for layer in layers] == [0, 1, 2]
    for layer, o_BLE in zip(layers, expected, strict=True):
        assert torch.equal(flat(layer.o_BHLV), o_BLE)
        assert layer.q_BHLD.shape == (2, 4, 23, 16)
        assert layer.k_BKLD.shape == layer.v_BKLV.shape == (2, num_key_value_heads, 23, 16)
        # q, k, v and scale are those that give this output
        k, v = (x.repeat_interleave(4 // num_key_value_heads, 1) for x in (layer.k_BKLD, layer.v_BKLV))
        scores = (layer.q_BHLD @ k.transpose(-1, -2) * layer.scale).masked_fill(~torch.ones(23, 23).tril().bool(), -1e9)
        torch.testing.assert_close(scores.softmax(-1) @ v, layer.o_BHLV, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.log_sum_exp_BHL, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_gpt2_exactly(new_gpt2, token_ids, by_layer, scaled):
    options = {"scale_attn_by_inverse_layer_idx": by_layer, "scale_attn_weights": scaled}
    gpt2 = new_gpt2(num_hidden_layers=3, **options, initializer_range=0.15)
    ids_BL = token_ids(2, 23)
    expected = attention_outputs(gpt2, input_ids=ids_BL, use_cache=False)
    for layer, o_BLE in zip(TeacherForward(gpt2)(ids_BL), expected, strict=True):
        assert torch.equal(flat(layer.o_BHLV), o_BLE)
        assert layer.scale == (0.25 if scaled else 1.0) / (layer.layer_index + 1 if by_layer else 1)
        scores = layer.q_BHLD @ layer.k_BKLD.transpose(-1, -2) * layer.scale
        scores = scores.masked_fill(~torch.ones(23, 23).tril().bool(), -1e9)
        torch.testing.assert_close(scores.softmax(-1) @ layer.v_BKLV, layer.o_BHLV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [[2], [1, 3], [0]], ids=str)
def test_goes_on_from_kept_hidden_states(new_base, token_ids, layers):
    base = new_base(num_hidden_layers=4)
    ids_BL, kept = token_ids(2, 9), []

    def keep(states_BLE):
        kept.append(states_BLE)
        return states_BLE

    expected = list(TeacherForward(base)(ids_BL, layers=layers, keep_entering=keep))
    (entering_BLE,) = kept
    for below in projections(base, 0)[: min(layers)]:
        below.forward = None  # must not run
    found = TeacherForward(base)(ids_BL, layers=layers, entering_BLE=entering_BLE, keep_entering=keep)
    for layer, other in zip(found, expected, strict=True):
        assert layer.layer_index == other.layer_index
        assert torch.equal(layer.q_BHLD, other.q_BHLD)
        assert torch.equal(layer.o_BHLV, other.o_BHLV)
    assert len(kept) == 1, "what was given is not handed back"


def test_runs_no_further_than_the_last_layer_asked_for(new_base, token_ids):
    base = new_base(num_hidden_layers=4)
    ran = []
    for index, (layer, first) in enumerate(zip(architecture_of(base).layers(base), projections(base, 0), strict=True)):
        first.register_forward_hook(lambda *_, index=index: ran.append(("attention", index)))
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(("mlp", index)))
    base.lm_head.register_forward_hook(lambda *_: ran.append(("logits", -1)))
    ids_BL = token_ids(1, 8)
    all_layers = list(TeacherForward(base)(ids_BL))
    ran.clear()
    some = list(TeacherForward(base)(ids_BL, layers=[2, 1]))
    assert ran == [("attention", 0), ("mlp", 0), ("attention", 1), ("mlp", 1), ("attention", 2)]
    assert [layer.layer_index for layer in some] == [1, 2]
    for layer in some:  # a subset of layers sees what all layers see, bit for bit
        assert torch.equal(layer.q_BHLD, all_layers[layer.layer_index].q_BHLD)
    ran.clear()
    assert list(TeacherForward(base)(ids_BL, layers=[])) == [] and ran == []


def test_left_padding_and_packing(base, token_ids, left_padded):
    rows = [token_ids(1, length, seed=length)[0] for length in (6, 11)]
    alone = [list(TeacherForward(base)(row[None])) for row in rows]
    ids_BL, mask_BL = left_padded(rows)
    for layer in TeacherForward(base)(ids_BL, mask_BL=mask_BL):
        for row, length in enumerate((6, 11)):
            expected = alone[row][layer.layer_index]
            for name in ("q_BHLD", "k_BKLD", "v_BKLV", "o_BHLV", "log_sum_exp_BHL"):
                padded = getattr(layer, name)[row, :, -length:]
                torch.testing.assert_close(padded, getattr(expected, name)[0], rtol=1e-4, atol=1e-5)
        assert layer.o_BHLV[0, :, :5].abs().max() == 0

    packed_ids = torch.cat([*rows, torch.zeros(3, dtype=torch.long)])[None]
    segment_ids = torch.tensor([[0] * 6 + [1] * 14])
    packed_mask = torch.tensor([[1] * 17 + [0] * 3])
    for layer in TeacherForward(base)(packed_ids, mask_BL=packed_mask, segment_ids_BL=segment_ids):
        for name in ("q_BHLD", "k_BKLD", "v_BKLV", "o_BHLV", "log_sum_exp_BHL"):
            expected = torch.cat([getattr(alone[row][layer.layer_index], name) for row in (0, 1)], dim=2)
            torch.testing.assert_close(getattr(layer, name)[:, :, :17], expected, rtol=1e-4, atol=1e-5)


def test_right_padding_needs_no_spans_and_equals_the_model(base, token_ids):
    ids_BL = token_ids(2, 9)
    mask_BL = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    assert attention_spans(mask_BL, None) is None
    expected = attention_outputs(base, input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
    real = mask_BL.bool()
    for layer, o_BLE in zip(TeacherForward(base)(ids_BL, mask_BL=mask_BL), expected, strict=True):
        torch.testing.assert_close(flat(layer.o_BHLV)[real], o_BLE[real], rtol=1e-4, atol=1e-5)


def test_spans():
    mask_BL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert attention_spans(mask_BL, None) == [(0, 2, 5), (1, 0, 5)]
    segments = torch.tensor([[3, 3, 3, 8, 8], [5, 7, 7, 5, 5]])
    assert attention_spans(None, segments) == [(0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 3), (1, 3, 5)]
    assert attention_spans(mask_BL, segments) == [(0, 2, 3), (0, 3, 5), (1, 0, 1), (1, 1, 3), (1, 3, 5)]
    with pytest.raises(ValueError, match="padding between the tokens"):
        attention_spans(torch.tensor([[1, 0, 1]]), None)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_no_quadratic_tensor(new_base, token_ids, padded):
    length = 1024
    base = new_base(max_position_embeddings=length)
    mask_BL = torch.ones(1, length, dtype=torch.long)
    mask_BL[0, :7] = 0
    list(TeacherForward(base)(token_ids(1, 8)))  # the log-sum-exp is seen to be right once a process
    with LargestTensor() as seen:
        for _ in TeacherForward(base)(token_ids(1, length), mask_BL=mask_BL if padded else None):
            pass
    assert 0 < seen.largest <= length * 192  # the widest projection; L × L would be five times that


def test_keeps_nothing_of_a_layer_and_leaves_the_grad_mode_alone(base, token_ids):
    """Nor is it there while its own MLP runs, or the next layer."""
    from hedgehog.pipeline.distillation import Teacher

    earlier, alive = [], []

    def look(*_):
        alive.append(sum(reference() is not None for reference in earlier))

    def visit(layer):
        assert torch.is_grad_enabled()
        assert not layer.q_BHLD.requires_grad
        earlier.extend(weakref.ref(tensor) for tensor in (layer.q_BHLD, layer.k_BKLD, layer.v_BKLV, layer.o_BHLV))

    family = architecture_of(base)
    for layer in family.layers(base):
        getattr(layer, family.of_layer[1]).register_forward_hook(look)
        layer.mlp.register_forward_hook(look)
    Teacher(base, (0, 1))({"input_ids": token_ids(1, 8), "mask": None, "position_ids": None}, False, visit)
    assert len(earlier) == 8
    assert alive == [0, 0, 0]


def test_unknown_layer(base, token_ids):
    with pytest.raises(ValueError, match=r"layers \[2\] do not exist"):
        list(TeacherForward(base)(token_ids(1, 4), layers=[0, 2]))
