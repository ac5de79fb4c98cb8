// Checks of the emulated warpgroup instructions, part of instructions_check.cpp: descriptors and layouts against the PTX
// manual's examples, whole products against plain loops, and each misuse that the emulation is to notice.
#pragma once

#include "primitives_hopper.cuh"

namespace {

// ---- "Canonical Layouts": the manual's bf16 and tf32 examples as they stand there, in bytes ----

// Swizzle<bits, 4, 3>: address bits 4… are exclusive-ored with bits 7…
size_t swizzled(size_t at, int bits) {
    for (int bit = 0; bit < bits; ++bit) at ^= (at >> (7 + bit) & 1) << (4 + bit);
    return at;
}

uint64_t example_descriptor(size_t leading, size_t stride, uint64_t mode) {
    return uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | mode << 62;
}

void check_descriptors() {
    struct Example {
        uint64_t mode;  // 0: none, 1: 128 bytes, 2: 64, 3: 32
        int bits, inner;  // units of 16 bytes side by side
        size_t leading, stride;
    };
    // MN-major, bf16: ((8,1,2),(8,2)):((1,8,64),(8,128)), ((8,2,2),(8,2)):((1,8,128),(16,256)),
    // ((8,4,2),(8,2)):((1,8,256),(32,512)); and the same for 128 bytes
    for (const Example& e : {Example{0, 0, 1, 256, 128}, Example{3, 1, 2, 256, 512}, Example{2, 2, 4, 512, 1024},
                             Example{1, 3, 8, 1024, 2048}})
        for (int m = 0; m < 16 * e.inner; ++m)
            for (int k = 0; k < 16; ++k) {
                // strides of the example in elements: m within a unit 1, units 8, then `outer`; k within eight, then `far`
                const size_t outer = (e.mode == 0 ? e.stride : e.leading) / 2;
                const size_t far = (e.mode == 0 ? e.leading : e.stride) / 2;
                const size_t element =
                    m % 8 + m / 8 % e.inner * 8 + m / (8 * e.inner) * outer + k % 8 * 8 * e.inner + k / 8 * far;
                EXPECT(emulation::operand_offset(example_descriptor(e.leading, e.stride, e.mode), true, m, k) ==
                       swizzled(2 * element, e.bits));
            }
    // K-major: tf32's ((8,2),(4,4)):((4,32),(1,64)) and ((8,2),(4,4)):((8,64),(1,4)); bf16 has two in the place of one
    for (const Example& e : {Example{0, 0, 1, 256, 128}, Example{3, 1, 2, 16, 256}, Example{1, 3, 8, 16, 1024}})
        for (int m = 0; m < 16; ++m)
            for (int unit = 0; unit < 2; ++unit) {
                const size_t at = m % 8 * 16 * e.inner + m / 8 * e.stride + unit * (e.mode == 0 ? 256 : 16);
                EXPECT(emulation::operand_offset(example_descriptor(e.leading, e.stride, e.mode), false, m, 8 * unit) ==
                       swizzled(at, e.bits));
            }
    // by hand, 128-byte swizzle, K-major: row 3, columns 40… of a pattern are unit 5, which lies at 5 ^ 3 = 6
    EXPECT(emulation::operand_offset(example_descriptor(16, 1024, 1), false, 3, 8) == 3 * 128 + (1 ^ 3) * 16);
    EXPECT(emulation::operand_offset(example_descriptor(16, 1024, 1) + (64 >> 4), false, 3, 8) == 3 * 128 + (5 ^ 3) * 16);
    EXPECT(emulation::operand_offset(example_descriptor(16, 1024, 1), false, 9, 0) == 1024 + 128 + 16);
    EXPECT(descriptor(0x2a410, 9216) == (0x2a41ull | 576ull << 16 | 64ull << 32 | 1ull << 62));
}

// ---- whole products: d (64 × N) = a (64 × 32) b (32 × N), operands in panels of either direction ----

int product_a(int m, int k) { return (m * 7 + k * 3) % 17 - 8; }
int product_b(int k, int n) { return (k * 5 + n * 11) % 13 - 6; }

template <int kTiles, bool kTransposeA, bool kTransposeB, bool kRegisters>
void product_kernel(const Results results) {
    use_async_proxy();
    constexpr int kN = 8 * kTiles, kNRounded = (kN + 63) / 64 * 64;
    const Panels<64, 64> a_rows{0}, a_columns{0};
    const Panels<kN, 64> b_rows{64 * 128};           // rows n, columns k
    const Panels<64, kNRounded> b_columns{64 * 128};  // rows k, columns n
    const int thread = thread_index(), lane = thread % 32;
    const auto two = [](int low, int high) { return pack_bf16(float(low), float(high)); };
    for (int i = thread; i < 64 * 32; i += kWarpgroup) {
        const int row = i / 32, column = i % 32 * 2;
        if (kTransposeA)
            store_operand(a_columns.pair(row, column), two(product_a(column, row), product_a(column + 1, row)));
        else
            store_operand(a_rows.pair(row, column), two(product_a(row, column), product_a(row, column + 1)));
    }
    for (int i = thread; i < kNRounded * 32; i += kWarpgroup) {
        if (kTransposeB) {
            const int k = i / (kNRounded / 2), n = i % (kNRounded / 2) * 2;
            store_operand(b_columns.pair(k, n), two(product_b(k, n), product_b(k, n + 1)));
        } else if (i / 32 < kN) {
            const int n = i / 32, k = i % 32 * 2;
            store_operand(b_rows.pair(n, k), two(product_b(k, n), product_b(k + 1, n)));
        }
    }
    fence_async_proxy();
    barrier_sync(1, kWarpgroup);
    float d[kTiles][4];
    uint32_t fragments[2][4];
    for (int step = 0; step < 2; ++step)
        for (int r = 0; r < 4; ++r) {  // "Register Fragments", A: columns from 2·(lane % 4) on, 8 more from r = 2 on
            const int row = thread / 32 * 16 + lane / 4 + 8 * (r & 1), k = 16 * step + 2 * (lane % 4) + 8 * (r >> 1);
            fragments[step][r] = two(product_a(row, k), product_a(row, k + 1));
        }
    fence_registers();
    for (int step = 0; step < 2; ++step) {
        const uint64_t b = kTransposeB ? mn_major(b_columns, 16 * step, 0) : k_major(b_rows, 16 * step);
        if constexpr (kRegisters)
            multiply(d, fragments[step], b, step > 0);
        else
            multiply<kTransposeA, kTransposeB>(
                d, kTransposeA ? mn_major(a_columns, 16 * step, 0) : k_major(a_rows, 16 * step), b, step > 0);
    }
    commit_products();
    results.words[thread] = d[0][0] != d[0][0];  // not a number before the wait
    wait_products<0>();
    for (int n = 0; n < kTiles; ++n)
        for (int i = 0; i < 4; ++i)  // "Register Fragments", D
            results.numbers[(thread / 32 * 16 + lane / 4 + 8 * (i >> 1)) * kN + 8 * n + 2 * (lane % 4) + (i & 1)] = d[n][i];
}

template <int kTiles, bool kTransposeA, bool kTransposeB, bool kRegisters = false>
void check_product() {
    constexpr int kN = 8 * kTiles;
    std::vector<float> got(64 * kN);
    std::vector<uint32_t> early(kWarpgroup);
    run(&product_kernel<kTiles, kTransposeA, kTransposeB, kRegisters>, kWarpgroup, 64 * 128 + 64 * 512,
        Results{got.data(), early.data()});
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < kN; ++n) {
            int sum = 0;
            for (int k = 0; k < 32; ++k) sum += product_a(m, k) * product_b(k, n);
            EXPECT(got[m * kN + n] == float(sum));
        }
    for (uint32_t unknown : early) EXPECT(unknown == 1);
}

