// wgmma on a CPU: products of 128 threads on operands in shared memory, from the PTX manual's definitions (sections
// "Register Fragments and Shared Memory Matrix Layouts", "Matrix Descriptor Format", "wgmma.fence", "Async Proxy").
//
// Warp w of the warpgroup holds rows 16w…16w+15 of D and of an A in registers, each laid out as the C and A of
// mma.m16n8k16 (instructions.h), D with kN/8 of them side by side. tests hold layouts and descriptors to hand-made ones.
//
// Each warp works by itself: its sixteen rows of a product are done when it commits the group or when it waits for it, by a
// coin. Operands that are written to before the wait, or by another warp too late, show as wrong numbers. Accumulators are NaN
// from the issue to the wait. What ends the launch with a message: shared memory written without fence.proxy.async since;
// accumulators or a fragment changed without wgmma.fence since; warps that issue different products; a descriptor that leads
// outside of shared memory.
#pragma once

#include <array>
#include <limits>
#include <map>
#include <memory>

#include "instructions.h"

namespace emulation {

constexpr int kWarpgroupSize = 128;

// One wgmma.mma_async.m64nNk16 with bf16 operands and float accumulators, as a thread issues it.
struct Product {
    float* d;
    int columns;
    const uint32_t* a_registers;  // null: a is in shared memory
    uint32_t a[4];
    uint64_t a_descriptor, b_descriptor;
    bool transpose_a, transpose_b, accumulate;
};

struct WarpgroupThread {
    std::vector<Product> open;                     // issued, not committed
    std::vector<std::vector<Product>> groups;      // committed, not waited for
    std::map<float*, std::vector<float>> accumulators;  // by where they belong; under way
    std::map<float*, std::vector<float>> last_results;  // as the waits left them, until a fence
    std::map<const uint32_t*, std::array<uint32_t, 4>> fragments;  // of a, as they were issued since the last fence
    bool fenced = false;
    size_t num_issued = 0;
};

struct WarpProducts {
    WarpgroupThread threads[kWarpSize];
    size_t num_done = 0;  // of the groups
    Gathering waiting;
};

struct Warpgroup {
    uint64_t block = 0;
    WarpProducts warps[kWarpgroupSize / kWarpSize];
    std::vector<Product> issued;  // by the first thread to come so far
};

inline Warpgroup& warpgroup() {
    static std::map<int, std::unique_ptr<Warpgroup>> warpgroups;  // on the heap: too large for a fiber's stack
    Scheduler& scheduler = Scheduler::get();
    std::unique_ptr<Warpgroup>& mine = warpgroups[scheduler.current().thread / kWarpgroupSize];
    if (!mine || mine->block != scheduler.blocks_begun()) {
        mine = std::make_unique<Warpgroup>();
        mine->block = scheduler.blocks_begun();
    }
    return *mine;
}

inline int warp_in_group() { return Scheduler::get().current().thread % kWarpgroupSize / kWarpSize; }

// Where element (mn, k) of an operand lies, in bytes from the start of shared memory. With T = 8 elements in 16 bytes
// and W units of 16 bytes in a swizzled row (1 without swizzle), the canonical layouts are
//                 no swizzle                               swizzled
//   K-major       ((8,m),(T,2)) : ((T,SBO),(1,LBO))        ((8,m),(T,2)) : ((WT,SBO),(1,T))
//   MN-major      ((T,1,m),(8,k)) : ((1,T,SBO),(T,LBO))    ((T,W,m),(8,k)) : ((1,T,LBO),(WT,SBO))
// and the swizzle exclusive-ors address bits 4… with bits 7…, as many as W has.
inline size_t operand_offset(uint64_t descriptor, bool mn_major, int mn, int k) {
    const size_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const size_t stride = (descriptor >> 32 & 0x3fff) << 4;
    constexpr int kUnitsOfMode[] = {1, 8, 4, 2};
    const int units = kUnitsOfMode[descriptor >> 62];
    if (descriptor >> 49 & 7) Scheduler::get().fail("a matrix base offset: the emulation has none");
    size_t at = start;
    if (!mn_major)
        at += mn % 8 * 16 * units + mn / 8 * stride + k % 8 * 2 + k / 8 * (units == 1 ? leading : 16);
    else if (units == 1)
        at += mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    else
        at += mn % (8 * units) * 2 + mn / (8 * units) * leading + k % 8 * 16 * units + k / 8 * stride;
    return at ^ ((at >> 7 & (units - 1)) << 4);
}

inline float operand_element(uint64_t descriptor, bool mn_major, int mn, int k) {
    Scheduler& scheduler = Scheduler::get();
    const size_t at = operand_offset(descriptor, mn_major, mn, k);
    if (at + 2 > scheduler.shared_bytes()) scheduler.fail("a matrix descriptor leads outside of shared memory");
    const int writer = scheduler.unfenced_writer(at);
    if (writer >= 0)
        scheduler.fail("wgmma reads what thread " + std::to_string(writer) + " wrote without fence.proxy.async since");
    uint16_t bits;
    std::memcpy(&bits, scheduler.shared_memory() + at, 2);
    return bf16_to_float(bits);
}

// A warp's sixteen rows of one product.
inline void perform(WarpProducts& warp, int first_row, size_t which, size_t index) {
    const Product& first = warp.threads[0].groups[which][index];
    const int columns = first.columns;
    std::vector<float> a(16 * 16), b(16 * columns), sums(16 * columns);
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; ++n)
            b[k * columns + n] = operand_element(first.b_descriptor, first.transpose_b, n, k);
        if (first.a_registers) continue;
        for (int m = 0; m < 16; ++m)
            a[m * 16 + k] = operand_element(first.a_descriptor, first.transpose_a, first_row + m, k);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const Product& product = warp.threads[lane].groups[which][index];
        const std::vector<float>& d = warp.threads[lane].accumulators[product.d];
        const int row = lane / 4, member = lane % 4;
        for (int r = 0; r < 4 && first.a_registers; ++r)
            for (int half = 0; half < 2; ++half)
                a[(row + 8 * (r & 1)) * 16 + 2 * member + half + 8 * (r >> 1)] =
                    bf16_to_float(uint16_t(product.a[r] >> 16 * half));
        for (int i = 0; i < columns / 2 && first.accumulate; ++i)
            sums[(row + 8 * (i >> 1 & 1)) * columns + i / 4 * 8 + 2 * member + (i & 1)] = d[i];
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < columns; ++n) sums[m * columns + n] += a[m * 16 + k] * b[k * columns + n];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int row = lane / 4, member = lane % 4;
        std::vector<float>& d = warp.threads[lane].accumulators[warp.threads[lane].groups[which][index].d];
        for (int i = 0; i < columns / 2; ++i)
            d[i] = sums[(row + 8 * (i >> 1 & 1)) * columns + i / 4 * 8 + 2 * member + (i & 1)];
    }
}

