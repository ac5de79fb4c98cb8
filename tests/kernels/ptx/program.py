"""Reads PTX, as nvcc and Triton write it, into instructions with resolved operands and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    text: str


class Address(NamedTuple):
    """[base + offset]; the base is a register, or a symbol, or nothing."""

    base: Register | Symbol | None
    offset: int


class Symbol(NamedTuple):
    """A name that the program declares: shared memory, a parameter, a label."""

    name: str


class Vector(NamedTuple):
    parts: tuple


Operand = Register | Immediate | Address | Symbol | Vector


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]
    """`ld.global.v4.f32` as its parts."""
    operands: tuple
    guard: str | None
    """The predicate register it hangs on."""
    negated: bool
    text: str
    line: int


@dataclass
class Program:
    """One kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """{symbol: (offset in the parameters, bytes)}"""
    parameter_bytes: int = 0
    shared: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """{symbol: (alignment, bytes, or None for what the launch gives)}"""
    kinds: dict[str, str] = field(default_factory=dict)
    """{register, or the letters before its number: type}"""

    def kind(self, register: str) -> str:
        """The declared type of a register, such as b32."""
        return self.kinds.get(register) or self.kinds[register.rstrip("0123456789")]


_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
_BYTES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[\w\s.]*)?\s+([\w$]+)(?:\[(\d+)\])?")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_SYMBOL = re.compile(r"[A-Za-z_$][\w$]*")


def read_programs(text: str) -> dict[str, Program]:
    """{name: kernel} of a PTX file."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = [line.split("//")[0] for line in text.splitlines()]
    shared_by_all: dict[str, tuple[int, int | None]] = {}
    programs: dict[str, Program] = {}
    current: Program | None = None
    depth, statement, began = 0, "", 0
    header = ""
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line or line.startswith(".loc"):  # which ends with the line
            continue
        if current is None:
            header += " " + line
            found = _SHARED.search(line)
            if found:
                shared_by_all[found[2]] = (int(found[1]), int(found[3]) if found[3] else None)
            if line == "{" and not _ENTRY.search(header):  # what a debugger reads
                break
            if line == "{":
                name = _ENTRY.findall(header)[-1]
                current = programs[name] = Program(name, shared=dict(shared_by_all))
                _read_parameters(current, header[header.rindex(name + "(") if name + "(" in header else 0 :])
                depth, header = 1, ""
            continue
        if line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if depth == 0:
                current = None
            continue
        if line.startswith("{") and not statement:  # "{ .reg ..." or "{ instruction"
            depth += 1
            line = line[1:].strip()
        label = re.match(r"^([\w$]+):\s*(.*)$", line)
        if label and not statement:
            current.labels[label[1]] = len(current.instructions)
            line = label[2]
        for piece in re.findall(r"[^;]*;|[^;]+$", line):
            statement = f"{statement} {piece}".strip()
            began = began or number
            if statement == "}":
                depth, statement, began = depth - 1, "", 0
            elif statement.endswith(";"):
                _take(current, statement[:-1].strip(), began)
                statement, began = "", 0
    return programs


def _read_parameters(program: Program, header: str) -> None:
    offset = 0
    for alignment, kind, name, count in _PARAMETER.findall(header):
        size = _BYTES[kind] * (int(count) if count else 1)
        step = int(alignment or _BYTES[kind])
        offset = -(-offset // step) * step
        program.parameters[name] = (offset, size)
        offset += size
    program.parameter_bytes = offset


def _take(program: Program, statement: str, line: int) -> None:
    while statement.startswith("{"):
        statement = statement[1:].strip()
    if statement.startswith("."):
        found, registers = _SHARED.search(statement), _REGISTERS.match(statement)
        if registers:
            for name in registers[2].split(","):
                program.kinds[name.split("<")[0].strip()] = registers[1]
        elif found:
            program.shared[found[2]] = (int(found[1]), int(found[3]) if found[3] else None)
        elif not statement.startswith(".pragma"):
            raise ValueError(f"line {line}: {statement}: not known here")
        return
    text, guard, negated = statement, None, False
    if statement.startswith("@"):
        written, statement = statement[1:].split(None, 1)
        negated, guard = written.startswith("!"), written.lstrip("!")
    opcode, _, rest = statement.strip().partition(" ")
    opcode, tab, more = opcode.partition("\t")
    rest = f"{more} {rest}" if tab else rest
    operands = tuple(_operand(program, piece) for piece in _split(rest))
    program.instructions.append(Instruction(tuple(opcode.split(".")), operands, guard, negated, text, line))


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket; `%r1|%p2` gives two."""
    pieces, depth, piece = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter in ",|" and depth == 0:
            pieces.append(piece.strip())
            piece = ""
        else:
            piece += letter
    pieces.append(piece.strip())
    return [piece for piece in pieces if piece]


def _operand(program: Program, text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(program, piece) for piece in _split(text[1:-1])))
    if text.startswith("["):
        inside = text[1:-1].strip()
        base, _, offset = inside.partition("+")
        base, offset = base.strip(), offset.strip() or "0"
        if re.fullmatch(r"-?\d+", base):
            return Address(None, int(base))
        where = _operand(program, base)
        assert isinstance(where, Register | Symbol), text
        return Address(where, int(offset, 0))
    if text.startswith("%"):
        return Register(text)
    if text in program.shared or text in program.parameters or text.startswith("$"):
        return Symbol(text)
    if _SYMBOL.fullmatch(text):  # a register that an inline assembly declares for itself, or a label
        return Register(text)
    return Immediate(text)


__all__ = ["Address", "Immediate", "Instruction", "Operand", "Program", "Register", "Symbol", "Vector", "read_programs"]
