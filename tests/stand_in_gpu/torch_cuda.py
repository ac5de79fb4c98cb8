"""What torch.cuda says of the stand-in, a process group for its tensors, and its kernels.

torch's own Python asks libraries that a build without CUDA lacks. Here is what this project, DeepSpeed, transformers
and peft ask of it; what is not here fails with an AttributeError or an AssertionError of torch's.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CAPABILITY = (9, 0)
NUM_MULTIPROCESSORS = 4
SHARED_BYTES = 227 * 1024
TOTAL_BYTES = 80 << 30
"""Others may hold some of it (`set_capacity`). transformers loads no model where there is less than 1.2 GiB in all."""
_device = ctypes.CDLL(os.environ["STAND_IN_GPU"])
for _name in ("allocated", "peak", "capacity"):
    getattr(_device, f"stand_in_{_name}").restype = ctypes.c_int64
_device.stand_in_set_capacity.argtypes = [ctypes.c_int64]
if "STAND_IN_GPU_BYTES" in os.environ:
    _device.stand_in_set_capacity(int(os.environ["STAND_IN_GPU_BYTES"]))


def set_capacity(num_bytes: int) -> None:
    """How much of the device's memory others leave from here on."""
    _device.stand_in_set_capacity(num_bytes)


class Stream(torch.Stream):
    """The one stream that there is."""

    cuda_stream = 0

    def __new__(cls, device: Any = None, priority: int = 0, **_: Any):
        return super().__new__(cls, device="cuda:0")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event:
    """A time of the CPU's clock: the work before it is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at_s = 0.0

    def record(self, stream: Any = None) -> None:
        self._at_s = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * max(1e-6, later._at_s - self._at_s)

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Graph:
    """Operators and their tensors, as they were captured; replay runs them again into the same tensors."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()

    def reset(self) -> None:
        self.calls.clear()


class _Capture(TorchDispatchMode):
    """Keeps what is called in a graph. Nothing happens meanwhile: what a call changes is put back."""

    capturing = False

    def __init__(self, graph: _Graph, *_: Any, **__: Any) -> None:
        super().__init__()
        self._graph = graph

    def __enter__(self) -> _Capture:
        _Capture.capturing = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _Capture.capturing = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in given]
        results = func(*args, **kwargs)
        for tensor, was in zip(given, before, strict=True):
            if not torch.equal(tensor, was):
                tensor.copy_(was)

        def again() -> None:
            found = func(*args, **kwargs)
            for tensor, new in zip(tree_flatten(results)[0], tree_flatten(found)[0], strict=True):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != new.data_ptr():
                    tensor.copy_(new)

        self._graph.calls.append(again)
        return results


class _Device:
    """torch.cuda.device and device_of: there is one device."""

    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> bool:
        return False


_started = False


def _start() -> None:
    global _started
    _started = True


def dress_torch() -> None:
    """torch.cuda answers, torch.distributed has an `nccl`."""
    cuda: Any = torch.cuda
    stream = Stream()
    properties = SimpleNamespace(
        name="stand-in",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=NUM_MULTIPROCESSORS,
        shared_memory_per_block_optin=SHARED_BYTES,
        total_memory=TOTAL_BYTES,
        L2_cache_size=50 << 20,
        warp_size=32,
    )

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def free_and_total(device: Any = None) -> tuple[int, int]:
        return _device.stand_in_capacity() - _device.stand_in_allocated(), TOTAL_BYTES

    answers: dict[str, Any] = {
        "_is_compiled": constant(True),
        "_lazy_init": _start,
        "init": _start,
        "is_available": constant(True),
        "is_initialized": lambda: _started,
        "device_count": constant(1),
        "current_device": constant(0),
        "set_device": constant(None),
        "_exchange_device": constant(0),
        "_maybe_exchange_device": constant(0),
        "get_device_capability": constant(CAPABILITY),
        "get_device_name": constant(properties.name),
        "get_device_properties": constant(properties),
        "get_arch_list": constant(["sm_90"]),
        "is_bf16_supported": constant(True),
        "mem_get_info": free_and_total,
        "memory_allocated": lambda device=None: _device.stand_in_allocated(),
        "memory_reserved": lambda device=None: _device.stand_in_allocated(),
        "max_memory_allocated": lambda device=None: _device.stand_in_peak(),
        "max_memory_reserved": lambda device=None: _device.stand_in_peak(),
        "reset_peak_memory_stats": lambda device=None: _device.stand_in_reset_peak(),
        "memory_stats": constant({}),
        "empty_cache": constant(None),
        "synchronize": constant(None),
        "current_stream": constant(stream),
        "default_stream": constant(stream),
        "_sleep": constant(None),
        "is_current_stream_capturing": lambda: _Capture.capturing,
        "stream": lambda _: nullcontext(),
        "graph": _Capture,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": _Graph,
        "device": _Device,
        "device_of": _Device,
        "manual_seed": constant(None),  # its random numbers are the CPU's
        "manual_seed_all": constant(None),
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": (torch.default_generator,),
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.manual_seed_all = answers["manual_seed_all"]
    cuda.nvtx.range_push = cuda.nvtx.range_pop = constant(None)
    torch.version.cuda = "13.0"
    flash = torch.library.Library("aten", "IMPL", "CUDA")
    flash.impl("_scaled_dot_product_flash_attention", _flash_attention)
    flash.impl("_scaled_dot_product_flash_attention_backward", _flash_attention_backward)
    _kept.append(flash)
    torch._C._cuda_getCurrentRawStream = constant(0)  # type: ignore[attr-defined]
    _dress_distributed()


_kept: list[torch.library.Library] = []


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """No kernel of a CPU has this name, only this work."""
    of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum_exp = of_cpu(q, k, v, dropout_p, is_causal, scale=scale)
    none = q.new_empty(0)
    return out, log_sum_exp, none, none, q.shape[2], k.shape[2], none, none, none


def _flash_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    _begin_q: Any,
    _begin_k: Any,
    _longest_q: int,
    _longest_k: int,
    dropout_p: float,
    is_causal: bool,
    *_: Any,
    scale: float | None = None,
) -> Any:
    of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return of_cpu(grad_out, q, k, v, out, log_sum_exp, dropout_p, is_causal, scale=scale)