// All of the warp's groups up to `count`.
inline void perform_groups(WarpProducts& warp, int first_row, size_t count) {
    for (; warp.num_done < count; ++warp.num_done) {
        const size_t num_products = warp.threads[0].groups[warp.num_done].size();
        for (const WarpgroupThread& thread : warp.threads)
            if (thread.groups[warp.num_done].size() != num_products)
                Scheduler::get().fail("threads of one warp commit different numbers of products");
        for (size_t index = 0; index < num_products; ++index) perform(warp, first_row, warp.num_done, index);
    }
}

EMULATION_NOINLINE WarpProducts& warp_products() { return warpgroup().warps[warp_in_group()]; }

EMULATION_NOINLINE WarpgroupThread& warpgroup_thread() {
    return warp_products().threads[Scheduler::get().current().thread % kWarpSize];
}

// wgmma.fence
EMULATION_NOINLINE void fence_registers() {
    WarpgroupThread& mine = warpgroup_thread();
    mine.fenced = true;
    mine.last_results.clear();
    mine.fragments.clear();
}

// wgmma.mma_async
EMULATION_NOINLINE void issue_product(const Product& product) {
    Warpgroup& group = warpgroup();
    WarpgroupThread& mine = warpgroup_thread();
    const size_t size = product.columns / 2;
    if (product.a_registers) {
        const std::array<uint32_t, 4> a{product.a[0], product.a[1], product.a[2], product.a[3]};
        if (mine.fragments.emplace(product.a_registers, a).first->second != a)
            Scheduler::get().fail("a fragment was changed, and no wgmma.fence since");
    }
    if (!mine.accumulators.count(product.d)) {
        const auto last = mine.last_results.find(product.d);
        if (last != mine.last_results.end() && product.accumulate &&
            std::memcmp(last->second.data(), product.d, size * sizeof(float)))
            Scheduler::get().fail("accumulators were changed, and no wgmma.fence since");
        // Between the products of one chain nothing else touches their registers; before it, something did.
        if (!mine.fenced) Scheduler::get().fail("wgmma.mma_async without a wgmma.fence before it");
        mine.accumulators[product.d].assign(product.d, product.d + size);
        std::fill_n(product.d, size, std::numeric_limits<float>::quiet_NaN());
    }
    if (mine.accumulators[product.d].size() != size) Scheduler::get().fail("two shapes of one accumulator");
    mine.open.push_back(product);

    if (mine.num_issued == group.issued.size()) group.issued.push_back(product);
    const Product& theirs = group.issued[mine.num_issued++];
    if (theirs.columns != product.columns || !theirs.a_registers != !product.a_registers ||
        theirs.a_descriptor != product.a_descriptor || theirs.b_descriptor != product.b_descriptor ||
        theirs.transpose_a != product.transpose_a || theirs.transpose_b != product.transpose_b ||
        theirs.accumulate != product.accumulate)
        Scheduler::get().fail("threads of one warpgroup issue different products");
}

