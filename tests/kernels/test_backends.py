"""The choice of an implementation and its reason."""

from __future__ import annotations

import pytest
import torch

from hedgehog.kernels import backends
from hedgehog.kernels.backends import select_attention_backend
from hedgehog.kernels.linear_attention import chunked_linear_attention


def select(requested, *, device="cpu", dtype=torch.bfloat16, num_features=256, value_dim=128, **more):
    return select_attention_backend(
        requested, device=device, dtype=dtype, num_features=num_features, value_dim=value_dim, **more
    )


def test_auto_falls_back_to_torch_and_says_why():
    backend = select("auto")
    assert backend.name == "torch" and backend.causal_attention is chunked_linear_attention
    assert backend.reason == "no compiled kernel for cpu, bfloat16, F=256, V=128: it needs a CUDA GPU"
    assert backend.fused is None


@pytest.mark.parametrize(
    "shape,words",
    [
        ({"dtype": torch.float32}, "cuda, float32, F=256, V=128: the kernels take bfloat16"),
        ({"num_features": 96}, "cuda, bfloat16, F=96, V=128: the kernels have F in (128, 256) and V in (64, 128)"),
        ({"value_dim": 80}, "cuda, bfloat16, F=256, V=80: the kernels have F in (128, 256) and V in (64, 128)"),
    ],
)
def test_auto_on_a_gpu_names_what_the_kernels_lack(shape, words):
    backend = select("auto", device="cuda", **shape)
    assert (backend.name, backend.reason) == ("torch", f"no compiled kernel for {words}")


def test_auto_without_nvcc_names_it(monkeypatch):
    from hedgehog.kernels.cuda import attention, build

    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 7) if device.index else (8, 9))
    attention.why_not.cache_clear()
    assert "nvcc was not found" in select("auto", device="cuda:0").reason
    assert "need compute capability 8.0, this GPU has 7.7" in select("auto", device="cuda:1").reason
    attention.why_not.cache_clear()


def test_without_the_kernels_package_the_model_goes_on(monkeypatch):
    monkeypatch.setattr(backends, "_CUDA_MODULE", "hedgehog_is_not_installed_here.attention")
    assert "the kernels are not installed" in select("auto", device="cuda").reason


def test_torch_on_request():
    assert select("torch").reason == "requested"


def test_what_was_asked_for_is_not_replaced():
    with pytest.raises(ValueError, match="'cuda' cannot serve cpu, bfloat16, F=256, V=128: it needs a CUDA GPU"):
        select("cuda")
    with pytest.raises(ValueError, match=r"'emulated' cannot serve cuda, .* it needs a CPU"):
        select("emulated", device="cuda")


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="unknown attention backend 'fast'; known: auto, torch, cuda, emulated"):
        select("fast")