def _dress_distributed() -> None:
    """`nccl` is gloo on the device's memory."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    host_view = torch.ops.stand_in.host_view

    def on_host(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [on_host(part) for part in value]
        return host_view(value) if isinstance(value, torch.Tensor) and value.is_cuda else value

    class ProcessGroup(dist.ProcessGroup):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            super().__init__(rank, size)
            self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

        _device_types = (torch.device("cuda"),)

        def getBackendName(self) -> str:
            return "stand-in"

    def collective(name: str) -> Callable[..., Any]:
        def call(self: ProcessGroup, tensors: Any, *others: Any, **options: Any) -> Any:
            if any(not tensor.is_cuda for tensor in _tensors_in([tensors, *others])):  # nccl's own words
                raise RuntimeError("No backend type associated with device type cpu")
            return getattr(self._gloo, name)(on_host(tensors), *map(on_host, others), **options)

        return call

    for name in ("_allgather_base", "_reduce_scatter_base", "allgather", "allreduce", "allreduce_coalesced"):
        setattr(ProcessGroup, name, collective(name))
    for name in ("broadcast", "gather", "reduce", "reduce_scatter", "scatter"):
        setattr(ProcessGroup, name, collective(name))
    # torch 2.13 has new names
    ProcessGroup.all_gather_single = collective("_allgather_base")  # type: ignore[attr-defined]
    ProcessGroup.reduce_scatter_single = collective("_reduce_scatter_base")  # type: ignore[attr-defined]
    ProcessGroup.barrier = lambda self, opts=None: self._gloo.barrier(opts)  # type: ignore[method-assign]
    dist.Backend.register_backend("standin", ProcessGroup, devices=["cuda"])
    original = dist.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        original("standin" if backend == "nccl" else backend, *arguments, **options)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def emulate_cuda_kernels() -> None:
    """The CUDA kernels are their emulation, which takes addresses of the device's memory as it takes any."""
    from hedgehog.kernels.cuda import build, library

    library.build_cuda_library = lambda capability: build.build_emulated_library()


def interpret_triton_kernels() -> None:
    """The Triton kernel is the interpreted one, in float32: Triton's interpreter has no bfloat16."""
    from hedgehog.kernels import distill_triton

    interpreted = distill_triton.triton_distillation_loss

    def loss(q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        distill_triton.INTERPRETED = True
        try:
            return interpreted(q_BHLD.float(), k_BKLD.float(), *arguments, **options)
        finally:
            distill_triton.INTERPRETED = False

    loss.interpreted = interpreted  # type: ignore[attr-defined]
    distill_triton.INTERPRETED = False
    distill_triton.triton_distillation_loss = loss


def take_bitsandbytes_for_the_cpu() -> None:
    """Its CUDA library is not to be had without CUDA's; the operators of its CPU library run on the device's memory."""
    import bitsandbytes.cuda_specs as specs

    specs.get_cuda_specs = lambda: None
    sys.modules["bitsandbytes.backends.cuda.ops"] = ModuleType("bitsandbytes.backends.cuda.ops")


def reload_exports_here_too() -> None:
    """The clean process that an export is tried in ignores PYTHONPATH."""
    from hedgehog.pipeline import drift

    drift.sys = SimpleNamespace(executable=str(Path(__file__).with_name("clean-python")))


AFTER = {
    "torch": dress_torch,
    "bitsandbytes.cuda_specs": take_bitsandbytes_for_the_cpu,
    "hedgehog.kernels.cuda.library": emulate_cuda_kernels,
    "hedgehog.kernels.distill_triton": interpret_triton_kernels,
    "hedgehog.pipeline.drift": reload_exports_here_too,
}
"""What follows the import of a module."""
