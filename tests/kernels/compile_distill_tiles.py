"""Compiles the distillation kernels for GPUs that need not be there; prints a JSON list of what ptxas says of each.

    python compile_distill_tiles.py CAPABILITY DTYPE HEAD_DIM FEATURE_DIM [KERNEL …]

A process of its own, since Triton decides at its import between compiling and interpreting.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from typing import Any

_FORM = "hedgehog_softmax"
_POINTERS_32 = ("weight", "tail", "row_weight", "log2_sum", "z", "cross_entropy", "entropy", "grad_phi", "partial")
_FLOATS = ("scale", "eps", "factor", "bound")


def compile_kernel(
    name: str, capability: int, dtype: str, constants: dict[str, Any], options: dict[str, int]
) -> dict[str, Any]:
    """Shared memory, registers and spills of one kernel, arguments aligned as torch's allocator and Llama have them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hedgehog.kernels import distill_tiles

    kernel = getattr(distill_tiles, name)
    types: dict[str, str] = {"q": dtype, "k": dtype, "x": dtype}
    types |= dict.fromkeys(("phi", "phi_q", "phi_k"), "fp32" if dtype == "fp32" else "bf16")
    types |= dict.fromkeys(_POINTERS_32, "fp32") | dict.fromkeys(("start", "end", "count"), "i32")
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in types:
            signature[argument] = "*" + types[argument]
        else:
            signature[argument] = "fp32" if argument in _FLOATS else "i32"
        if argument in types or "stride" in argument:
            aligned[index,] = [["tt.divisibility", 16]]
    used = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = ASTSource(kernel, signature, used, aligned)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = {key: re.search(rf"(\d+) {words}", log.getvalue()) for key, words in _PTXAS.items()}
    return {
        "kernel": name,
        "shared_bytes": compiled.metadata.shared,
        **{key: int(match[1]) if match else None for key, match in found.items()},
        "tensor_cores": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))),
    }


_PTXAS = {"spill_store_bytes": "bytes spill stores", "spill_load_bytes": "bytes spill loads", "registers": "registers"}


def compile_all(
    capability: int, dtype: str, head_dim: int, feature_dim: int, only: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Each kernel at the tiles that a launch would use, with and without its optional parts."""
    from hedgehog.kernels import distill_tiles
    from hedgehog.kernels.distill_triton import pinned_tiles

    tiles = pinned_tiles(capability)
    shape = {"D": head_dim, "P": feature_dim, "F": 2 * feature_dim, "UPCAST": False, "BLOCK": tiles.chunk}
    form = {"FORM": distill_tiles.TWO_SOFTMAXES.value}
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("map_features", {**form, "WITH_TAIL": True}),
        ("row_statistics", {"WITH_LOG_SUM": True, "SAMPLED": True}),
        ("sweep_queries", {"BLOCK_Q": tiles.rows, "BLOCK_K": tiles.passing, "WITH_GRAD": True, "SAMPLED": False}),
        ("sweep_queries", {"BLOCK_Q": tiles.rows, "BLOCK_K": tiles.passing, "WITH_GRAD": True, "SAMPLED": True}),
        ("sweep_keys", {"BLOCK_Q": tiles.passing, "BLOCK_K": tiles.rows, "SAMPLED": False}),
        ("sweep_keys", {"BLOCK_Q": tiles.passing, "BLOCK_K": tiles.rows, "SAMPLED": True}),
        ("weight_gradient", {**form, "BLOCK": tiles.weight_rows}),
    ]
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return [
        compile_kernel(name, capability, dtype, shape | constants, options)
        | {"sampled": constants.get("SAMPLED", False)}
        for name, constants in jobs
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
