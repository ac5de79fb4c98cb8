"""The machine that runs PTX: what it computes, and what it stops for. By hand-written kernels; needs no compiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .ptx.machine import Machine
from .ptx.memory import Fault, Memory
from .ptx.program import read_programs

GLOBAL = 0x10000


def run(body: str, words: np.ndarray, *, threads: int = 32, seed: int | None = None) -> np.ndarray:
    """What `words` become by a kernel: %r1 is the thread, %rd1 the address of the words, %rd2 that of its own."""
    text = f"""
    .version 8.0
    .target sm_90a
    .visible .entry kernel(
        .param .u64 kernel_param_0
    )
    {{
        .reg .pred %p<9>;
        .reg .b16 %rs<9>;
        .reg .b32 %r<99>;
        .reg .f32 %f<99>;
        .reg .b64 %rd<9>;
        .shared .align 1024 .b8 tile[8192];
        ld.param.u64 %rd1, [kernel_param_0];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd2, %rd1, %rd2;
        {body}
        ret;
    }}
    """
    held = words.copy()
    memory = Memory([(GLOBAL, held.view(np.uint8))])
    order = None if seed is None else np.random.default_rng(seed)
    machine = Machine(read_programs(text)["kernel"])
    machine.run((1, 1, 1), threads, 0, GLOBAL.to_bytes(8, "little"), memory, order)
    return held


def test_branches_part_threads_and_they_meet_again():
    """Odd lanes multiply, even ones add; then all shuffle together."""
    body = """
        ld.global.u32 %r2, [%rd2];
        and.b32 %r3, %r1, 1;
        setp.eq.s32 %p1, %r3, 1;
        @%p1 bra $odd;
        add.s32 %r2, %r2, 100;
        bra.uni $both;
    $odd:
        mul.lo.s32 %r2, %r2, -3;
    $both:
        shfl.sync.bfly.b32 %r4|%p2, %r2, 1, 31, -1;
        st.global.u32 [%rd2], %r4;
    """
    words = np.arange(32, dtype=np.int32)
    after = np.where(words % 2, words * -3, words + 100)
    assert (run(body, words) == after[np.arange(32) ^ 1]).all()


def test_a_loop_with_another_number_of_rounds_for_each_thread():
    body = """
        mov.u32 %r2, 0;
        mov.u32 %r3, %r1;
    $again:
        setp.eq.s32 %p1, %r3, 0;
        @%p1 bra $done;
        add.s32 %r2, %r2, %r3;
        sub.s32 %r3, %r3, 1;
        bra.uni $again;
    $done:
        st.global.u32 [%rd2], %r2;
    """
    thread = np.arange(64)
    assert (run(body, np.zeros(64, np.int32), threads=64) == thread * (thread + 1) // 2).all()


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("shr.s32 %r2, %r1, 40;", 0),
        ("mov.u32 %r3, -8; shr.s32 %r2, %r3, 40;", -1),
        ("mov.u32 %r3, -8; shr.u32 %r2, %r3, 28;", 15),
        ("mov.u32 %r3, -7; div.s32 %r2, %r3, 2;", -3),
        ("mov.u32 %r3, -7; rem.s32 %r2, %r3, 2;", -1),
        ("mov.u32 %r3, 0x1234; bfi.b32 %r2, %r3, -1, 8, 8;", -1 & ~0xFF00 | 0x3400),
        ("mov.u32 %r3, 0x33221100; mov.u32 %r4, 0x77665544; prmt.b32 %r2, %r3, %r4, 0x7632;", 0x77663322),
        ("mov.f32 %f1, 0f7FC00000; max.f32 %f2, %f1, 0f40000000; mov.b32 %r2, %f2;", 0x40000000),
        ("mov.f32 %f1, 0f7FC00000; setp.gtu.f32 %p1, %f1, 0f00000000; selp.b32 %r2, 7, 8, %p1;", 7),
        ("mov.f32 %f1, 0f7FC00000; setp.ne.f32 %p1, %f1, %f1; selp.b32 %r2, 7, 8, %p1;", 8),
        ("mov.f32 %f1, 0f3F804000; mov.f32 %f2, 0f3F818000; cvt.rn.bf16x2.f32 %r2, %f1, %f2;", 0x3F803F82),
        ("mov.f32 %f1, 0fBF800000; copysign.f32 %f3, %f1, 0f40400000; mov.b32 %r2, %f3;", -0x3FC00000),
        ("mov.f32 %f1, 0fC0200000; cvt.rzi.s32.f32 %r2, %f1;", -2),
        ("mov.b32 %r3, 0x00020001; mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r2, {%rs2, %rs1};", 0x00010002),
        ("mov.u32 %r3, -1; mul.wide.u32 %rd3, %r3, %r3; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r2, %rd3;", -2),
    ],
)
def test_numbers(line, value):
    """By the manual: shifts are clamped, division rounds to zero, NaN, halves and bytes."""
    found = run(f"{line} st.global.u32 [%rd2], %r2;", np.zeros(32, np.int32))
    assert (found == value).all(), hex(int(found[0]) & 0xFFFFFFFF)


def test_mma_is_a_matrix_product():
    """The fragments filled by the manual's table, in torch."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).bfloat16() for n in (16, 8))
    lane = torch.arange(32)
    group, pair = lane // 4, lane % 4 * 2

    def packed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.view(torch.int16).int() & 0xFFFF) | (second.view(torch.int16).int() << 16)

    rows = [packed(a[group + i, pair + j], a[group + i, pair + j + 1]) for j in (0, 8) for i in (0, 8)]
    columns = [packed(b[pair + j, group], b[pair + j + 1, group]) for j in (0, 8)]
    words = torch.stack([*rows, *columns, *[torch.zeros(32, dtype=torch.int32)] * 4]).numpy().reshape(-1)
    loads = "\n".join(f"ld.global.u32 %r{10 + i}, [%rd2+{128 * i}];" for i in range(6))
    zeros = "\n".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(1, 5))
    stores = "\n".join(f"st.global.f32 [%rd2+{128 * (5 + i)}], %f{i};" for i in range(1, 5))
    body = f"""{loads}
        {zeros}
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f1, %f2, %f3, %f4}}, {{%r10, %r11, %r12, %r13}},
            {{%r14, %r15}}, {{%f1, %f2, %f3, %f4}};
        {stores}"""
    found = torch.from_numpy(run(body, words)).view(torch.float32).reshape(10, 32)[6:]
    product = a.double() @ b.double()
    expected = torch.stack([product[group + i, pair + j] for i in (0, 8) for j in (0, 1)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


HALF = "setp.lt.u32 %p1, %r1, 7; @%p1 bra $skip;"
OPERAND = "mov.b64 %rd3, 0x4000004000010040;"  # at 1024: rows of 128 bytes, eight to a pattern


def product(accumulators: int) -> str:
    names = ", ".join(f"%f{i}" for i in range(accumulators))
    return f"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{names}}}, %rd3, %rd3, 0, 1, 1, 0, 0;"


@pytest.mark.parametrize(
    ("body", "threads", "message"),
    [
        ("st.global.u32 [%rd2+4], %r1;", 32, "where nothing is"),
        ("ld.global.u32 %r2, [%rd2+2];", 32, "not aligned"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1+8];", 32, "not aligned"),
        ("mov.u32 %r2, tile; st.shared.u32 [%r2+8192], %r1;", 32, "where nothing is"),
        ("st.shared.u32 [%r1], %r1;", 32, "not aligned|where nothing is"),
        (f"{HALF} shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; $skip:", 32, "only some threads of a warp"),
        (f"{HALF} bar.sync 0; $skip:", 32, "only some threads of a warp"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $skip; bar.sync 1; $skip:", 64, "wait for ever"),
        ("bar.sync %r1, 32;", 32, "whole warps"),
        ("mov.u32 %r2, tile; cp.async.cg.shared.global [%r2], [%rd1+8], 16;", 32, "not aligned"),
        (f"{OPERAND} {product(32)} wgmma.commit_group.sync.aligned;", 128, "before it has waited"),
        (f"{OPERAND} {product(31)}", 128, "not known here"),
        (f"{OPERAND} {product(32)} wgmma.wait_group.sync.aligned 0;", 128, "before it has waited"),
        (
            f"""{OPERAND} {product(32)} wgmma.commit_group.sync.aligned; mov.u32 %r2, tile; st.shared.u32 [%r2], %r1;
            wgmma.wait_group.sync.aligned 0;""",
            128,
            "shared memory changed under",
        ),
        ("tcgen05.alloc.sync.b32 [%r1], 32;", 32, "not known here"),
    ],
)
def test_what_a_gpu_would_not_do(body, threads, message):
    with pytest.raises((Fault, ValueError), match=message):
        run(body.replace("$skip:", "\n$skip:\n"), np.zeros(threads, np.int32), threads=threads)


def test_copies_arrive_when_they_are_waited_for():
    """Not before: shared memory is NaN until then. What lies behind the given number of bytes becomes zero."""
    body = """
        mov.u32 %r2, tile;
        shl.b32 %r3, %r1, 4;
        add.s32 %r2, %r2, %r3;
        mul.wide.u32 %rd3, %r1, 16;
        add.s64 %rd3, %rd1, %rd3;
        cp.async.cg.shared.global [%r2], [%rd3], 16, 8;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.u32 %r4, [%r2];
        cp.async.wait_group 0;
        ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r2];
        st.global.v4.u32 [%rd3], {%r4, %r6, %r7, %r8};
    """
    words = np.arange(1, 129, dtype=np.int32)
    found = run(body, words).reshape(32, 4)
    assert (found[:, 0] == -1).all() and (found[:, 1] == words.reshape(32, 4)[:, 1]).all()
    assert (found[:, 2:] == 0).all()


def test_warpgroups_in_any_order_keep_to_barriers():
    """One hands over what the other reads; with the barrier left out, some order shows it."""
    body = """
        setp.lt.u32 %p1, %r1, 128;
        @%p1 bra $on;  // where one may fall behind
    $on:
        mov.u32 %r2, tile;
        shl.b32 %r3, %r1, 2;
        add.s32 %r2, %r2, %r3;
        add.s32 %r4, %r1, 5;
        st.shared.u32 [%r2], %r4;
        BARRIER
        xor.b32 %r3, %r3, 512;
        mov.u32 %r2, tile;
        add.s32 %r2, %r2, %r3;
        ld.shared.u32 %r4, [%r2];
        st.global.u32 [%rd2], %r4;
    """
    expected = (np.arange(256) ^ 128) + 5

    def right(barrier: str, seed: int) -> bool:
        found = run(body.replace("BARRIER", barrier), np.zeros(256, np.int32), threads=256, seed=seed)
        return bool((found == expected).all())

    assert all(right("bar.sync 0;", seed) for seed in range(8))
    assert not all(right("", seed) for seed in range(8))
