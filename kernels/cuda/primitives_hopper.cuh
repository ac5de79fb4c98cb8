// What Hopper (sm_90a) has beyond primitives.cuh: products of a whole warpgroup on operands in shared memory (wgmma),
// named barriers, registers that move between warpgroups. Each with one body for the GPU and one for the emulation.
//
// wgmma works on its own: from `multiply` to the wait for its group, its accumulators and A registers belong to it, and
// the shared memory it reads must stay as it is. It reads through the async proxy: whoever wrote there (stores and
// cp.async alike) calls fence_async_proxy before the barrier that hands the data over.
#pragma once

#include "tile.cuh"

#ifndef __CUDACC__
#include "emulation/warpgroup.h"
#endif

namespace hedgehog {

constexpr int kWarpgroup = 128;     // threads
constexpr int kPanelColumns = 64;   // bf16 in 128 bytes: the widest rows that wgmma's swizzle knows
constexpr int kPanelRowBytes = 128;

// A matrix of bf16 in shared memory as wgmma reads it with the 128-byte swizzle: panels of 64 columns one after the
// other, each with kRows rows of 128 bytes; unit u of row r lies at u ^ (r % 8). Begins at a multiple of 1024 bytes.
template <int kRows, int kColumns>
struct Panels {
    static_assert(kRows % 8 == 0 && kColumns % kPanelColumns == 0, "whole 8-row patterns of the swizzle");
    static constexpr int kPanelBytes = kRows * kPanelRowBytes;
    static constexpr int kBytes = kPanelBytes * (kColumns / kPanelColumns);
    int offset;  // in the block's shared memory

    // Where unit `unit` of a row lies, sixteen bytes. Unsigned: a division of signed numbers is no plain shift.
    __device__ __forceinline__ unsigned char* unit(uint32_t row, uint32_t unit) const {
        return dynamic_shared_memory() + offset + unit / 8 * kPanelBytes + row * kPanelRowBytes +
               ((unit ^ row) & 7) * 16;
    }

    // Two bf16 at (row, column), column even.
    __device__ __forceinline__ uint32_t* pair(uint32_t row, uint32_t column) const {
        return reinterpret_cast<uint32_t*>(unit(row, column / kUnit) + column % kUnit * 2);
    }

    // Starts copying rows 0…kNumRows-1 from `start`, `row_stride` elements apart, by the threads 0…kWarpgroup-1 of a
    // warpgroup. Rows from `num_valid` on become zeros, and are not read.
    template <int kNumRows>
    __device__ __forceinline__ void copy_rows(const uint16_t* start, int64_t row_stride, int num_valid) const {
        const uint16_t* source = start;
        constexpr int kUnits = kColumns / kUnit, kRowsAtOnce = kWarpgroup / kUnits;
        const uint32_t thread = thread_index() & (kWarpgroup - 1), column_unit = thread % kUnits;
        static_assert(kNumRows % kRowsAtOnce == 0, "every thread copies as much");
        int row = static_cast<int>(thread / kUnits);
        source += row * row_stride + column_unit * kUnit;
#pragma unroll 1
        for (; row < kNumRows; row += kRowsAtOnce, source += kRowsAtOnce * row_stride)
            copy_async(unit(row, column_unit), row < num_valid ? source : start, row < num_valid);
    }
};

// Matrix descriptors (PTX ISA, "Matrix Descriptor Format"): start address, leading and stride byte offset, each without
// its lowest four bits, and 1 for the 128-byte swizzle. Eight rows of 128 bytes are one pattern, so the stride from one
// pattern to the next is 1024 in both directions.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading_bytes) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t operand_address(int offset) {
    return shared_address(dynamic_shared_memory()) + offset;
}

__device__ __forceinline__ void use_async_proxy() {}

__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8×8 matrices of bf16 from fragments to rows of sixteen bytes: lane l brings the address of row l % 8 of matrix
// l / 8. Transposed: what is a column of the fragment becomes a row in memory.
template <bool kTransposed>
__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
    if constexpr (kTransposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
}

