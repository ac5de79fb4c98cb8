"""library.py's structures lie as interface.h's do, field by field."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from hedgehog.kernels.cuda.build import FOLDER
from hedgehog.kernels.cuda.library import BackwardArguments, DecodeArguments, ForwardArguments, Strides

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "HedgehogStrides": Strides,
    "HedgehogForwardArguments": ForwardArguments,
    "HedgehogDecodeArguments": DecodeArguments,
    "HedgehogBackwardArguments": BackwardArguments,
}


def in_python(structure: type[ctypes.Structure]) -> dict[str, tuple[int, int]]:
    """{field: (offset, bytes)}"""
    names = [str(field[0]) for field in structure._fields_]
    return {name: (getattr(structure, name).offset, getattr(structure, name).size) for name in names}


@pytest.fixture(scope="module")
def in_c(tmp_path_factory) -> dict[str, dict[str, tuple[int, int]]]:
    """The same of interface.h, by a program that asks the compiler; one that a field's name is unknown to ends here."""
    lines = [
        f'std::printf("{name} {field} %zu %zu\\n", offsetof({name}, {field}), sizeof({name}::{field}));'
        for name, structure in STRUCTURES.items()
        for field in in_python(structure)
    ]
    folder: Path = tmp_path_factory.mktemp("interface")
    source, program = folder / "layout.cpp", folder / "layout"
    body = "\n".join(lines)
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "interface.h"\nint main() {{\n{body}\n}}\n', encoding="utf-8"
    )
    subprocess.run(["g++", "-std=c++17", f"-I{FOLDER}", str(source), "-o", str(program)], check=True)
    found: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in STRUCTURES}
    for line in subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines():
        name, field, offset, size = line.split()
        found[name][field] = int(offset), int(size)
    return found


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_field_lies_where_c_has_it(name, in_c):
    assert in_python(STRUCTURES[name]) == in_c[name]


def test_fields_in_another_order_are_noticed(in_c):
    class Swapped(ctypes.Structure):
        _fields_ = [("head", ctypes.c_int64), ("batch", ctypes.c_int64), ("token", ctypes.c_int64)]

    assert ctypes.sizeof(Swapped) == ctypes.sizeof(Strides) and in_python(Swapped) != in_c["HedgehogStrides"]
