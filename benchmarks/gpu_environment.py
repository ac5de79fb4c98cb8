"""What figures were measured with: the device, versions, the commit."""

# setuptools maps hedgehog.* onto folders, which pyright does not see from outside the packages
# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from hedgehog.kernels.cuda.build import find_nvcc


def commit() -> dict[str, Any]:
    """The commit of the working tree that this file lies in, and whether anything differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "changed_files": bool(git("status", "--porcelain"))}


def last_line(*command: str) -> str | None:
    """Of a program's output; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else None


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit."""
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": last_line(find_nvcc() or "nvcc", "--version"),
        "triton": version_of("triton"),
        "flash-linear-attention": version_of("flash-linear-attention", "fla-core"),
    }
    found: dict[str, Any] = {"device": "emulation on a CPU", "versions": versions, **commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions["cudnn"] = torch.backends.cudnn.version()
        versions["driver"] = last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


def version_of(*names: str) -> str | None:
    """Of the first of these packages that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
