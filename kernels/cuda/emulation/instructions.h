// The instructions that the kernels use, on a CPU. Fragment layouts are those of the PTX manual, sections
// "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix"; tests hold them to hand-made fragments.
//
// With lane = 4·group + member (group 0..7, member 0..3), register r holding two bf16 (low half first):
//   A (16×16)  a[r]: row group + 8·(r & 1), columns 2·member, 2·member + 1, + 8·(r >> 1)
//   B (16×8)   b[r]: rows 2·member, 2·member + 1, + 8·r, column group
//   C (16×8)   c[i]: row group + 8·(i >> 1), column 2·member + (i & 1)
#pragma once

#include <cmath>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulation::Index{unsigned(emulation::Scheduler::get().current().thread)})
#define blockIdx (emulation::Scheduler::get().block())
#define gridDim (emulation::Scheduler::get().grid())

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

// A call for each instruction: inlined, they are most of what the compiler has to do.
#define EMULATION_NOINLINE __attribute__((noinline)) inline

namespace emulation {

struct Index {
    unsigned x;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// cvt.rn.bf16.f32: nearest, ties to even; every NaN becomes 0x7fff.
inline uint16_t float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

EMULATION_NOINLINE void sync_warp() {
    int nothing = 0;
    Scheduler::get().warp_meeting("__syncwarp", nothing, [](int**) {});
}

template <class Value>
EMULATION_NOINLINE Value shuffle_xor(Value value, int lane_mask) {
    struct Operands {
        Value value, result;
        int lane_mask;
    } mine{value, value, lane_mask};
    Scheduler::get().warp_meeting("shfl.xor", mine, [](Operands** lanes) {
        for (int lane = 0; lane < kWarpSize; ++lane)
            lanes[lane]->result = lanes[(lane ^ lanes[lane]->lane_mask) % kWarpSize]->value;
    });
    return mine.result;
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lanes 8i … 8i+7 bring the row addresses of matrix i, r[i] gets it.
EMULATION_NOINLINE void load_matrix_x4(uint32_t (&registers)[4], const void* row, bool transposed) {
    if (!Scheduler::get().is_shared(row, 16)) Scheduler::get().fail("ldmatrix outside of shared memory");
    if (reinterpret_cast<uintptr_t>(row) % 16) Scheduler::get().fail("ldmatrix address not aligned to 16 bytes");
    struct Operands {
        const uint16_t* row;
        uint32_t registers[4];
    } mine{static_cast<const uint16_t*>(row), {}};
    auto load = [](Operands** lanes, bool transposed) {
        for (int i = 0; i < 4; ++i) {
            int in_group[8] = {}, most = 0;  // rows by the group of banks that they lie in
            for (int row = 0; row < 8; ++row) {
                int& rows = in_group[reinterpret_cast<uintptr_t>(lanes[8 * i + row]->row) / 16 % 8];
                most = ++rows > most ? rows : most;
            }
            Scheduler::get().work.matrix_wavefronts += most;
        }
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < 4; ++i) {
                int group = lane / 4, member = lane % 4;
                uint16_t low = transposed ? lanes[8 * i + 2 * member]->row[group] : lanes[8 * i + group]->row[2 * member];
                uint16_t high =
                    transposed ? lanes[8 * i + 2 * member + 1]->row[group] : lanes[8 * i + group]->row[2 * member + 1];
                lanes[lane]->registers[i] = low | uint32_t(high) << 16;
            }
    };
    if (transposed)
        Scheduler::get().warp_meeting("ldmatrix.trans", mine, [&](Operands** lanes) { load(lanes, true); });
    else
        Scheduler::get().warp_meeting("ldmatrix", mine, [&](Operands** lanes) { load(lanes, false); });
    std::memcpy(registers, mine.registers, sizeof registers);
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: c += a b, products exact, sums in float.
EMULATION_NOINLINE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
        const uint32_t* a;
        uint32_t b[2];
        float* c;
    } mine{a, {b0, b1}, c};
    Scheduler::get().warp_meeting("mma", mine, [](Operands** lanes) {
        ++Scheduler::get().work.products;
        float left[16][16], right[16][8], sum[16][8];
        for (int lane = 0; lane < kWarpSize; ++lane) {
            int group = lane / 4, member = lane % 4;
            for (int r = 0; r < 4; ++r)
                for (int half = 0; half < 2; ++half)
                    left[group + 8 * (r & 1)][2 * member + half + 8 * (r >> 1)] =
                        bf16_to_float(uint16_t(lanes[lane]->a[r] >> 16 * half));
            for (int r = 0; r < 2; ++r)
                for (int half = 0; half < 2; ++half)
                    right[2 * member + half + 8 * r][group] = bf16_to_float(uint16_t(lanes[lane]->b[r] >> 16 * half));
            for (int i = 0; i < 4; ++i) sum[group + 8 * (i >> 1)][2 * member + (i & 1)] = lanes[lane]->c[i];
        }
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
    });
}

// cp.async of 16 bytes. It is done at once or when its group is waited for, by a coin: a missing wait shows as old
// data, a destination that is still being read shows as new data.
EMULATION_NOINLINE void copy_async_16(void* destination, const void* source, int num_source_bytes) {
    Scheduler& scheduler = Scheduler::get();
    if (!scheduler.is_shared(destination, 16)) scheduler.fail("cp.async outside of shared memory");
    if (reinterpret_cast<uintptr_t>(destination) % 16 || reinterpret_cast<uintptr_t>(source) % 16)
        scheduler.fail("cp.async address not aligned to 16 bytes");
    AsyncCopy copy{destination, source, num_source_bytes};
    if (scheduler.coin())
        copy.perform();
    else
        scheduler.current().open_copies.push_back(copy);
}

EMULATION_NOINLINE void copy_async_commit() {
    Fiber& fiber = Scheduler::get().current();
    fiber.committed_copies.push_back(std::move(fiber.open_copies));
    fiber.open_copies.clear();
}

// Waits until at most `num_pending` of this thread's newest groups are under way.
EMULATION_NOINLINE void copy_async_wait(size_t num_pending) {
    auto& groups = Scheduler::get().current().committed_copies;
    while (groups.size() > num_pending) {
        for (const AsyncCopy& copy : groups.front()) copy.perform();
        groups.erase(groups.begin());
    }
}

}  // namespace emulation

EMULATION_NOINLINE void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulation::Scheduler::get().waits_at(file, line)) emulation::Scheduler::get().block_barrier();
}
inline void __threadfence() {}
inline int atomicAdd(int* address, int value) {
    int before = *address;
    *address += value;
    return before;
}
