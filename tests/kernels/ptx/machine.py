"""Runs a kernel's PTX on a CPU, instruction by instruction: what nvcc made of the source, its inline assembly included.

The emulation (kernels/cuda/emulation) runs the C++ source with functions in the place of inline assembly. Here the
assembly itself is read, by another reader of the PTX manual. All threads of a block that stand at one instruction take
it together; a branch parts them, and those behind go first until they meet again. Blocks run one after the other. Asked
to, it lets warpgroups go ahead of others.

Beyond what an instruction computes, a Fault comes of: an access outside what the kernel was given, or not aligned; an
instruction for a warp that only a part of it reaches; a wait that nobody ends; a wgmma whose operand in shared memory
is changed before it was waited for. cp.async brings its bytes as late as it may: when its group is waited for. Shared
memory begins as NaN. What is not seen: a missing barrier (the emulation's part), and how fast it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import scalar, tensor
from .memory import RAW, Fault, Memory
from .program import Address, Immediate, Instruction, Operand, Program, Register, Symbol, Vector
from .scalar import TYPES, raw

SHARED_START = 1024
"""Where a block's shared memory begins: what is below belongs to the system."""
SHARED_WINDOW = 0x7F << 40
"""Where it stands among generic addresses."""
WARP, WARPGROUP = 32, 128

Step = Callable[["Block", "np.ndarray | None"], None]


@dataclass
class _Copies:
    """cp.async of some threads."""

    destination_N: np.ndarray
    source_N: np.ndarray
    bytes_N: np.ndarray
    """Read; the rest of `width` becomes zero."""
    group_N: np.ndarray
    waiting_N: np.ndarray
    """The threads."""
    width: int


@dataclass
class _Product:
    """A wgmma under way: what it read, to be the same still when it is waited for."""

    group: int
    addresses: list[np.ndarray]
    bits: list[np.ndarray]
    text: str


class _Registers(dict[str, np.ndarray]):
    """By name. Where nothing was written all bits are set, which as a float is NaN, and predicates are false."""

    def __init__(self, program: Program, num_threads: int) -> None:
        super().__init__()
        self._program, self._num_threads = program, num_threads

    def __missing__(self, name: str) -> np.ndarray:
        wanted = np.dtype(TYPES[self._program.kind(name)])
        if wanted == np.bool_:
            return np.zeros(self._num_threads, np.bool_)
        return np.full(self._num_threads, np.iinfo(RAW[wanted.itemsize]).max, RAW[wanted.itemsize])


@dataclass
class Block:
    """The threads of one block and their shared memory."""

    program: Program
    num_threads: int
    index: tuple[int, int, int]
    grid: tuple[int, int, int]
    parameters: np.ndarray
    global_memory: Memory
    shared: Memory
    copies: list[_Copies] = field(default_factory=list)
    products: dict[int, list[_Product]] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)
    barriers: dict[int, np.ndarray] = field(default_factory=dict)
    """{barrier: threads that have arrived}"""

    def __post_init__(self) -> None:
        self.registers = _Registers(self.program, self.num_threads)
        self.thread_N = np.arange(self.num_threads, dtype=np.uint32)
        self.copy_group_N = np.zeros(self.num_threads, np.int64)
        self.pc_N = np.zeros(self.num_threads, np.int64)
        self.ended_N = np.zeros(self.num_threads, np.bool_)
        self.waiting_N = np.full(self.num_threads, -1)

    def special(self, name: str) -> np.ndarray | int:
        """%tid.x and what else a thread may ask of itself."""
        kind, _, axis = name[1:].partition(".")
        at = "xyz".find(axis)
        if kind == "tid":
            return self.thread_N if axis == "x" else np.zeros_like(self.thread_N)
        if kind == "laneid":
            return self.thread_N % WARP
        if kind == "ntid":
            return (self.num_threads, 1, 1)[at]
        return {"ctaid": self.index, "nctaid": self.grid}[kind][at]

    def threads(self, mask_N: np.ndarray | None) -> np.ndarray:
        return np.arange(self.num_threads) if mask_N is None else np.nonzero(mask_N)[0]

    def whole(self, mask_N: np.ndarray | None, size: int, what: str) -> np.ndarray:
        """The first threads of the warps (or warpgroups) at an instruction, all of whose threads must be there."""
        if mask_N is None:
            return np.arange(0, self.num_threads, size)
        parts = mask_N.reshape(-1, size)
        if (parts.any(1) != parts.all(1)).any():
            raise Fault(f"{what}: only some threads of a {'warp' if size == WARP else 'warpgroup'} come here")
        return np.nonzero(parts.any(1))[0] * size


