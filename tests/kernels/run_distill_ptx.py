"""The distillation loss by Triton's PTX, run on this CPU in bfloat16; prints how far it is from float64, as JSON.

    python run_distill_ptx.py CAPABILITY MAP LENGTH HEAD_DIM FEATURE_DIM

A process of its own, since Triton decides at its import between compiling and interpreting (its interpreter cannot
multiply bfloat16). Launches compile for the GPU of that capability and run in ptx/machine.py.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import numpy as np
import torch
import triton
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.program import read_programs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hedgehog.kernels.distill_loss import attention_distillation_loss
from hedgehog.kernels.distill_triton import pinned_tiles, triton_distillation_loss
from hedgehog.kernels.feature_maps import make_feature_map

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_TYPES |= {torch.bool: "i1", torch.uint8: "u8"}
_NUMPY = {"b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32, "u64": np.uint64}
_NUMPY |= {"u32": np.uint32, "s32": np.int32, "s64": np.int64}


class Launcher:
    """In the place of a kernel's own launch: compiles as the launch would, and runs the PTX on CPU tensors."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.ran: set[str] = set()
        self._machines: dict[Any, tuple[Machine, list[str], Any]] = {}

    def of(self, kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
            machine, names, metadata = self._machine(kernel, arguments, options)
            values = [arguments[name] for name in names]
            tensors = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in values if torch.is_tensor(x)}
            pieces = []
            for start, storage in tensors.items():
                pieces.append((start, torch.tensor([], dtype=torch.uint8).set_(storage).numpy()))
            parameters = _parameters(machine, [x.data_ptr() if torch.is_tensor(x) else x for x in values])
            blocks = (*grid, 1, 1)[:3]
            threads = 32 * metadata.num_warps
            machine.run(blocks, threads, metadata.shared, parameters, Memory(pieces), np.random.default_rng(0))
            self.ran.add(kernel.fn.__name__)

        return launch

    def _machine(self, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> tuple[Machine, list, Any]:
        """As Triton's own launch specialises: constants, ones, and what sixteen divides."""
        signature, constants, aligned, names = {}, {}, {}, []
        for index, parameter in enumerate(kernel.params):
            name = parameter.name
            value = arguments[name]
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or (free and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", getattr(value, "value", value)
                continue
            names.append(name)
            if torch.is_tensor(value):
                signature[name] = "*" + _TYPES[value.dtype]
                divisible = value.data_ptr() % 16 == 0
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
                divisible = isinstance(value, int) and value % 16 == 0
            if divisible and free:
                aligned[index,] = [["tt.divisibility", 16]]
        key = (kernel.fn.__name__, *signature.items(), *map(str, constants.items()), *aligned, *options.items())
        if key not in self._machines:
            source = ASTSource(kernel, signature, constants, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
            [program] = read_programs(compiled.asm["ptx"]).values()
            self._machines[key] = Machine(program), names, compiled.metadata
        return self._machines[key]


def _parameters(machine: Machine, values: list[Any]) -> bytes:
    """As they lie for the kernel; what Triton adds at the end stays nought."""
    held = bytearray(machine.program.parameter_bytes)
    for (offset, size), value in zip(machine.program.parameters.values(), values, strict=False):
        number = np.float32(value) if isinstance(value, float) else np.array(value, f"i{size}")
        held[offset : offset + size] = number.tobytes()
    return bytes(held)


def make_problem(name: str, length: int, head_dim: int, feature_dim: int) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    """Two rows, padded left and right, packed; two query heads to a key head."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(2, length, n, head_dim, generator=generator).bfloat16().transpose(1, 2) for n in (2, 1))
    maps = [
        make_feature_map(name, num_heads=2, head_dim=head_dim, feature_dim=feature_dim, side=side)
        for side in ("query", "key")
    ]
    for feature_map in maps:
        feature_map.weight.data += 0.05 * torch.randn(feature_map.weight.shape, generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, : length // 3] = False
    mask[1, length - length // 4 :] = False
    segment_ids = (torch.arange(length) // 100).expand(2, -1)
    return q, k, maps, {"mask_BL": mask, "segment_ids_BL": segment_ids}


def main() -> None:
    capability, length, head_dim, feature_dim = (int(sys.argv[i]) for i in (1, 3, 4, 5))
    gc.disable()  # programs of many thousand instructions are no garbage, and this process ends soon
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    launcher = Launcher(capability)
    triton.runtime.JITFunction.__getitem__ = lambda kernel, grid: launcher.of(kernel, grid)
    q, k, maps, options = make_problem(sys.argv[2], length, head_dim, feature_dim)
    weights = [feature_map.weight for feature_map in maps]
    found = triton_distillation_loss(q, k, *maps, tiles=pinned_tiles(capability), **options)
    gradients = torch.autograd.grad(found.loss, weights)
    exact = attention_distillation_loss(q.double(), k.double(), *maps, **options)
    expected = torch.autograd.grad(exact.loss, weights)
    report = {
        "kernels": sorted(launcher.ran),
        "loss_error": float((found.loss - exact.loss).detach().abs() / exact.loss.detach().abs()),
        "kl_error": float((found.kl_H - exact.kl_H).abs().max() / (exact.kl_H + exact.entropy_H).mean()),
        "gradient_errors": [float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
