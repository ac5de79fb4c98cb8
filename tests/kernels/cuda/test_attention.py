"""The backend as the model uses it: selected by name, with its own choice of segments, against PyTorch's forms."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from hedgehog.kernels.backends import select_attention_backend
from hedgehog.kernels.cuda import attention
from hedgehog.kernels.cuda.attention import num_segments, num_splits, segments_for, splits_for
from hedgehog.kernels.linear_attention import chunked_linear_attention

from .problems import EPS, random_problem, rms


def emulated(feature_map: str):
    return select_attention_backend(
        "emulated", device="cpu", dtype=torch.bfloat16, num_features=128, value_dim=64, feature_map=feature_map
    )


def test_fused_where_the_kernel_has_the_map():
    assert emulated("hedgehog_softmax").reason == "requested; φ inside the kernel"
    assert (
        emulated("relu").fused is None and emulated("relu").reason == "requested; φ outside the kernel: it has no relu"
    )


def test_features_and_fused_give_what_pytorch_gives():
    problem = random_problem(150, heads=2)
    ids = torch.tensor([[0] * 60 + [1] * 90])
    shared = {"mask_BL": torch.ones(1, 150, dtype=torch.bool), "segment_ids_BL": ids, "initial_state": None}
    phi_q, phi_k = (phi.bfloat16() for phi in problem.features(torch.float32))
    expected, state = chunked_linear_attention(phi_q, phi_k, problem.v, eps=EPS, return_state=True, **shared)
    backend = emulated("hedgehog_softmax")
    on_features = backend.causal_attention(phi_q, phi_k, problem.v, eps=EPS, return_state=True, **shared)
    weights = problem.weight_q, problem.weight_k
    fused = backend.fused.attend(problem.q, problem.k, problem.v, weights, eps=EPS, return_state=True, **shared)
    for out, after in (on_features, fused):
        assert rms(out.float() - expected.float()) <= 2e-3
        assert rms(after.kv_state_BHFV - state.kv_state_BHFV) <= 2e-3 * rms(state.kv_state_BHFV)


@pytest.mark.parametrize("feature_map", ["given", "hedgehog_softmax", "hedgehog_exp"])
def test_kernels_that_are_wrong_or_fail_on_a_device_do_not_serve_there(monkeypatch, emulation, feature_map):
    look = partial(attention.disagreement, torch.device("cpu"), 128, 64, feature_map)
    assert look() is None
    right = attention.attend

    def wrong(*arguments, **options):
        out, state = right(*arguments, **options)
        out[0, 1, -1] += 1
        return out, state

    def failing(*arguments, **options):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(attention, "attend", wrong)
    assert "differ from PyTorch here by" in (look() or "")
    monkeypatch.setattr(attention, "attend", failing)
    assert look() == "the kernels fail here (no kernel image is available)"


def test_a_gpu_with_less_shared_memory_computes_phi_outside(monkeypatch, emulation):
    monkeypatch.setattr(attention, "disagreement", lambda *_: None)
    device = torch.device("cuda", 7)
    monkeypatch.setattr(attention, "cuda_library", lambda capability: emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    chosen = {"device": device, "dtype": torch.bfloat16, "feature_map": "hedgehog_softmax"}
    large = select_attention_backend("auto", num_features=256, value_dim=128, **chosen)
    assert large.reason.startswith("compiled for cuda, bfloat16, F=256, V=128; φ outside the kernel: a block needs ")
    assert select_attention_backend("auto", num_features=128, value_dim=64, **chosen).fused is not None
    properties.shared_memory_per_block_optin = 48 * 1024
    attention.why_not.cache_clear()
    reason = select_attention_backend("auto", num_features=256, value_dim=128, **chosen).reason
    assert "a block needs 92160 bytes of shared memory, this GPU gives 49152" in reason
    attention.why_not.cache_clear()
    attention.why_not_fused.cache_clear()


def test_out_of_memory_is_no_verdict(monkeypatch, emulation):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    monkeypatch.setattr(attention, "attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.disagreement(torch.device("cpu"), 128, 64, "given")


@pytest.mark.parametrize("heads,segments,splits", [(1, 4, 4), (2, 2, 2), (3, 1, 1), (4, 1, 1), (5, 3, 2)])
def test_blocks_fill_the_multiprocessors(heads, segments, splits):
    cpu = torch.device("cpu")  # counts as four
    assert (num_segments(cpu, 1, heads), num_splits(cpu, 1, heads)) == (segments, splits)


def test_segments_on_an_h200():
    """132 multiprocessors: 32 heads take a quarter each; a second round for a few blocks is shared out."""
    chosen = {blocks: segments_for(blocks, 132) for blocks in (1, 32, 70, 100, 128, 132, 133, 160, 264, 100_000)}
    assert chosen == {1: 132, 32: 4, 70: 7, 100: 1, 128: 1, 132: 1, 133: 3, 160: 3, 264: 1, 100_000: 1}
    assert [splits_for(32 * batch, 132) for batch in (1, 2, 4, 8, 64)] == [4, 2, 1, 1, 1]