void check_products() {
    check_product<8, false, false>();
    check_product<8, true, false>();
    check_product<9, false, false>();
    check_product<16, false, true>();
    check_product<32, true, true>();
    check_product<8, false, false, true>();
}

// ---- misuse ----

enum Misuse { kNone, kNoProxyFence, kNoRegisterFence, kChangedAccumulators, kNoWait, kOverwritten };

template <Misuse kMisuse>
void misuse_kernel(const Results results) {
    use_async_proxy();
    const Panels<64, 64> ones{0};
    const int thread = thread_index();
    for (int i = thread; i < 64 * 32; i += kWarpgroup) store_operand(ones.pair(i / 32, i % 32 * 2), 0x3f803f80u);
    if (kMisuse != kNoProxyFence) fence_async_proxy();
    barrier_sync(1, kWarpgroup);
    float d[8][4] = {};
    if (kMisuse != kNoRegisterFence) fence_registers();
    multiply<false, false>(d, k_major(ones, 0), k_major(ones, 0), false);
    commit_products();
    if (kMisuse == kOverwritten) {
        store_operand(ones.pair(thread % 64, 0), 0u);
        fence_async_proxy();
    }
    if (kMisuse != kNoWait) wait_products<0>();
    if (kMisuse == kChangedAccumulators) {
        d[0][0] = 5.0f;
        multiply<false, false>(d, k_major(ones, 0), k_major(ones, 0), true);
        commit_products();
        wait_products<0>();
    }
    results.numbers[thread] = d[0][0];
}

template <Misuse kMisuse>
std::string misuse(std::vector<float>& got) {
    got.assign(kWarpgroup, 0.0f);
    return failure_of(&misuse_kernel<kMisuse>, kWarpgroup, 64 * 128, Results{got.data(), nullptr});
}