// wgmma.commit_group
EMULATION_NOINLINE void commit_products() {
    WarpProducts& warp = warp_products();
    WarpgroupThread& mine = warpgroup_thread();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
    for (const WarpgroupThread& thread : warp.threads)
        if (thread.groups.size() < mine.groups.size()) return;
    if (Scheduler::get().coin()) perform_groups(warp, 16 * warp_in_group(), mine.groups.size());
    Scheduler::get().fall_behind();
}

// wgmma.wait_group
EMULATION_NOINLINE void wait_products(size_t num_pending) {
    WarpProducts& warp = warp_products();
    const int first_row = 16 * warp_in_group();
    warpgroup_thread().fenced = false;  // what is read from here on is in the way of the next product
    Scheduler::get().gather(warp.waiting, kWarpSize, true, [&warp, first_row, num_pending] {
        const size_t num_groups = warp.threads[0].groups.size();
        for (const WarpgroupThread& thread : warp.threads)
            if (thread.groups.size() != num_groups)
                Scheduler::get().fail("threads of one warp wait for different groups");
        if (num_groups <= num_pending) return;
        const size_t count = num_groups - num_pending;
        perform_groups(warp, first_row, count);
        warp.num_done -= count;
        for (WarpgroupThread& thread : warp.threads) {
            thread.groups.erase(thread.groups.begin(), thread.groups.begin() + count);
            for (auto at = thread.accumulators.begin(); at != thread.accumulators.end();) {
                bool busy = false;
                for (const Product& product : thread.open) busy |= product.d == at->first;
                for (const auto& products : thread.groups)
                    for (const Product& product : products) busy |= product.d == at->first;
                if (busy) {
                    ++at;
                    continue;
                }
                std::copy(at->second.begin(), at->second.end(), at->first);
                thread.last_results[at->first] = std::move(at->second);
                at = thread.accumulators.erase(at);
            }
        }
    });
}

// stmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lanes 8i … 8i+7 bring the row addresses of matrix i, of which r[i]
// is the lane's fragment.
EMULATION_NOINLINE void store_matrix_x4(void* row, const uint32_t (&registers)[4], bool transposed) {
    if (!Scheduler::get().is_shared(row, 16)) Scheduler::get().fail("stmatrix outside of shared memory");
    if (reinterpret_cast<uintptr_t>(row) % 16) Scheduler::get().fail("stmatrix address not aligned to 16 bytes");
    struct Operands {
        uint16_t* row;
        const uint32_t* registers;
    } mine{static_cast<uint16_t*>(row), registers};
    auto store = [transposed](Operands** lanes) {
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < 4; ++i)
                for (int half = 0; half < 2; ++half) {
                    const int fragment_row = lane / 4, column = lane % 4 * 2 + half;
                    const auto value = uint16_t(lanes[lane]->registers[i] >> 16 * half);
                    if (transposed)
                        lanes[8 * i + column]->row[fragment_row] = value;
                    else
                        lanes[8 * i + fragment_row]->row[column] = value;
                }
    };
    Scheduler::get().warp_meeting(transposed ? "stmatrix.trans" : "stmatrix", mine, store);
    Scheduler::get().note_write(row, 16);
}

}  // namespace emulation
