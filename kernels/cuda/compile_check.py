"""`make cuda`: compiles every kernel for each architecture and holds it to what its source says it takes.

A source declares the kernels of its template in lines such as

    RESOURCES(128, 256, fused, 255, 157696);    // head dim, features, map, registers, bytes of shared memory

of which the compiler itself holds the launch to the shared memory (the line is a static_assert). Here: no spilled
registers, no stack (where an array goes whose index the compiler does not know), no more registers than declared, no
shared memory beside that of the launch, and no wgmma that the compiler could not leave asynchronous. Needs nvcc, no
GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .build import FOLDER, HOPPER_UNITS, NVCC_FLAGS, find_nvcc

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a")
_DECLARED = re.compile(r"^RESOURCES\((\d+), (\d+), (fused|given|whole|wgmma), (\d+), (\d+)\);$", re.MULTILINE)
KERNELS = {
    "forward.cu": "linear_attention_forward",
    "forward_hopper.cu": "linear_attention_forward_hopper",
    "decode.cu": "linear_attention_decode",
    "backward_queries.cu": "linear_attention_query_gradients",
    "backward_keys.cu": "linear_attention_key_gradients",
    "backward_queries_hopper.cu": "linear_attention_query_gradients",
    "backward_keys_hopper.cu": "linear_attention_key_gradients",
    "backward_inputs.cu": "linear_attention_input_gradients",
}
# small helpers beside them, without a template: {name: registers}
PLAIN_KERNELS = {"segment_prefix": 40, "segment_suffix": 40}
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
# wgmma that has to wait for itself, setmaxnreg that has no effect: right results, at half the speed
_LOSSES = ("Potential Performance Loss", "is injected in around line")
_NAME = re.compile(r"_ZN8hedgehog\d+([a-z_]+?)(?:ILi(\d+)ELi(\d+)ELb([01])E(?:Li(\d+)E)?)?E")


@dataclass(frozen=True)
class Usage:
    """What the compiler reports for one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    static_shared_bytes: int
    spilled_bytes: int
    stack_bytes: int


def declared_resources(unit: str) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes of shared memory)} of the RESOURCES lines of a source."""
    source = (FOLDER / unit).read_text(encoding="utf-8")
    kernel = KERNELS[unit]
    return {f"{kernel}<{d},{f},{fused}>": (int(r), int(s)) for d, f, fused, r, s in _DECLARED.findall(source)}


def read_usage(compiler_output: str) -> list[Usage]:
    """The kernels in what `ptxas -v` printed."""
    usages = []
    pieces = _ENTRY.split(compiler_output)
    for mangled, architecture, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        spills, used = _SPILLS.search(text), _USED.search(text)
        assert spills and used, text
        usages.append(
            Usage(
                readable_name(mangled),
                architecture,
                int(used[1]),
                int(used[2] or 0),
                int(spills[2]) + int(spills[3]),
                int(spills[1]),
            )
        )
    return usages


def readable_name(mangled: str) -> str:
    """linear_attention_forward<128,256,fused> for the C++ compiler's name of it."""
    match = _NAME.match(mangled)
    assert match, mangled
    name, head_dim, features, fused, number = match.groups()
    if head_dim is None:
        return name
    kind = "fused" if fused == "1" else "given"
    if name.endswith("_gradients"):  # the number is interface.h's HedgehogBackwardKernel; elsewhere, splits
        kind = {"1": "whole", "2": "wgmma"}.get(number, kind)
    return f"{name}<{head_dim},{features},{kind}>"


def faults(usage: Usage, declared: dict[str, tuple[int, int]]) -> list[str]:
    """What is wrong with one kernel, in words."""
    where = f"{usage.kernel} on {usage.architecture}"
    if usage.kernel in PLAIN_KERNELS:
        registers = PLAIN_KERNELS[usage.kernel]
    elif usage.kernel in declared:
        registers = declared[usage.kernel][0]
    else:
        return [f"{where}: no RESOURCES line declares it"]
    found = []
    if usage.spilled_bytes:
        found.append(f"{where}: spills {usage.spilled_bytes} bytes of registers")
    elif usage.stack_bytes:
        found.append(f"{where}: {usage.stack_bytes} bytes of stack")
    if usage.registers > registers:
        found.append(f"{where}: {usage.registers} registers, declared {registers}")
    if usage.static_shared_bytes:
        found.append(f"{where}: {usage.static_shared_bytes} bytes of shared memory beside those of the launch")
    return found


def compile_for(nvcc: str, unit: str, architecture: str) -> list[Usage]:
    """Compiles one source. Raises RuntimeError with the compiler's words if that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch, "kernels.cubin"))
        source = str(FOLDER / unit)
        done = subprocess.run(
            [nvcc, *NVCC_FLAGS, "-cubin", f"-arch={architecture}", "-Xptxas=-v", source, "-o", output],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{unit} for {architecture}: {done.stderr.strip()}")
    losses = [line for line in done.stderr.splitlines() if any(mark in line for mark in _LOSSES)]
    if losses:
        raise RuntimeError(f"{unit} for {architecture}: " + "\n".join(losses))
    return read_usage(done.stderr)


def main() -> int:
    """Compiles all sources for all architectures asked for; prints a line a kernel; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    jobs = [
        (unit, architecture)
        for architecture in parser.parse_args().architectures
        for unit in KERNELS
        if architecture == "sm_90a" or unit not in HOPPER_UNITS
    ]
    wrong: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler of its own
        results = pool.map(lambda job: compile_for(nvcc, *job), jobs)
        for (unit, architecture), usages in zip(jobs, results, strict=True):
            declared = declared_resources(unit)
            for usage in usages:
                shared = declared.get(usage.kernel, (0, 0))[1]
                spills = f"{usage.spilled_bytes} bytes spilled"
                print(
                    f"{architecture:7} {usage.kernel:44} {usage.registers:4} registers "
                    f"{shared:7} bytes shared  {spills}",
                    flush=True,
                )
                wrong += faults(usage, declared)
            wrong += [f"{name}: declared, not compiled" for name in set(declared) - {u.kernel for u in usages}]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
