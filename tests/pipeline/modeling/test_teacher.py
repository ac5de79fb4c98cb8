"""The layer-wise teacher sees what LlamaForCausalLM computes, runs no layer too many, and forms no L × L matrix."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hedgehog.pipeline.modeling.teacher import TeacherForward, attention_spans


def attention_outputs(llama, **inputs) -> list[torch.Tensor]:
    """What each layer's o_proj receives inside LlamaForCausalLM, (B, L, H·V)."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in llama.model.layers
    ]
    with torch.no_grad():
        llama(**inputs)
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


@pytest.mark.parametrize("layers", [[2], [1, 3], [0]], ids=str)
def test_goes_on_from_kept_hidden_states(new_llama, token_ids, layers):
    llama = new_llama(num_hidden_layers=4)
    ids_BL, kept = token_ids(2, 9), []

    def keep(states_BLE):
        kept.append(states_BLE)
        return states_BLE

    expected = list(TeacherForward(llama)(ids_BL, layers=layers, keep_entering=keep))
    (entering_BLE,) = kept
    for below in llama.model.layers[: min(layers)]:
        below.self_attn.q_proj.forward = None  # must not run
    found = TeacherForward(llama)(ids_BL, layers=layers, entering_BLE=entering_BLE, keep_entering=keep)
    for layer, other in zip(found, expected, strict=True):
        assert layer.layer_index == other.layer_index
        assert torch.equal(layer.q_BHLD, other.q_BHLD)
        assert torch.equal(layer.o_BHLV, other.o_BHLV)
    assert len(kept) == 1, "what was given is not handed back"


def test_runs_no_further_than_the_last_layer_asked_for(new_llama, token_ids):
    llama = new_llama(num_hidden_layers=4)
    ran = []
    for index, layer in enumerate(llama.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, index=index: ran.append(("attention", index)))
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(("mlp", index)))
    llama.lm_head.register_forward_hook(lambda *_: ran.append(("logits", -1)))
    ids_BL = token_ids(1, 8)
    all_layers = list(TeacherForward(llama)(ids_BL))
    ran.clear()
    some = list(TeacherForward(llama)(ids_BL, layers=[2, 1]))
    assert ran == [("attention", 0), ("mlp", 0), ("attention", 1), ("mlp", 1), ("attention", 2)]
    assert [layer.layer_index for layer in some] == [1, 2]
    for layer in some:  # a subset of layers sees what all layers see, bit for bit
        assert torch.equal(layer.q_BHLD, all_layers[layer.layer_index].q_BHLD)
    ran.clear()
    assert list(TeacherForward(llama)(ids_BL, layers=[])) == [] and ran == []


def test_left_padding_and_packing(llama, token_ids, left_padded):
    rows = [token_ids(1, length, seed=length)[0] for length in (6, 11)]
    alone = [list(TeacherForward(llama)(row[None])) for row in rows]
    ids_BL, mask_BL = left_padded(rows)
    for layer in TeacherForward(llama)(ids_BL, mask_BL=mask_BL):
        for row, length in enumerate((6, 11)):
            expected = alone[row][layer.layer_index]
            for name in ("q_BHLD", "k_BKLD", "v_BKLV", "o_BHLV", "log_sum_exp_BHL"):
                padded = getattr(layer, name)[row, :, -length:]
                torch.testing.assert_close(padded, getattr(expected, name)[0], rtol=1e-4, atol=1e-5)
        assert layer.o_BHLV[0, :, :5].abs().max() == 0

    packed_ids = torch.cat([*rows, torch.zeros(3, dtype=torch.long)])[None]
    segment_ids = torch.tensor([[0] * 6 + [1] * 14])
    packed_mask = torch.tensor([[1] * 17 + [0] * 3])
    for layer in TeacherForward(llama)(packed_ids, mask_BL=packed_mask, segment_ids_BL=segment_ids):
        for name in ("q_BHLD", "k_BKLD", "v_BKLV", "o_BHLV", "log_sum_exp_BHL"):
            expected = torch.cat([getattr(alone[row][layer.layer_index], name) for row in (0, 1)], dim=2)
            torch.testing.assert_close(getattr(layer, name)[:, :, :17], expected, rtol=1e-4, atol=1e-5)


def test_right_padding_needs_no_spans_and_equals_llama(llama, token_ids):
    ids_BL = token_ids(2, 9)
    mask_BL = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    assert attention_spans(mask_BL, None) is None
    expected = attention_outputs(llama, input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
    real = mask_BL.bool()
    for layer, o_BLE in zip(TeacherForward(llama)(ids_BL, mask_BL=mask_BL), expected, strict=True):
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
def test_no_quadratic_tensor(llama, token_ids, padded):
    length = 1024
    mask_BL = torch.ones(1, length, dtype=torch.long)
    mask_BL[0, :7] = 0
    with LargestTensor() as seen:
        for _ in TeacherForward(llama)(token_ids(1, length), mask_BL=mask_BL if padded else None):
            pass
    assert 0 < seen.largest <= length * 96  # the MLP's width; L × L would be ten times that


def test_keeps_nothing_of_a_layer_and_leaves_the_grad_mode_alone(llama, token_ids):
    """Nor is it there while its own MLP runs, or the next layer."""
    from hedgehog.pipeline.distillation import Teacher

    earlier, alive = [], []

    def look(*_):
        alive.append(sum(reference() is not None for reference in earlier))

    def visit(layer):
        assert torch.is_grad_enabled()
        assert not layer.q_BHLD.requires_grad
        earlier.extend(weakref.ref(tensor) for tensor in (layer.q_BHLD, layer.k_BKLD, layer.v_BKLV, layer.o_BHLV))

    for layer in llama.model.layers:
        layer.input_layernorm.register_forward_hook(look)
        layer.mlp.register_forward_hook(look)
    Teacher(llama, (0, 1))({"input_ids": token_ids(1, 8), "mask": None, "position_ids": None}, False, visit)
    assert len(earlier) == 8
    assert alive == [0, 0, 0]


def test_unknown_layer(llama, token_ids):
    with pytest.raises(ValueError, match=r"layers \[2\] do not exist"):
        list(TeacherForward(llama)(token_ids(1, 4), layers=[0, 2]))