__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// The upper half of `high` over that of `low`. In assembly, since the compiler would rather keep both in registers than
// let them be packed and unpacked again.
__device__ __forceinline__ uint32_t upper_halves(uint32_t low, uint32_t high) {
    uint32_t packed;
    asm volatile("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(packed) : "r"(low), "r"(high));
    return packed;
}

// Registers that other instructions wrote may from here on be read by wgmma.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// 2^x, taken where it stands: taken ahead of time, the results would need registers.
__device__ __forceinline__ float exp2_here(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x, computed with only from here on: what follows from it does not wait in registers instead.
__device__ __forceinline__ uint32_t read_here(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The compiler takes an accumulator for final once wgmma is issued: no use of it moves across this.
template <int kTiles>
__device__ __forceinline__ void settle(float (&d)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

#define HEDGEHOG_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define HEDGEHOG_D4(n) HEDGEHOG_D1(n), HEDGEHOG_D1(n + 1), HEDGEHOG_D1(n + 2), HEDGEHOG_D1(n + 3)
#define HEDGEHOG_D8(n) HEDGEHOG_D4(n), HEDGEHOG_D4(n + 4)
#define HEDGEHOG_R32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define HEDGEHOG_R36 HEDGEHOG_R32 ", %32, %33, %34, %35"
#define HEDGEHOG_R64                                                                                              \
    HEDGEHOG_R36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
                 "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HEDGEHOG_R128                                                                                                \
    HEDGEHOG_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
                 "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
                 "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "  \
                 "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// accumulate, A and B descriptor, the two transpositions are the operands after the accumulators
#define HEDGEHOG_WGMMA(shape, accumulators, a, b, accumulate, transpose_a, transpose_b, ...)                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 {" accumulators "}, " a ", " b               \
                 ", p, 1, 1, " transpose_a ", " transpose_b ";\n}\n"                                                \
                 : __VA_ARGS__                                                                                      \
                 : "l"(a_descriptor), "l"(b_descriptor), "r"(int(accumulate_)), "n"(int(kTransposeA)),              \
                   "n"(int(kTransposeB)))

// d (64 × kN) = a b, or d += a b, sixteen deep, by a warpgroup. Warp w of it holds rows 16w…16w+15 of d, as mma's C.
// kTransposeA: rows of a's memory are k (M-major); kTransposeB: rows of b's memory are k (N-major), otherwise columns.
template <bool kTransposeA, bool kTransposeB, int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], uint64_t a_descriptor, uint64_t b_descriptor,
                                         bool accumulate_) {
    static_assert(kTiles == 8 || kTiles == 9 || kTiles == 16 || kTiles == 32, "one of the widths written out here");
    if constexpr (kTiles == 8)
        HEDGEHOG_WGMMA("m64n64k16", HEDGEHOG_R32, "%32", "%33", "%34", "%35", "%36", HEDGEHOG_D8(0));
    else if constexpr (kTiles == 9)
        HEDGEHOG_WGMMA("m64n72k16", HEDGEHOG_R36, "%36", "%37", "%38", "%39", "%40", HEDGEHOG_D8(0), HEDGEHOG_D1(8));
    else if constexpr (kTiles == 16)
        HEDGEHOG_WGMMA("m64n128k16", HEDGEHOG_R64, "%64", "%65", "%66", "%67", "%68", HEDGEHOG_D8(0), HEDGEHOG_D8(8));
    else
        HEDGEHOG_WGMMA("m64n256k16", HEDGEHOG_R128, "%128", "%129", "%130", "%131", "%132", HEDGEHOG_D8(0),
                       HEDGEHOG_D8(8), HEDGEHOG_D8(16), HEDGEHOG_D8(24));
}

// The same with a's fragment in registers, for kN = 64. Warp w holds rows 16w…16w+15 of a, as mma's A.
__device__ __forceinline__ void multiply(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b_descriptor,
                                         bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" HEDGEHOG_R32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
                 : HEDGEHOG_D8(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(int(accumulate)));
}

#undef HEDGEHOG_WGMMA
#undef HEDGEHOG_R32
#undef HEDGEHOG_R36
#undef HEDGEHOG_R64
#undef HEDGEHOG_R128
#undef HEDGEHOG_D1
#undef HEDGEHOG_D4
#undef HEDGEHOG_D8

#else

inline uint32_t operand_address(int offset) { return offset; }
inline void use_async_proxy() { emulation::Scheduler::get().track_async_proxy(); }
// What can be left out, place by place: tests/kernels/cuda/test_barriers.py.
inline bool done_at(const char* file, int line) { return emulation::Scheduler::get().waits_at(file, line); }
inline void fence_async_proxy(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (done_at(file, line)) emulation::Scheduler::get().fence_async_proxy();
}
// Left out, a thread still arrives, or the others would wait for ever.
inline void barrier_sync(int barrier, int num_threads, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
    emulation::Scheduler::get().named_barrier(barrier, num_threads, done_at(file, line));
}
inline void barrier_arrive(int barrier, int num_threads) {
    emulation::Scheduler::get().named_barrier(barrier, num_threads, false);
}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}
template <bool kTransposed>
void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
    emulation::store_matrix_x4(row, r, kTransposed);
}
inline uint32_t bits_of_float(float x) { return emulation::float_to_bits(x); }
inline float exp2_here(float x) { return std::exp2(x); }
inline uint32_t read_here(uint32_t x) { return x; }
inline uint32_t upper_halves(uint32_t low, uint32_t high) { return low >> 16 | (high & 0xffff0000u); }
inline void fence_registers(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (done_at(file, line)) emulation::fence_registers();
}
inline void commit_products() { emulation::commit_products(); }
template <int kPending>
void wait_products() {
    emulation::wait_products(kPending);
}
template <int kTiles>
void settle(float (&)[kTiles][4]) {}
template <bool kTransposeA, bool kTransposeB, int kTiles>
void multiply(float (&d)[kTiles][4], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
    emulation::issue_product(
        {&d[0][0], 8 * kTiles, nullptr, {}, a_descriptor, b_descriptor, kTransposeA, kTransposeB, accumulate});
}
inline void multiply(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
    emulation::issue_product(
        {&d[0][0], 64, a, {a[0], a[1], a[2], a[3]}, 0, b_descriptor, false, false, accumulate});
}

#endif

// A store that wgmma will read.
__device__ __forceinline__ void store_operand(uint32_t* address, uint32_t value) {
    *address = value;
    note_operand(address, sizeof value);
}

// Descriptors of panels. `k_major`: rows are M or N, from row 0 on, and the sixteen columns from `column` on are k.
// `mn_major`: columns are M or N, from `column` (a multiple of 64) on, and the sixteen rows from `row` on are k.
template <int kRows, int kColumns>
__device__ __forceinline__ uint64_t k_major(Panels<kRows, kColumns> x, int column) {
    const int panel = column / kPanelColumns * Panels<kRows, kColumns>::kPanelBytes;
    return descriptor(operand_address(x.offset) + panel + column % kPanelColumns * 2, 16);  // leading offset: not used
}

template <int kRows, int kColumns>
__device__ __forceinline__ uint64_t mn_major(Panels<kRows, kColumns> x, int row, int column) {
    constexpr int kPanelBytes = Panels<kRows, kColumns>::kPanelBytes;
    return descriptor(operand_address(x.offset) + column / kPanelColumns * kPanelBytes + row * kPanelRowBytes,
                      kPanelBytes);
}

}  // namespace hedgehog