class Machine:
    """A kernel made ready to run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.shared_at: dict[str, int] = {}
        at = SHARED_START
        for name, (alignment, size) in program.shared.items():  # what the launch gives comes last
            if size is not None:
                at = -(-at // alignment) * alignment
                self.shared_at[name], at = at, at + size
        for name, (alignment, size) in program.shared.items():
            if size is None:
                at = -(-at // alignment) * alignment
                self.shared_at[name] = at
        self.static_end = at
        self.control = {"bra": self._branch, "ret": self._return, "exit": self._return, "bar": self._barrier}
        self.control["barrier"] = self._barrier
        self.steps = [self._compile(instruction) for instruction in program.instructions]

    def run(
        self,
        grid: tuple[int, int, int],
        num_threads: int,
        shared_bytes: int,
        parameters: bytes,
        global_memory: Memory,
        order: np.random.Generator | None = None,
    ) -> None:
        """All blocks of a launch; with `order`, some warps go on while others stand, drawn anew each time. Faults."""
        held = np.frombuffer(parameters.ljust(-(-len(parameters) // 8) * 8, b"\0"), np.uint8)
        if len(parameters) != self.program.parameter_bytes:
            raise Fault(f"{self.program.name} takes {self.program.parameter_bytes} bytes, not {len(parameters)}")
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    shared = np.full(self.static_end - SHARED_START + -(-shared_bytes // 16) * 16, 0xFF, np.uint8)
                    memory = Memory([(SHARED_START, shared)])
                    block = Block(self.program, num_threads, (x, y, z), grid, held, global_memory, memory)
                    with np.errstate(all="ignore"):
                        self._run_block(block, order)

    def _run_block(self, block: Block, order: np.random.Generator | None) -> None:
        while True:
            ready_N = ~block.ended_N & (block.waiting_N < 0)
            if order is not None:
                go_on = order.integers(2, size=-(-block.num_threads // WARPGROUP)).astype(bool)
                chosen_N = ready_N & go_on.repeat(WARPGROUP)[: block.num_threads]
                ready_N = chosen_N if chosen_N.any() else ready_N
            if not ready_N.any():
                if block.ended_N.all():
                    break
                raise Fault(f"threads {np.nonzero(~block.ended_N)[0][:8].tolist()} … wait for ever")
            at = int(block.pc_N[ready_N].min())
            here_N = ready_N & (block.pc_N == at)
            behind = block.pc_N[ready_N & ~here_N]
            self._run_together(block, here_N, at, int(behind.min()) if len(behind) else len(self.steps))
        if any(block.products.values()):
            raise Fault("the kernel ends before it has waited for wgmma")

    def _run_together(self, block: Block, here_N: np.ndarray, at: int, until: int) -> None:
        """Threads at one instruction, from there on until they part, wait, or meet those at `until`."""
        everyone = bool(here_N.all())
        mask_N = None if everyone else here_N
        instructions = self.program.instructions
        while at < until:
            step, instruction = self.steps[at], instructions[at]
            taken_N = mask_N
            if instruction.guard is not None:
                guard_N = block.registers[instruction.guard] ^ instruction.negated
                taken_N = guard_N if mask_N is None else guard_N & mask_N
            try:
                if instruction.opcode[0] in self.control:
                    block.pc_N[here_N] = at + 1
                    self.control[instruction.opcode[0]](block, taken_N, instruction)
                    return
                if taken_N is None or taken_N.any():
                    step(block, taken_N)
            except (Fault, ValueError) as error:
                place = f"{self.program.name}, line {instruction.line}: {instruction.text[:120]}"
                raise Fault(f"{place}\n    block {block.index}: {type(error).__name__}: {error}") from error
            at += 1
        block.pc_N[here_N] = at

    # control

    def _branch(self, block: Block, taken_N: np.ndarray | None, instruction: Instruction) -> None:
        target = self.program.labels[instruction.operands[0].name]
        if taken_N is None:
            block.pc_N[:] = target
        else:
            block.pc_N[taken_N] = target

    def _return(self, block: Block, taken_N: np.ndarray | None, instruction: Instruction) -> None:
        block.ended_N[block.threads(taken_N)] = True

    def _barrier(self, block: Block, taken_N: np.ndarray | None, instruction: Instruction) -> None:
        """bar.sync and bar.arrive. A barrier counts whole warps; bar.warp.sync keeps together what comes together."""
        kind = instruction.opcode[-1] if instruction.opcode[-1] != "aligned" else instruction.opcode[-2]
        if "warp" in instruction.opcode:
            block.whole(taken_N, WARP, "bar.warp.sync")
            return
        block.whole(taken_N, WARP, "bar")
        threads = block.threads(taken_N)
        number_N = self._numbers(block, instruction.operands[0])
        expected_N = np.full(block.num_threads, block.num_threads)
        if len(instruction.operands) > 1:
            expected_N = self._numbers(block, instruction.operands[1])
        for number in np.unique(number_N[threads]):
            arriving = threads[number_N[threads] == number]
            self._arrive(block, int(number), arriving, np.unique(expected_N[arriving]), kind == "sync")

    def _numbers(self, block: Block, operand: Operand) -> np.ndarray:
        """One for each thread."""
        return np.broadcast_to(self._read(operand, "u32")(block), block.num_threads).astype(np.int64)

    def _arrive(self, block: Block, number: int, threads: np.ndarray, expected: np.ndarray, waits: bool) -> None:
        warps = np.unique(threads // WARP)
        if len(expected) != 1 or len(warps) * WARP != len(threads) or expected[0] % WARP or not 0 <= number < 16:
            raise Fault(f"barrier {number} for {expected.tolist()} threads: whole warps, one number, 0 to 15")
        arrived_N = block.barriers.setdefault(number, np.zeros(block.num_threads, np.bool_))
        if arrived_N[threads].any():
            raise Fault(f"threads arrive a second time at barrier {number}, which is not complete")
        arrived_N[threads] = True
        if waits:
            block.waiting_N[threads] = number
        if arrived_N.sum() > expected[0]:
            raise Fault(f"{arrived_N.sum()} threads at barrier {number}, which is for {expected[0]}")
        if arrived_N.sum() == expected[0]:
            block.waiting_N[block.waiting_N == number] = -1
            del block.barriers[number]

    # operands

    def _read(self, operand: Operand, kind: str) -> Callable[[Block], Any]:
        """Values of `kind`, one for each thread or one for all."""
        wanted = TYPES[kind]
        if isinstance(operand, Register):
            name = operand.name
            if name.startswith(("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid")):
                return lambda block: np.asarray(block.special(name)).astype(wanted)
            if kind == "pred":
                return lambda block: block.registers[name]
            width, declared = np.dtype(wanted).itemsize, np.dtype(TYPES[self.program.kind(name)]).itemsize
            if width == declared:
                return lambda block: block.registers[name].view(wanted)
            if width > declared:
                raise ValueError(f"{name} is narrower than {kind}")
            return lambda block: block.registers[name].astype(RAW[width]).view(wanted)
        if isinstance(operand, Symbol):
            where = self.shared_at.get(operand.name)
            value = self.program.parameters[operand.name][0] if where is None else where
            return lambda block: np.asarray(value, wanted)
        assert isinstance(operand, Immediate), operand
        constant = np.asarray(_constant(operand.text, kind)).astype(wanted)
        return lambda block: constant

    def _write(self, operand: Operand, kind: str) -> Callable[[Block, np.ndarray | None, np.ndarray], None]:
        assert isinstance(operand, Register), operand
        name = operand.name
        if name == "_":  # not wanted
            return lambda block, mask_N, value: None
        declared = TYPES[self.program.kind(name)]
        width = 1 if declared is np.bool_ else np.dtype(declared).itemsize

        def write(block: Block, mask_N: np.ndarray | None, value: np.ndarray) -> None:
            if declared is not np.bool_:
                if value.itemsize != width:  # ld.u8 and such into a wider register
                    value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).astype(RAW[width])
                value = raw(value)
            if value.ndim == 0:
                value = np.full(block.num_threads, value)
            if mask_N is not None:
                value = np.where(mask_N, value, block.registers[name])
            block.registers[name] = value

        return write

    def _addresses(self, operand: Operand) -> Callable[[Block], np.ndarray]:
        assert isinstance(operand, Address), operand
        offset = operand.offset
        if operand.base is None:
            return lambda block: np.full(block.num_threads, offset, np.int64)
        wide = isinstance(operand.base, Symbol) or self.program.kind(operand.base.name).endswith("64")
        base = self._read(operand.base, "u64" if wide else "u32")

        def addresses(block: Block) -> np.ndarray:
            found_N = base(block).astype(np.int64) + offset
            return found_N if found_N.ndim else np.broadcast_to(found_N, block.num_threads)

        return addresses

    # instructions

    def _compile(self, instruction: Instruction) -> Step:
        name = instruction.opcode[0]
        if name in self.control:
            return lambda block, mask_N: None
        special = getattr(self, f"_op_{name}", None)
        if special is not None:
            return special(instruction)
        kind = instruction.opcode[-1]
        if name in scalar.UNARY and len(instruction.operands) == 2:
            return self._apply(scalar.UNARY[name], instruction, kind, kind)
        if name in scalar.BINARY:
            by = "u32" if name in ("shl", "shr") else kind
            return self._apply(scalar.BINARY[name], instruction, kind, kind, by)
        raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")

    def _apply(self, function: Callable, instruction: Instruction, to: str, *kinds: str) -> Step:
        sources = [self._read(x, kind) for x, kind in zip(instruction.operands[1:], kinds, strict=True)]
        write = self._write(instruction.operands[0], to)
        if len(sources) == 2:
            a, b = sources
            return lambda block, mask_N: write(block, mask_N, np.asarray(function(a(block), b(block))))
        return lambda block, mask_N: write(block, mask_N, np.asarray(function(*(x(block) for x in sources))))

    def _op_mov(self, instruction: Instruction) -> Step:
        """Also packs a vector of narrower registers into a wider one, and unpacks it."""
        kind, (to, source) = instruction.opcode[-1], instruction.operands
        if isinstance(to, Vector):
            half = {"b32": "b16", "b64": "b32"}[kind]
            read, writes = self._read(source, kind), [self._write(x, half) for x in to.parts]
            bits = 8 * np.dtype(TYPES[half]).itemsize

            def unpack(block: Block, mask_N: np.ndarray | None) -> None:
                value = read(block)
                for i, write in enumerate(writes):
                    write(block, mask_N, (value >> value.dtype.type(i * bits)).astype(TYPES[half]))

            return unpack
        if isinstance(source, Vector):
            half = {"b32": "b16", "b64": "b32"}[kind]
            reads, write = [self._read(x, half) for x in source.parts], self._write(to, kind)
            bits = 8 * np.dtype(TYPES[half]).itemsize

            def pack(block: Block, mask_N: np.ndarray | None) -> None:
                parts = [np.asarray(read(block)).astype(TYPES[kind]) for read in reads]
                write(block, mask_N, np.asarray(parts[0] | (parts[1] << parts[1].dtype.type(bits))))

            return pack
        return self._apply(lambda a: a, instruction, kind, kind)

    def _op_mul(self, instruction: Instruction) -> Step:
        modifier, kind = instruction.opcode[1], instruction.opcode[-1]
        if modifier == "wide":
            to = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind]
            return self._apply(lambda a, b: scalar.multiply_wide(kind, a, b), instruction, to, kind, kind)
        if modifier == "hi":
            return self._apply(lambda a, b: scalar.multiply_high(kind, a, b), instruction, kind, kind, kind)
        return self._apply(scalar.BINARY["mul"], instruction, kind, kind, kind)

    def _op_mad(self, instruction: Instruction) -> Step:
        kind = instruction.opcode[-1]
        if "wide" in instruction.opcode:
            to = {"u32": "u64", "s32": "s64"}[kind]
            fused = lambda a, b, c: scalar.multiply_wide(kind, a, b) + c  # noqa: E731
            return self._apply(fused, instruction, to, kind, kind, to)
        return self._apply(scalar.multiply_add, instruction, kind, kind, kind, kind)

    _op_fma = _op_mad

    def _op_setp(self, instruction: Instruction) -> Step:
        comparison, kind = instruction.opcode[1], instruction.opcode[-1]
        return self._apply(lambda a, b: scalar.compare(comparison, a, b), instruction, "pred", kind, kind)

    def _op_selp(self, instruction: Instruction) -> Step:
        kind = instruction.opcode[-1]
        return self._apply(lambda a, b, p: np.where(p, a, b), instruction, kind, kind, kind, "pred")

    def _op_cvt(self, instruction: Instruction) -> Step:
        *modifiers, to, source = instruction.opcode[1:]
        if to == "bf16x2":
            packed = lambda a, b: (scalar.bf16_of(a) << np.uint32(16)) | scalar.bf16_of(b)  # noqa: E731
            return self._apply(packed, instruction, "b32", "f32", "f32")
        if to == "bf16":
            return self._apply(lambda a: scalar.bf16_of(a).astype(np.uint16), instruction, "b16", "f32")
        if source == "bf16":
            return self._apply(tensor.floats_of_bf16, instruction, "f32", "b16")
        return self._apply(
            lambda a: scalar.convert(tuple(modifiers), to, source, np.asarray(a)), instruction, to, source
        )

    def _op_cvta(self, instruction: Instruction) -> Step:
        to_space, window = "to" in instruction.opcode, np.uint64(SHARED_WINDOW)
        if "shared" not in instruction.opcode:
            return self._apply(lambda a: a, instruction, "u64", "u64")
        return self._apply(lambda a: a - window if to_space else a + window, instruction, "u64", "u64")

    def _op_bfi(self, instruction: Instruction) -> Step:
        kind = instruction.opcode[-1]
        return self._apply(scalar.insert_bits, instruction, kind, kind, kind, "u32", "u32")

    def _op_bfe(self, instruction: Instruction) -> Step:
        kind = instruction.opcode[-1]
        return self._apply(scalar.extract_bits, instruction, kind, kind, "u32", "u32")

    def _op_redux(self, instruction: Instruction) -> Step:
        """One number of a warp's, to all its lanes."""
        operation, kind = instruction.opcode[2], instruction.opcode[-1]
        function = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation]
        write, read = self._write(instruction.operands[0], kind), self._read(instruction.operands[1], kind)

        def reduce(block: Block, mask_N: np.ndarray | None) -> None:
            block.whole(mask_N, WARP, "redux.sync")
            value = np.broadcast_to(read(block), block.num_threads).reshape(-1, WARP)
            write(block, mask_N, function.reduce(value, axis=1).repeat(WARP).astype(TYPES[kind]))

        return reduce

    def _op_prmt(self, instruction: Instruction) -> Step:
        return self._apply(scalar.permute_bytes, instruction, "b32", "b32", "b32", "b32")

    def _op_ld(self, instruction: Instruction) -> Step:
        space, kind = instruction.opcode[1], instruction.opcode[-1]
        to, source = instruction.operands
        writes = [self._write(x, kind) for x in (to.parts if isinstance(to, Vector) else (to,))]
        addresses, width = self._addresses(source), np.dtype(TYPES[kind]).itemsize

        def load(block: Block, mask_N: np.ndarray | None) -> None:
            address_N = addresses(block)
            if mask_N is not None:
                address_N = address_N[mask_N]
            if (address_N % (width * len(writes))).any():
                raise Fault(f"{width * len(writes)} bytes that are not aligned")
            for i, write in enumerate(writes):
                if space == "param":
                    found_N = block.parameters.view(RAW[width])[(address_N + i * width) // width]
                else:
                    found_N = self._memory(block, space).load(address_N + i * width, width)
                if mask_N is not None:
                    whole_N = np.zeros(block.num_threads, found_N.dtype)
                    whole_N[mask_N] = found_N
                    found_N = whole_N
                write(block, mask_N, found_N.view(TYPES[kind]))

        return load

    def _op_st(self, instruction: Instruction) -> Step:
        space, kind = instruction.opcode[1], instruction.opcode[-1]
        to, source = instruction.operands
        reads = [self._read(x, kind) for x in (source.parts if isinstance(source, Vector) else (source,))]
        addresses, width = self._addresses(to), np.dtype(TYPES[kind]).itemsize

        def store(block: Block, mask_N: np.ndarray | None) -> None:
            address_N, which = addresses(block), slice(None) if mask_N is None else mask_N
            if (address_N[which] % (width * len(reads))).any():
                raise Fault(f"{width * len(reads)} bytes that are not aligned")
            for i, read in enumerate(reads):
                value_N = np.broadcast_to(raw(np.asarray(read(block))), block.num_threads)
                self._memory(block, space).store(address_N[which] + i * width, value_N[which])

        return store

    def _memory(self, block: Block, space: str) -> Memory:
        return block.shared if space.startswith("shared") else block.global_memory

    def _op_atom(self, instruction: Instruction) -> Step:
        if instruction.opcode[1:] != ("global", "add", "u32"):
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")
        write, addresses = self._write(instruction.operands[0], "u32"), self._addresses(instruction.operands[1])
        read = self._read(instruction.operands[2], "u32")

        def add(block: Block, mask_N: np.ndarray | None) -> None:
            address_N = addresses(block)
            added_N = np.broadcast_to(read(block), block.num_threads)
            before_N = np.zeros(block.num_threads, np.uint32)
            for i in block.threads(mask_N):
                before_N[i : i + 1] = block.global_memory.load(address_N[i : i + 1], 4)
                block.global_memory.store(address_N[i : i + 1], before_N[i : i + 1] + added_N[i : i + 1])
            write(block, mask_N, before_N)

        return add

    def _op_membar(self, instruction: Instruction) -> Step:
        return lambda block, mask_N: None

    _op_fence = _op_membar  # the emulation keeps the proxies apart

    def _op_setmaxnreg(self, instruction: Instruction) -> Step:
        return lambda block, mask_N: _check(block.whole(mask_N, WARPGROUP, "setmaxnreg"))

    def _op_shfl(self, instruction: Instruction) -> Step:
        mode = instruction.opcode[2]
        to, *middle, source, lane, clamp, members = instruction.operands
        write, predicate = self._write(to, "b32"), self._write(middle[0], "pred") if middle else None
        read, by = self._read(source, "b32"), self._read(lane, "u32")
        limits, masks = self._read(clamp, "b32"), self._read(members, "b32")
        if mode not in ("bfly", "idx", "up", "down"):
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")

        def shuffle(block: Block, mask_N: np.ndarray | None) -> None:
            block.whole(mask_N, WARP, "shfl.sync")
            threads = block.threads(mask_N)
            limit, mask = (np.broadcast_to(read(block), block.num_threads)[threads] for read in (limits, masks))
            if (limit != (0 if mode == "up" else WARP - 1)).any() or (mask != 0xFFFFFFFF).any():
                raise Fault("only shuffles of whole warps are known here")
            own_N = block.thread_N.astype(np.int64)
            by_N = np.broadcast_to(by(block), block.num_threads).astype(np.int64)
            lane_N = own_N % WARP
            other_N = {"bfly": lane_N ^ by_N, "idx": by_N, "up": lane_N - by_N, "down": lane_N + by_N}[mode]
            inside_N = (other_N >= 0) & (other_N < WARP)
            from_N = np.where(inside_N, other_N, lane_N) + own_N - lane_N
            write(block, mask_N, np.broadcast_to(read(block), block.num_threads)[from_N])
            if predicate is not None:
                predicate(block, mask_N, inside_N)

        return shuffle

    # copies that go on by themselves

    def _op_cp(self, instruction: Instruction) -> Step:
        if instruction.opcode[1] != "async":
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")
        what = instruction.opcode[2]
        if what == "commit_group":
            return self._commit_copies
        if what in ("wait_group", "wait_all"):
            pending = int(instruction.operands[0].text, 0) if what == "wait_group" else 0
            return lambda block, mask_N: self._wait_copies(block, mask_N, pending)
        to, source, size, *given = instruction.operands
        destinations, sources = self._addresses(to), self._addresses(source)
        width, read = int(size.text, 0), self._read(given[0] if given else size, "u32")
        if what == "cg" and width != 16:
            raise ValueError("cp.async.cg copies 16 bytes")

        def copy(block: Block, mask_N: np.ndarray | None) -> None:
            which = block.threads(mask_N)
            to_N, from_N = destinations(block)[which], sources(block)[which]
            bytes_N = np.broadcast_to(read(block), block.num_threads)[which]
            if (to_N % width).any() or (from_N % width).any():
                raise Fault(f"{width} bytes that are not aligned")
            block.shared.load(to_N, 1), block.shared.load(to_N + width - 1, 1)
            block.copies.append(_Copies(to_N, from_N, bytes_N, block.copy_group_N[which], which.copy(), width))

        return copy

    def _commit_copies(self, block: Block, mask_N: np.ndarray | None) -> None:
        block.copy_group_N[block.threads(mask_N)] += 1

    def _wait_copies(self, block: Block, mask_N: np.ndarray | None, pending: int) -> None:
        waits_N = np.ones(block.num_threads, np.bool_) if mask_N is None else mask_N
        left = []
        for copies in block.copies:
            done_N = waits_N[copies.waiting_N] & (copies.group_N < block.copy_group_N[copies.waiting_N] - pending)
            for byte in range(0, copies.width, 4):
                read_N = done_N & (copies.bytes_N > byte)
                words_N = np.zeros(len(done_N), np.uint32)
                words_N[read_N] = block.global_memory.load(copies.source_N[read_N] + byte, 4)
                block.shared.store(copies.destination_N[done_N] + byte, words_N[done_N])
            if not done_N.all():
                parts = (copies.destination_N, copies.source_N, copies.bytes_N, copies.group_N, copies.waiting_N)
                left.append(_Copies(*(part[~done_N] for part in parts), copies.width))
        block.copies = left

    # matrices

    def _warps(self, read: Callable[[Block], Any], block: Block, first: np.ndarray) -> np.ndarray:
        """A register of the warps that begin at these threads: (W, 32)."""
        value_N = read(block)
        if value_N.ndim == 0:  # np.broadcast_to is slow, and this is called for each register of each mma
            value_N = np.broadcast_to(value_N, block.num_threads)
        value_WN = value_N.reshape(-1, WARP)
        return value_WN if len(first) == len(value_WN) else value_WN[first // WARP]

    def _scatter(self, write: Callable, block: Block, mask_N: np.ndarray | None, first: np.ndarray, value: np.ndarray):
        whole = value
        if len(first) != block.num_threads // WARP:
            whole = np.zeros((block.num_threads // WARP, WARP), value.dtype)
            whole[first // WARP] = value
        write(block, mask_N, whole.reshape(-1))

    def _op_mma(self, instruction: Instruction) -> Step:
        if "m16n8k16" not in instruction.opcode or instruction.opcode[-3:-1] != ("bf16", "bf16"):
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")
        d, *sources = instruction.operands
        writes = [self._write(x, "b32") for x in d.parts]
        reads = [[self._read(x, "b32") for x in source.parts] for source in sources]

        def multiply(block: Block, mask_N: np.ndarray | None) -> None:
            first = block.whole(mask_N, WARP, "mma")
            a, b, c = ([self._warps(x, block, first) for x in registers] for registers in reads)
            for write, value in zip(writes, tensor.multiply_16_8_16(a, b, c), strict=True):
                self._scatter(write, block, mask_N, first, value)

        return multiply

    def _row_addresses(self, block: Block, address_N: np.ndarray, first: np.ndarray, count: int) -> np.ndarray:
        """Of ldmatrix and stmatrix, the rows of `count` matrices: (W, count, 8)."""
        rows = address_N.reshape(-1, WARP)[first // WARP].reshape(-1, 4, 8)[:, :count]
        if (rows % 16).any():
            raise Fault("a row of 16 bytes that is not aligned")
        return rows

    def _op_ldmatrix(self, instruction: Instruction) -> Step:
        transposed, (to, source) = "trans" in instruction.opcode, instruction.operands
        parts = to.parts if isinstance(to, Vector) else (to,)
        writes, addresses = [self._write(x, "b32") for x in parts], self._addresses(source)
        if f"x{len(parts)}" not in instruction.opcode:
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")

        def load(block: Block, mask_N: np.ndarray | None) -> None:
            first = block.whole(mask_N, WARP, "ldmatrix")
            rows = self._row_addresses(block, addresses(block), first, len(writes))
            where = rows[..., None] + 2 * np.arange(8)
            numbers = block.shared.load(where.reshape(-1), 2).reshape(where.shape)
            for i, write in enumerate(writes):
                value = tensor.matrix_from_rows(numbers[:, i], transposed)
                self._scatter(write, block, mask_N, first, value)

        return load

    def _op_stmatrix(self, instruction: Instruction) -> Step:
        transposed, (to, source) = "trans" in instruction.opcode, instruction.operands
        parts = source.parts if isinstance(source, Vector) else (source,)
        reads, addresses = [self._read(x, "b32") for x in parts], self._addresses(to)
        if f"x{len(parts)}" not in instruction.opcode:
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")

        def store(block: Block, mask_N: np.ndarray | None) -> None:
            first = block.whole(mask_N, WARP, "stmatrix")
            rows = self._row_addresses(block, addresses(block), first, len(reads))
            for i, read in enumerate(reads):
                numbers = tensor.rows_from_matrix(self._warps(read, block, first), transposed)
                where = rows[:, i, :, None] + 2 * np.arange(8)
                block.shared.store(where.reshape(-1), numbers.reshape(-1))

        return store

    def _op_wgmma(self, instruction: Instruction) -> Step:
        what = instruction.opcode[1]
        if what == "fence":
            return lambda block, mask_N: _check(block.whole(mask_N, WARPGROUP, "wgmma.fence"))
        if what == "commit_group":
            return self._commit_products
        if what == "wait_group":
            pending = int(instruction.operands[0].text, 0)
            return lambda block, mask_N: self._wait_products(block, mask_N, pending)
        return self._product(instruction)

    def _product(self, instruction: Instruction) -> Step:
        if instruction.opcode[5:] != ("f32", "bf16", "bf16"):
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")
        columns = int(instruction.opcode[4].partition("n")[2].partition("k")[0])
        d, a, b, accumulate, scale_a, scale_b, *transposed = instruction.operands
        flags = [int(x.text) for x in transposed]
        if (scale_a.text, scale_b.text) != ("1", "1") or len(d.parts) != columns // 2:
            raise ValueError(f"line {instruction.line}: {instruction.text}: not known here")
        writes = [self._write(x, "f32") for x in d.parts]
        in_registers = isinstance(a, Vector)
        a_reads = [self._read(x, "b32") for x in a.parts] if in_registers else [self._read(a, "b64")]
        b_read, adds = self._read(b, "b64"), self._read(accumulate, "pred")
        b_transposed = bool(flags[-1])

        def multiply(block: Block, mask_N: np.ndarray | None) -> None:
            results = [block.registers[x.name].view(np.float32).copy() for x in d.parts]
            for start in block.whole(mask_N, WARPGROUP, "wgmma"):
                threads = np.arange(start, start + WARPGROUP)
                product = _Product(block.committed.get(int(start), 0), [], [], instruction.text)
                if in_registers:
                    warps = [self._warps(read, block, threads[::WARP]) for read in a_reads]
                    a_matrix = tensor.a_matrix(warps).reshape(64, 16)
                else:
                    a_matrix = self._operand(block, a_reads[0], threads, 64, bool(flags[0]), product)
                b_matrix = self._operand(block, b_read, threads, columns, b_transposed, product)
                sums = np.broadcast_to(adds(block), block.num_threads)[threads]
                for result, part in zip(results, tensor.warpgroup_product(a_matrix, b_matrix), strict=True):
                    result[threads] = np.where(sums, result[threads] + part, part).astype(np.float32)
                block.products.setdefault(int(start), []).append(product)
            for write, result in zip(writes, results, strict=True):
                write(block, mask_N, result)

        return multiply

    def _operand(
        self,
        block: Block,
        read: Callable[[Block], Any],
        threads: np.ndarray,
        num_rows: int,
        transposed: bool,
        product: _Product,
    ) -> np.ndarray:
        descriptors = np.broadcast_to(read(block), block.num_threads)[threads]
        if (descriptors != descriptors[0]).any():
            raise Fault("the threads of a warpgroup have different descriptors")
        where = tensor.operand_addresses(int(descriptors[0]), num_rows, transposed)
        bits = block.shared.load(where.reshape(-1), 2)
        product.addresses.append(where.reshape(-1))
        product.bits.append(bits)
        return tensor.floats_of_bf16(bits).reshape(where.shape)

    def _commit_products(self, block: Block, mask_N: np.ndarray | None) -> None:
        for start in block.whole(mask_N, WARPGROUP, "wgmma.commit_group"):
            block.committed[int(start)] = block.committed.get(int(start), 0) + 1

    def _wait_products(self, block: Block, mask_N: np.ndarray | None, pending: int) -> None:
        for start in block.whole(mask_N, WARPGROUP, "wgmma.wait_group"):
            under_way = block.products.get(int(start), [])
            done_before = block.committed.get(int(start), 0) - pending
            for product in under_way:
                if product.group < done_before:
                    for where, bits in zip(product.addresses, product.bits, strict=True):
                        if (block.shared.load(where, 2) != bits).any():
                            raise Fault(f"shared memory changed under {product.text[:60]}")
            block.products[int(start)] = [product for product in under_way if product.group >= done_before]


def _check(_: np.ndarray) -> None:
    """What was looked at is whole; there is nothing to do."""


def _constant(text: str, kind: str) -> Any:
    """A number as PTX writes it."""
    if text.startswith(("0f", "0F")) and len(text) == 10:
        if not kind.startswith("f"):  # mov.b32 takes the bits
            return int(text[2:], 16)
        return np.float32(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if text.startswith(("0d", "0D")) and len(text) == 18:
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    number = int(text.rstrip("U"), 0)
    if kind == "pred":
        return number != 0
    if kind.startswith("f"):
        return float(number)
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    number &= (1 << bits) - 1
    return number - (1 << bits) if kind.startswith("s") and number >> (bits - 1) else number
