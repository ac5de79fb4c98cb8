"""`hedgehog env`: what this machine has, what is missing and what that costs. Imports what it reports on, late."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from .quiet_libraries import quiet_libraries

REQUIRED_PACKAGES = (
    "hedgehog-llama",
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "sentencepiece",
    "pydantic",
    "typer",
)
OPTIONAL_PACKAGES = {
    "triton": ("triton", "the distillation loss on a GPU; the same loss in PyTorch otherwise"),
    "flash-attn": (
        "flash_attn",
        "softmax exports that are loaded with attn_implementation=flash_attention_2; nothing here imports it, for "
        "torch's SDPA has FlashAttention built in",
    ),
    "bitsandbytes": ("bitsandbytes", "model.quantization and finetune.optimizer=adamw8bit; refused otherwise"),
    "tensorboard": ("tensorboard", "logging.tensorboard; metrics.jsonl is written in any case"),
}
"""Distribution to (module, what it is for and what happens without it)."""
_NVCC_TIMEOUT_S = 10


@dataclass(frozen=True)
class OptionalPackage:
    """A package that a run can do without. `reason` says why it is absent."""

    name: str
    version: str | None
    use: str
    reason: str | None


@dataclass(frozen=True)
class Environment:
    """Everything that `hedgehog env` prints."""

    python: str
    platform: str
    cpu_cores: int
    packages: dict[str, str]
    optional: tuple[OptionalPackage, ...]
    torch_cuda: str | None
    """CUDA version that torch was built for; None for a CPU build."""
    devices: tuple[str, ...]
    no_device_reason: str | None
    nvcc: str
    compiler: str
    attention_backend: str
    loss_backend: str
    """Of distillation."""
    process_group: str


def read_environment() -> Environment:
    """Look at this machine. A missing or broken package is reported, never raised."""
    import torch

    from ..kernels.backends import select_attention_backend
    from ..kernels.distill_backends import select_distill_backend
    from ..kernels.feature_maps import make_feature_map

    devices, reason = _cuda_devices(torch)
    device = "cuda" if devices else "cpu"
    dtype = torch.bfloat16 if devices else torch.float32
    backend = select_attention_backend("auto", device=device, dtype=dtype, num_features=256, value_dim=128)
    map_q, map_k = (
        make_feature_map("hedgehog_softmax", num_heads=1, head_dim=128, side=side).to(device)
        for side in ("query", "key")
    )
    loss = select_distill_backend("auto", map_q, map_k, device=device, dtype=dtype)
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_cores=_usable_cores(),
        packages={name: _version(name) or "not installed" for name in REQUIRED_PACKAGES},
        optional=tuple(_optional(name, module, use) for name, (module, use) in OPTIONAL_PACKAGES.items()),
        torch_cuda=torch.version.cuda,
        devices=devices,
        no_device_reason=reason,
        nvcc=_program("nvcc", "builds the CUDA kernels at first use; linear attention runs in PyTorch otherwise"),
        compiler=_program(
            "g++", "nvcc, Triton and DeepSpeed's offloaded optimizer build with it on a GPU; tests emulate"
        ),
        attention_backend=f"{backend.name} ({backend.reason})",
        loss_backend=f"{loss.name} ({loss.reason})",
        process_group="nccl" if devices else "gloo",
    )


def print_environment(*, as_json: bool) -> None:
    """Print the environment, as aligned lines or JSON."""
    environment = read_environment()
    if as_json:
        print(json.dumps(asdict(environment), indent=2))
        return
    build = f"built for CUDA {environment.torch_cuda}" if environment.torch_cuda else "built for CPUs"
    rows: list[tuple[str, str]] = [
        ("python", environment.python),
        ("platform", environment.platform),
        ("CPU cores", str(environment.cpu_cores)),
        *(
            (name, f"{version}, {build}" if name == "torch" else version)
            for name, version in environment.packages.items()
        ),
    ]
    rows += [(f"GPU {index}", name) for index, name in enumerate(environment.devices)]
    if environment.no_device_reason:
        rows.append(("GPU", f"none: {environment.no_device_reason}"))
    rows += [
        ("nvcc", environment.nvcc),
        ("g++", environment.compiler),
        ("attention", environment.attention_backend),
        ("distillation loss", environment.loss_backend),
        ("processes talk by", environment.process_group),
    ]
    for package in environment.optional:
        state = package.version or f"absent: {package.reason}"
        rows.append((package.name, f"{state}; for {package.use}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _cuda_devices(torch: Any) -> tuple[tuple[str, ...], str | None]:
    if torch.version.cuda is None:
        return (), "this torch is a CPU build"
    if not torch.cuda.is_available():
        return (), "torch finds no CUDA device (no driver, or CUDA_VISIBLE_DEVICES hides them)"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return tuple(names), None


def _optional(name: str, module: str, use: str) -> OptionalPackage:
    quiet_libraries()
    version = _version(name)
    if version is None:
        return OptionalPackage(name, None, use, "not installed")
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch or CUDA fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return OptionalPackage(name, None, use, f"version {version} cannot be imported: {reason[:120]}")
    return OptionalPackage(name, version, use, None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _program(name: str, use: str) -> str:
    path = shutil.which(name)
    if path is None:
        return f"not found; {use}"
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_NVCC_TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer ({error})"
    lines = [line for line in output.splitlines() if "release" in line or line.startswith("g++")]
    return f"{path}: {lines[0].strip()}" if lines else path


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
