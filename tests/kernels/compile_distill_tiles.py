"""Compiles the distillation kernels for GPUs that need not be there; prints a JSON list of what is in the machine code.

    python compile_distill_tiles.py CAPABILITY DTYPE HEAD_DIM FEATURE_DIM [KERNEL …]

A process of its own, since Triton decides at its import between compiling and interpreting. All it takes is Triton,
which brings assembler and disassembler.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_POINTERS_32 = ("weight", "tail", "row_weight", "log2_sum", "z", "kl", "entropy", "grad_phi", "partial")
_POINTERS_INT = ("start", "end", "count", "counted", "listed", "rank", "spanned")
_FLOATS = ("scale", "eps", "factor", "bound")
_HEADS = ("heads_per_k_head", "heads_per_x_head")


def compile_kernel(
    name: str, capability: int, dtype: str, constants: dict[str, Any], options: dict[str, int], *, grouped: bool
) -> dict[str, Any]:
    """What one kernel takes and what its loops hold, arguments aligned as torch's allocator and Llama have them.

    `grouped`: several query heads share a key head; where they do not, the launch makes the 1 a constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hedgehog.kernels import distill_maps, distill_tiles

    kernel = getattr(distill_tiles, name, None) or getattr(distill_maps, name)
    types: dict[str, str] = {"q": dtype, "k": dtype, "x": dtype}
    types |= dict.fromkeys(("phi", "phi_q", "phi_k", "g"), "fp32" if dtype == "fp32" else "bf16")
    types |= dict.fromkeys(_POINTERS_32, "fp32") | dict.fromkeys(_POINTERS_INT, "i32")
    constants = constants | ({} if grouped else dict.fromkeys(_HEADS, 1))
    used = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in used:
            signature[argument] = "constexpr"
        elif argument in types:
            signature[argument] = "*" + types[argument]
        else:
            signature[argument] = "fp32" if argument in _FLOATS else "i32"
        if argument in types or "stride" in argument:
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, used, aligned)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = {key: re.search(rf"(\d+) {words}", log.getvalue()) for key, words in _PTXAS.items()}
    return {
        "kernel": name,
        "constants": {key: value for key, value in used.items() if key in ("FORM", "WITH_GRAD")},
        "grouped": grouped,
        "shared_bytes": compiled.metadata.shared,
        **{key: int(match[1]) if match else None for key, match in found.items()},
        "tensor_cores": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))),
        "loops": loops(machine_code(compiled.asm["cubin"])),
    }


_PTXAS = {"spill_store_bytes": "bytes spill stores", "spill_load_bytes": "bytes spill loads", "registers": "registers"}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)


def machine_code(cubin: bytes) -> str:
    """Disassembled by what Triton brings."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(disassembler), "-sass", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def loops(code: str) -> list[dict[str, int]]:
    """What lies between each backward branch and its target, where that is a tile's work: it has products."""
    instructions = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(code)]
    assert len(instructions) > 100, "the disassembler's format is another"
    found = []
    for at, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) >= at:
            continue
        inside = [name.split(".")[0] for place, name, _ in instructions if int(target[1], 16) <= place <= at]
        count = {key: sum(name in names for name in inside) for key, names in _COUNTED.items()}
        if count["products"]:
            found.append({"instructions": len(inside), **count})
    return found


_COUNTED = {"products": ("HGMMA", "HMMA"), "local": ("LDL", "STL"), "special": ("MUFU",)}


def compile_all(
    capability: int, dtype: str, head_dim: int, feature_dim: int, only: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Each kernel at the tiles that a launch would use, in each of the forms that one may ask for."""
    from hedgehog.kernels import distill_maps
    from hedgehog.kernels.distill_triton import pinned_tiles

    tiles = pinned_tiles(capability)
    shape = {"D": head_dim, "P": feature_dim, "F": 2 * feature_dim, "INTERPRETED": False, "BLOCK": tiles.chunk}
    pair = {"BLOCK_Q": tiles.rows, "BLOCK_K": tiles.passing}
    forms = [getattr(distill_maps, name).value for name in ("TWO_SOFTMAXES", "ONE_SOFTMAX", "BOUNDED_EXP")]
    jobs: list[tuple[str, dict[str, Any], bool]] = [
        *(("map_features", {"FORM": form, "WITH_TAIL": True}, False) for form in forms),
        ("map_features", {"FORM": forms[0], "WITH_TAIL": False}, True),
        ("carry_tails", {}, False),
        ("row_sums", {}, False),
        ("log_sums", {**pair, "BLOCK_K": tiles.rows}, False),
        ("log_sums", {**pair, "BLOCK_K": tiles.rows}, True),
        ("sweep", {**pair, "WITH_GRAD": True}, False),
        ("sweep", {**pair, "WITH_GRAD": True}, True),
        ("sweep", {**pair, "WITH_GRAD": False}, False),
        ("keys_gradient", {**pair, "STEP": tiles.passing}, False),
        *(("weight_gradient", {"FORM": form, "BLOCK": tiles.weight_rows}, False) for form in forms),
        ("weight_gradient", {"FORM": forms[0], "BLOCK": tiles.weight_rows}, True),
    ]
    return [
        compile_kernel(
            name,
            capability,
            dtype,
            shape | constants,
            {
                "num_warps": tiles.warps,
                "num_stages": tiles.product_stages if name == "keys_gradient" else tiles.stages,
            },
            grouped=grouped,
        )
        for name, constants, grouped in jobs
        if not only or name in only
    ]


def main() -> None:
    capability, dtype, head_dim, feature_dim, *only = sys.argv[1:]
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory() as cache:  # a cached kernel has no log
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps(compile_all(int(capability), dtype, int(head_dim), int(feature_dim), tuple(only))))


if __name__ == "__main__":
    main()
