"""What a launch gets, without a GPU to launch on: stream, device, 64-bit strides; and what is refused before it."""

from __future__ import annotations

import contextlib
import mmap
from types import SimpleNamespace

import pytest
import torch

from hedgehog.kernels.cuda import arguments, gradients, library, operators
from hedgehog.kernels.cuda.operators import linear_attention, linear_attention_token

from .problems import EPS, random_problem

STREAM = 0x5EED
NAMES = ("q", "k", "v", "weight_q", "weight_k")


class RecordingLibrary:
    """The emulation, noting each launch: its stream, and whose device was the current one."""

    def __init__(self, real: library.Library) -> None:
        self._real = real
        self.device_of: list[torch.Tensor] = []
        self.launches: list[tuple[str, int | None, int]] = []

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def _note(self, name: str, stream: int | None) -> None:
        self.launches.append((name, stream, len(self.device_of)))

    def forward(self, given):
        self._note("forward", given.stream)
        given.stream = None
        self._real.forward(given)

    def backward(self, given):
        self._note("backward", given.forward.stream)
        given.forward.stream = None
        self._real.backward(given)

    def decode(self, given):
        self._note("decode", given.stream)
        given.stream = None
        self._real.decode(given)

    @contextlib.contextmanager
    def guard(self, tensor: torch.Tensor):
        self.device_of.append(tensor)
        yield
        self.device_of.pop()


@pytest.fixture
def recorded(emulation, monkeypatch):
    recording = RecordingLibrary(emulation)
    for module in (operators, gradients):
        monkeypatch.setattr(module, "library_for", lambda device: recording)
    for module in (operators, arguments):
        monkeypatch.setattr(module, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "device_of", recording.guard)
    return recording


def test_every_launch_is_on_the_current_stream_of_the_tensors_own_device(recorded):
    problem = random_problem(5)
    leaves = [getattr(problem, name).requires_grad_() for name in NAMES]
    out, _, kv_state, k_sum = linear_attention(*leaves, None, None, None, None, problem.feature_map, EPS, 1, True)
    out.sum().backward()
    with torch.no_grad():
        token = [x[:, :, :1] for x in leaves[:3]]
        linear_attention_token(*token, *leaves[3:], None, kv_state, k_sum, problem.feature_map, EPS, 1)
    assert recorded.launches == [(name, STREAM, 1) for name in ("forward", "backward", "decode")]


def test_the_stream_is_that_of_the_device_asked_for(monkeypatch):
    streams = {0: 11, 1: 22}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device.index]))
    assert library.current_stream(torch.device("cuda", 1)) == 22
    assert library.current_stream(torch.device("cpu")) is None


@pytest.mark.parametrize("name", [*NAMES, "mask", "runs", "initial_kv", "initial_k_sum"])
def test_tensors_of_two_devices_are_refused(name):
    problem = random_problem(5)
    given = {name: getattr(problem, name) for name in NAMES} | {
        "mask": torch.ones(1, 5, dtype=torch.bool),
        "runs": torch.zeros(1, 5, dtype=torch.int32),
        "initial_kv": torch.zeros(1, 2, 128, 64),
        "initial_k_sum": torch.zeros(1, 2, 128),
    }
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match="on meta"):
        linear_attention(*given.values(), problem.feature_map, EPS, 1, False)


def test_tokens_so_far_apart_that_offsets_need_64_bits():
    """129 tokens, 2²⁴ elements from one to the next, on pages of which only the touched ones exist."""
    stride, length = 2**24, 130
    problem = random_problem(length)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * stride * length), dtype=torch.bfloat16)
    far, begins = [], 0
    for x in (problem.q, problem.k, problem.v):
        far.append(memory.as_strided(x.shape, (0, x.shape[3], stride, 1), begins).copy_(x))
        begins += x.shape[1] * x.shape[3]
    assert far[0].stride(2) * (length - 1) > 2**31

    def run(q, k, v):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, problem.weight_q, problem.weight_k)]
        out = linear_attention(*leaves, None, None, None, None, problem.feature_map, EPS, 2, False)[0]
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    for one, other in zip(run(*far), run(problem.q, problem.k, problem.v), strict=True):
        assert torch.equal(one, other)