void check_misuse() {
    std::vector<float> got;
    EXPECT(misuse<kNone>(got).empty() && got[17] == 16.0f);
    EXPECT(misuse<kNoProxyFence>(got).find("without fence.proxy.async since") != std::string::npos);
    EXPECT(misuse<kNoRegisterFence>(got).find("without a wgmma.fence") != std::string::npos);
    EXPECT(misuse<kChangedAccumulators>(got).find("no wgmma.fence since") != std::string::npos);
    EXPECT(misuse<kNoWait>(got).empty() && got[17] != got[17]);
    int wrong = 0;
    for (uint64_t seed = 0; seed < 8; ++seed) {
        emulation::Scheduler::get().seed(seed);
        wrong += !misuse<kOverwritten>(got).empty() || got[17] != 16.0f;
    }
    EXPECT(wrong > 0);
}

// ---- stmatrix: the inverse of ldmatrix ----

void stmatrix_kernel(const Results results) {
    const int lane = threadIdx.x;
    auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
    uint32_t fragment[4], again[4];
    for (int i = 0; i < 4; ++i) fragment[i] = uint32_t(100 * lane + i) | uint32_t(100 * lane + 50 + i) << 16;
    store_matrix_x4<false>(shared + lane * 8, fragment);
    __syncthreads();
    results.words[256 + lane] = shared[lane * 8 + 2];  // matrix lane / 8, row lane % 8, column 2
    ldmatrix_x4(again, shared + lane * 8);
    for (int i = 0; i < 4; ++i) results.words[lane * 8 + i] = again[i] == fragment[i];
    __syncthreads();
    store_matrix_x4<true>(shared + lane * 8, fragment);
    __syncthreads();
    ldmatrix_x4_transposed(again, shared + lane * 8);
    for (int i = 0; i < 4; ++i) results.words[lane * 8 + 4 + i] = again[i] == fragment[i];
}

void check_stmatrix() {
    std::vector<uint32_t> got(256 + 32);
    run(&stmatrix_kernel, 32, 512, Results{nullptr, got.data()});
    for (int at = 0; at < 256; ++at) EXPECT(got[at] == 1);
    EXPECT(got[256 + 8 + 3] == 100 * (4 * 3 + 1) + 1);  // matrix 1, row 3, column 2: the lower half of lane 13's r[1]
}

// ---- bar.sync, bar.arrive ----

template <bool kTwice>
void producer_kernel(const Results results) {
    auto* shared = reinterpret_cast<volatile uint32_t*>(dynamic_shared_memory());
    const int thread = threadIdx.x;
    if (thread < 32) {
        shared[thread] = thread + 1;
        barrier_arrive(3, 96);
        if (kTwice) barrier_arrive(3, 96);
    } else {
        barrier_sync(3, 96);
        results.words[thread] = shared[thread % 32];
    }
}
// Arrives before it has written.
void early_kernel(const Results results) {
    auto* shared = reinterpret_cast<volatile uint32_t*>(dynamic_shared_memory());
    const int thread = threadIdx.x;
    if (thread < 32) {
        barrier_arrive(3, 96);
        shared[thread] = thread + 1;
    } else {
        barrier_sync(3, 96);
        results.words[thread] = shared[thread % 32];
    }
}
void absent_kernel(const Nothing) {
    if (threadIdx.x >= 32) barrier_sync(3, 96);
}

void check_named_barriers() {
    for (uint64_t seed = 0; seed < 5; ++seed) {
        emulation::Scheduler::get().seed(seed);
        std::vector<uint32_t> got(96);
        run(&producer_kernel<false>, 96, 512, Results{nullptr, got.data()});
        for (uint32_t thread = 32; thread < 96; ++thread) EXPECT(got[thread] == thread % 32 + 1);
    }
    std::vector<uint32_t> got(96);
    EXPECT(failure_of(&absent_kernel, 96, 0, Nothing{}).find("barrier 3: 64 of 96 have come") != std::string::npos);
    int noticed = 0;
    for (uint64_t seed = 0; seed < 5; ++seed) {
        emulation::Scheduler::get().seed(seed);
        noticed += failure_of(&producer_kernel<true>, 96, 512, Results{nullptr, got.data()}) != "";
    }
    EXPECT(noticed > 0);
    int early = 0;
    for (uint64_t seed = 0; seed < 16; ++seed) {
        emulation::Scheduler::get().seed(seed);
        run(&early_kernel, 96, 512, Results{nullptr, got.data()});
        for (uint32_t thread = 32; thread < 96; ++thread) early += got[thread] != thread % 32 + 1;
    }
    EXPECT(early > 0);
}

}  // namespace
