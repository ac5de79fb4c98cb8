"""Builds the stand-in, and gives the environment of processes that have it.

python tests/stand_in_gpu/stand_in.py COMMAND …      runs a command where there is that GPU
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """The device as a shared library, built once a source and torch. Raises RuntimeError with the compiler's words."""
    source = HERE / "device.cpp"
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    digest = hashlib.sha256(source.read_bytes() + version("torch").encode() + str(torch).encode()).hexdigest()[:16]
    target = folder / f"stand-in-gpu-{digest}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch, target.name)
                command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{torch / 'include'}", str(source)]
                command += ["-o", str(made), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"g++: {done.stderr[-2000:]}")
                os.replace(made, target)
    return target


def why_not() -> str | None:
    """Why there can be no stand-in here, or None."""
    import torch

    if sys.platform != "linux":
        return "it is made for Linux"
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this torch has CUDA of its own"
    return None if shutil.which("g++") else "g++ was not found"


def environment(library: Path, capacity: int | None = None) -> dict[str, str]:
    """Variables with which a Python process sees the stand-in, with `capacity` bytes of memory (80 GiB)."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "STAND_IN_GPU": str(library),
        **({} if capacity is None else {"STAND_IN_GPU_BYTES": str(capacity)}),
        "STAND_IN_PYTHON": sys.executable,
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes compiles where it has no kernel of the device's
    }


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(f"no stand-in for a GPU: {reason}")
    os.execvpe(sys.argv[1], sys.argv[1:], environment(build(Path(tempfile.gettempdir(), "stand-in-gpu"))))
