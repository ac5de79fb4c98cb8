// Causal linear attention, forward, for Hopper (sm_90a): forward.cuh's algorithm and contract on wgmma, for head dim 128
// and fused maps. It has run in emulation only, not yet on a GPU: forward_choice.py says when it is chosen.
//
// One block per (batch row, head, segment), chunk after chunk of 64 tokens, by three warpgroups of 128 threads:
//
//   producer (2)           z = q W_q, φ(q) → shared memory;  z = k W_k, φ(k) → shared memory;  asks for the next q, k, v
//   consumers (0 and 1)    keep Sᵀ (V × F, float) in registers, 64 rows each
//     0                    [A | φ(q)·z] = φ(q) [φ(k) | z]ᵀ, 64 × 72;  tril(A) in bf16 and 1/d → shared memory
//     1                    z += Σ φ(k), column by column
//     both                 oᵀ = Sᵀ φ(q)ᵀ + vᵀ tril(A)ᵀ      Sᵀ += vᵀ φ(k)      o = oᵀ / d, transposed on its way out
//
// Transposed, S never leaves its registers: rounded to bf16, its accumulators are the A operand of Sᵀ φ(q)ᵀ as they lie.
// wgmma reads all other operands from shared memory, once for 64 rows where mma.sync reads them once for 16. φ(k) serves
// as K-major B (scores) and as N-major B (state), v as M-major A, W as N-major B: nothing is stored twice.
// z lies below φ(k) as eight more rows: three of bf16 add up to it (24 bits), the others are zero. So φ(q)·z comes out of
// the scores' product in float, which 72 columns make 1/8 longer.
//
// Named barriers of a chunk; who is in brackets arrives and does not wait:
//   kPhiFull    [producer] → consumers   φ(q), φ(k), v are there
//   kPhiQFree   [consumers] → producer   φ(q) is used up             kPhiKFree   [consumers] → producer   φ(k) and v are
//   kScores     consumers                A, 1/d are there, z is read
//   kProducer   q or k has arrived; it is used up                kGroup + g  within consumer g
//   kHidden     consumers                only with packing: keys of earlier runs are zeroed
// There is one place for φ(q) and one for φ(k). While the consumers work with one of them the producer makes the other,
// in registers up to the last step: exponentials and products overlap without second copies, which would not fit.
//
// On paper, clocks a chunk and multiprocessor (2048 multiply-adds, 128 bytes of shared memory, 16 exponentials a clock):
//                                                  F = 128    F = 256
//   tensor cores        z                              512      1,024
//                       scores and φ(q)·z              288        576
//                       Sᵀ φ(q)ᵀ                       512      1,024
//                       vᵀ tril(A)ᵀ                    256        256
//                       vᵀ φ(k)                        512      1,024
//                                                    2,080      3,904
//   shared memory       operands of wgmma            1,680      2,720    A: 16 a product (none from registers), B: N/4
//                       φ, A, q, k, v written          704        960
//                       o through it, φ(k) summed      384        512
//                                                    2,768      4,192
//   producer            exponentials, each once      1,024      2,048
//                       or its instructions, one warp a
//                       scheduler, and waiting for z 2,350      4,200    1,840 and 3,150 of them, counted in SASS
//   limit (790 TFLOP/s, 4.3 TB/s)                    3,540      4,610
// With F = 128 memory is what limits; with F = 256 the three are as long as each other, and the producer is the first place
// to look. Expected is 70 % and 60–70 % of the limit. Nothing of this is measured.
//
// Segments: the pass that fills in the states before them is forward.cuh's (forward.cu).
#pragma once

#include "feature_map_hopper.cuh"
#include "forward.cuh"

namespace hedgehog {

constexpr int kConsumers = 2, kProducerGroup = kConsumers;
constexpr int kHopperThreads = kWarpgroup * (kConsumers + 1);
// 384 threads start with 168 registers each, all that there are. With F = 256 the state takes 128 of a consumer's, and
// with fewer than 200 the compiler makes wgmma wait for itself; z takes 64 of the producer's.
constexpr int kConsumerRegisters = 200, kProducerRegisters = 104;
constexpr int kSumRows = 8;  // below φ(k): three of them for z

enum NamedBarrier { kPhiFull = 1, kPhiQFree, kPhiKFree, kScores, kHidden, kProducer, kGroup };

template <int kHeadDim, int kFeatures>
struct HopperLayout {
    static_assert(kHeadDim == 128, "two consumers with 64 rows of the state each");
    static constexpr int kProjected = kFeatures / 2;
    using Weight = Panels<kHeadDim, kProjected>;
    using Input = Panels<kChunk, kHeadDim>;
    using PhiQ = Panels<kChunk, kFeatures>;
    using PhiK = Panels<kChunk + kSumRows, kFeatures>;
    using Scores = Panels<kChunk, kChunk>;
    static constexpr int kWeightQ = 0, kWeightK = kWeightQ + Weight::kBytes;
    static constexpr int kRawQ = kWeightK + Weight::kBytes, kRawK = kRawQ + Input::kBytes;
    static constexpr int kValues = kRawK + Input::kBytes;  // two of them, in turn
    static constexpr int kPhiQ = kValues + 2 * Input::kBytes, kPhiK = kPhiQ + PhiQ::kBytes;
    static constexpr int kScores = kPhiK + PhiK::kBytes;
    static constexpr int kOut = kScores + Scores::kBytes;
    static constexpr int kOneOverD = kOut + Input::kBytes;  // two of them, in turn
    static constexpr int kRuns = kOneOverD + 2 * 4 * kChunk;  // a copy for each consumer
    static constexpr int kBytes = kRuns + kConsumers * 4 * kChunk;
    static_assert(kBytes <= 227 * 1024, "what an H100 gives a block");
};

template <int kHeadDim, int kFeatures>
class HopperForwardBlock {
    using Layout = HopperLayout<kHeadDim, kFeatures>;
    static constexpr int kProjected = Layout::kProjected, kTiles = kFeatures / 8;
    const typename Layout::Weight weight_q{Layout::kWeightQ}, weight_k{Layout::kWeightK};
    const typename Layout::Input raw_q{Layout::kRawQ}, raw_k{Layout::kRawK}, staged_out{Layout::kOut};
    const typename Layout::PhiQ phi_q{Layout::kPhiQ};
    const typename Layout::PhiK phi_k{Layout::kPhiK};
    const typename Layout::Scores scores{Layout::kScores};

   public:
    __device__ __forceinline__ explicit HopperForwardBlock(const ForwardParameters& parameters) : p(parameters) {}

    __device__ __forceinline__ void run() {
        use_async_proxy();
        const int group = static_cast<int>(uint32_t(thread_index()) / kWarpgroup);
        if (group == kProducerGroup) {
            give_registers<kProducerRegisters>();
            produce();
        } else {
            take_registers<kConsumerRegisters>();
            consume(group);
        }
    }

   private:
    __device__ __forceinline__ static int64_t row() { return block_z(); }
    __device__ __forceinline__ static int64_t head() { return block_y(); }
    __device__ __forceinline__ static int segment() { return block_x(); }
    __device__ __forceinline__ int64_t batch_head() const { return row() * p.heads + head(); }
    __device__ __forceinline__ const int32_t* runs() const { return p.runs + row() * p.length; }
    __device__ __forceinline__ int first() const { return segment() * p.chunks_per_segment; }
    __device__ __forceinline__ int stop() const {
        const int whole = (segment() + 1) * p.chunks_per_segment;
        return whole < p.num_chunks ? whole : p.num_chunks;
    }
    __device__ __forceinline__ static int64_t start_of(int chunk) { return int64_t(chunk) * kChunk; }
    // Tokens of a chunk: all 64, or what the length leaves.
    __device__ __forceinline__ int rows_from(int chunk) const {
        return chunk + 1 < p.num_chunks ? kChunk : static_cast<int>(p.length - start_of(chunk));
    }
    // Runs of the tokens just before a chunk (the first token of all has none: its own) and at its end.
    __device__ __forceinline__ int32_t run_before(int chunk) const { return runs()[chunk > 0 ? start_of(chunk) - 1 : 0]; }
    __device__ __forceinline__ int32_t run_at_end(int chunk) const {
        return runs()[(chunk + 1 < p.num_chunks ? start_of(chunk + 1) : p.length) - 1];
    }
    __device__ __forceinline__ float* segment_state(int index) const {
        return p.segment_states + (batch_head() * (p.segments - 1) + index) * (kFeatures * (kHeadDim + 1));
    }
    __device__ __forceinline__ static typename Layout::Input values(int chunk) {
        return {Layout::kValues + chunk % 2 * Layout::Input::kBytes};
    }
    __device__ __forceinline__ static float* one_over_d(int chunk) {
        return reinterpret_cast<float*>(dynamic_shared_memory() + Layout::kOneOverD) + chunk % 2 * kChunk;
    }
    __device__ __forceinline__ static int32_t* chunk_runs(int group) {
        return reinterpret_cast<int32_t*>(dynamic_shared_memory() + Layout::kRuns) + group * kChunk;
    }

    // ---- producer ----

    __device__ __forceinline__ void produce() const {
        const int query_head = static_cast<int>(head()), kv_head = query_head / (p.heads / p.kv_heads);
        copy_weights();
        copy_chunk(raw_q, p.q, p.q_stride, query_head, first());
        copy_async_commit();
        copy_chunk(raw_k, p.k, p.k_stride, kv_head, first());
        copy_chunk(values(first()), p.v, p.v_stride, kv_head, first());
        copy_async_commit();
#pragma unroll 1
        for (int chunk = first(); chunk < stop(); ++chunk) {
            Features<kProjected / 8> features;
            make_features(features, raw_q, weight_q, false, [&] {
                copy_chunk(raw_q, p.q, p.q_stride, query_head, chunk + 1);
                copy_async_commit();
            });
            if (chunk > first()) barrier_sync(kPhiQFree, kHopperThreads);
            store_features(features, {true, true}, phi_q, first_row(), nothing());

            const int row_in_chunk = static_cast<int>(first_row() + (thread_index() & 31) / 4);
            const bool keep[2] = {is_real(chunk, row_in_chunk), is_real(chunk, row_in_chunk + 8)};
            make_features(features, raw_k, weight_k, true,
                          [&] { copy_chunk(raw_k, p.k, p.k_stride, kv_head, chunk + 1); });
            if (chunk > first()) barrier_sync(kPhiKFree, kHopperThreads);
            store_features(features, keep, phi_k, first_row(), nothing());
            fence_async_proxy();  // φ(q) too
            barrier_arrive(kPhiFull, kHopperThreads);
            // in the place of the chunk before this one, which was used up together with its φ(k)
            copy_chunk(values(chunk + 1), p.v, p.v_stride, kv_head, chunk + 1);
            copy_async_commit();
        }
        copy_async_wait<0>();
    }

    __device__ __forceinline__ static uint32_t first_row() { return (thread_index() & (kWarpgroup - 1)) / 32 * 16; }

    __device__ __forceinline__ bool is_real(int chunk, int row_in_chunk) const {
        const int64_t token = start_of(chunk) + row_in_chunk;
        return token < p.length && (p.mask == nullptr || p.mask[row() * p.length + token]);
    }

    __device__ __forceinline__ void copy_weights() const {
        const int64_t offset = head() * kHeadDim * kProjected;
        weight_q.template copy_rows<kHeadDim>(p.weight_q + offset, kProjected, kHeadDim);
        weight_k.template copy_rows<kHeadDim>(p.weight_k + offset, kProjected, kHeadDim);
    }

    // Asks for a chunk's q, k or v, if it belongs to the segment. Addresses are made afresh, not kept from chunk to chunk.
    __device__ __forceinline__ void copy_chunk(typename Layout::Input to, const uint16_t* from,
                                               const HedgehogStrides& stride, int head, int chunk) const {
        if (chunk >= stop()) return;
        from += row() * stride.batch + int64_t(read_here(head)) * stride.head + start_of(chunk) * stride.token;
        to.template copy_rows<kChunk>(from, stride.token, rows_from(chunk));
    }

    __device__ __forceinline__ uint32_t nothing() const { return static_cast<uint32_t>(p.segments >> 31); }

    // z = x W, then its exponentials; `fetch` is called as soon as x may be overwritten.
    template <class Fetch>
    __device__ __forceinline__ void make_features(Features<kProjected / 8>& features, typename Layout::Input x,
                                                  typename Layout::Weight weight, bool is_key, Fetch fetch) const {
        copy_async_wait<1>();  // the other of q and k (with v) may be under way
        fence_async_proxy();
        barrier_sync(kProducer, kWarpgroup);
        float z[kProjected / 8][4];
        fence_registers();
#pragma unroll
        for (int d = 0; d < kHeadDim; d += 16)
            multiply<false, true>(z, k_major(x, d), mn_major(weight, d, 0), d > 0);
        commit_products();
        wait_products<0>();
        settle(z);
        barrier_sync(kProducer, kWarpgroup);
        fetch();
        exponentiate(features, z, p.feature_map, is_key, nothing());
    }

    // ---- consumers ----

    __device__ __forceinline__ void consume(int group) const {
        float state[kTiles][4];
        load_state(state);
        float k_sum[2] = {0.0f, 0.0f};
        if (group == 1) {
            load_k_sum(k_sum);
            clear_sum_rows();
            write_k_sum(k_sum);
        }
#pragma unroll 1
        for (int chunk = first(); chunk < stop(); ++chunk) {
            const bool more = chunk + 1 < stop();
            bool survives = true;
            if (p.runs) {
                survives = run_before(chunk) == run_at_end(chunk);
                read_runs(chunk, group);
            }
            barrier_sync(kPhiFull, kHopperThreads);
            float out[8][4];
            if (group == 1)
                add_keys(k_sum, chunk, survives);
            else
                make_scores(chunk);
            read_state(out, state);
            if (more) barrier_arrive(kPhiQFree, kHopperThreads);
            if (p.runs) hide_state_from_later_runs(out, chunk, group);
            barrier_sync(kScores, kConsumers * kWarpgroup);
            if (p.runs) hide_keys_of_earlier_runs(chunk, group);
            advance(out, state, group, chunk, survives);
            if (group == 1) write_k_sum(k_sum);
            wait_products<0>();
            settle(out);
            settle(state);
            if (more) barrier_arrive(kPhiKFree, kHopperThreads);
            write_out(out, group, chunk);
        }
        store_state(state, k_sum, group);
    }

    // Warp w of a consumer holds rows v = 64·group + 16w + lane/4 (+8) of Sᵀ and oᵀ, columns 8n + 2(lane % 4) (+1).
    __device__ __forceinline__ static uint32_t thread_offset() {
        const uint32_t thread = thread_index(), lane = thread & 31;
        return 2 * (lane & 3) * kHeadDim + thread / 32 * 16 + lane / 4;
    }
    __device__ __forceinline__ static constexpr int element_offset(int n, int i) {
        return (8 * n + (i & 1)) * kHeadDim + 8 * (i >> 1);
    }

    __device__ __forceinline__ void load_state(float (&state)[kTiles][4]) const {
        const float* from = state_before(false);
        if (from) from += thread_offset();
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) state[n][i] = from ? from[element_offset(n, i)] : 0.0f;
    }

    // S or z before the segment in global memory; null for zeros.
    __device__ __forceinline__ const float* state_before(bool k_sum) const {
        if (segment() == 0 && p.initial_kv)
            return k_sum ? p.initial_k_sum + batch_head() * kFeatures : p.initial_kv + batch_head() * kFeatures * kHeadDim;
        if (segment() > 0) return segment_state(segment() - 1) + (k_sum ? kFeatures * kHeadDim : 0);
        return nullptr;
    }

    __device__ __forceinline__ void store_state(const float (&state)[kTiles][4], const float (&k_sum)[2], int group) const {
        if (p.final_kv == nullptr || segment() != p.segments - 1) return;
        float* kv = p.final_kv + batch_head() * kFeatures * kHeadDim;
        float* sum = p.final_k_sum + batch_head() * kFeatures;
        kv += thread_offset();
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) kv[element_offset(n, i)] = state[n][i];
        if (group == 1 && sum_part() == 0) {
            sum[2 * sum_word()] = k_sum[0];
            sum[2 * sum_word() + 1] = k_sum[1];
        }
    }

    // z belongs to warpgroup 1: a thread has two features, and with F = 128 its neighbour the same two. The two add up rows
    // whose numbers differ in bit 2, which lie in different banks.
    static constexpr int kSumParts = 2 * kWarpgroup / kFeatures;
    __device__ __forceinline__ static uint32_t sum_word() { return (thread_index() & (kWarpgroup - 1)) / kSumParts; }
    __device__ __forceinline__ static uint32_t sum_part() { return thread_index() & (kSumParts - 1); }

    __device__ __forceinline__ void load_k_sum(float (&k_sum)[2]) const {
        const float* from = state_before(true);
        k_sum[0] = from ? from[2 * sum_word()] : 0.0f;
        k_sum[1] = from ? from[2 * sum_word() + 1] : 0.0f;
    }

    __device__ __forceinline__ void clear_sum_rows() const {
        if (sum_part() == 0)
            for (int row = 3; row < kSumRows; ++row) store_operand(phi_k.pair(kChunk + row, 2 * sum_word()), 0u);
    }

    // z as three rows of bf16, each what the ones before it leave.
    __device__ __forceinline__ void write_k_sum(const float (&k_sum)[2]) const {
        float left[2] = {k_sum[0], k_sum[1]};
#pragma unroll
        for (int row = 0; row < 3; ++row) {
            const uint32_t word = pack_bf16(left[0], left[1]);
            if (sum_part() == 0) store_operand(phi_k.pair(kChunk + row, 2 * sum_word()), word);
            left[0] -= low_bf16(word);
            left[1] -= high_bf16(word);
        }
        fence_async_proxy();
    }

    __device__ __forceinline__ void add_keys(float (&k_sum)[2], int chunk, bool survives) const {
        const int32_t* marks = chunk_runs(1);
        const int32_t last_run = p.runs ? run_at_end(chunk) : 0;
        float sums[2] = {0.0f, 0.0f};
#pragma unroll 8
        for (int i = 0; i < kChunk / kSumParts; ++i) {
            const int row = kSumParts == 1 ? i : i / 4 * 8 + sum_part() * 4 + i % 4;
            const uint32_t pair = *phi_k.pair(row, 2 * sum_word());
            const bool counts = p.runs == nullptr || marks[row] == last_run;
            sums[0] += counts ? low_bf16(pair) : 0.0f;
            sums[1] += counts ? high_bf16(pair) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (kSumParts == 2) sums[i] += shuffle_xor(sums[i], 1);
            k_sum[i] = (survives ? k_sum[i] : 0.0f) + sums[i];
        }
    }

    // Which run each of the chunk's tokens belongs to, to be read after kPhiFull; each consumer has its own copy.
    __device__ __forceinline__ void read_runs(int chunk, int group) const {
        const uint32_t thread = thread_index() & (kWarpgroup - 1);
        const int64_t token = start_of(chunk) + thread;
        if (thread < kChunk) chunk_runs(group)[thread] = token < p.length ? runs()[token] : 0;
    }

    __device__ __forceinline__ bool sees(uint32_t row, uint32_t column) const {
        return column <= row && (p.runs == nullptr || chunk_runs(0)[row] == chunk_runs(0)[column]);
    }

    // tril(A) in bf16, d and 1/d. A is rounded once, and the rounded A is what the denominator sums: with v = 1, o is 1.
    __device__ __forceinline__ void make_scores(int chunk) const {
        float sums[9][4];
        fence_registers();
#pragma unroll
        for (int f = 0; f < kFeatures; f += 16) multiply<false, false>(sums, k_major(phi_q, f), k_major(phi_k, f), f > 0);
        commit_products();
        wait_products<0>();
        settle(sums);
        const uint32_t lane = thread_index() & 31, member = lane & 3, top_row = first_row();
        const int64_t left = p.length - start_of(chunk);
        float d[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t row = top_row + lane / 4 + 8 * r;
            const bool sees_state = p.runs == nullptr || chunk_runs(0)[row] == run_before(chunk);
            d[r] = sees_state ? sums[8][2 * r] + sums[8][2 * r + 1] : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t r = i & 1, tile = n + (i >> 1), row = top_row + lane / 4 + 8 * r;
                const uint32_t column = 8 * tile + 2 * member;
                words[i] = pack_bf16(sees(row, column) ? sums[tile][2 * r] : 0.0f,
                                     sees(row, column + 1) ? sums[tile][2 * r + 1] : 0.0f);
                d[r] += low_bf16(words[i]) + high_bf16(words[i]);
            }
            store_matrix_x4<false>(scores.unit(top_row | (lane & 15), n | (lane >> 4)), words);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t row = top_row + lane / 4 + 8 * r;
            d[r] = quad_sum(d[r]) + p.eps;
            if (member != 0) continue;
            one_over_d(chunk)[row] = 1.0f / d[r];
            if (row < left) p.denominator[batch_head() * p.length + start_of(chunk) + row] = d[r];
        }
        fence_async_proxy();
    }

    // oᵀ = Sᵀ φ(q)ᵀ, sixteen features at a time: the fragment of one product is made while others run.
    __device__ __forceinline__ void read_state(float (&out)[8][4], const float (&state)[kTiles][4]) const {
        constexpr int kUnderWay = 2;
        uint32_t fragments[kUnderWay][4];
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t(&a)[4] = fragments[n / 2 % kUnderWay];
            if (n / 2 >= kUnderWay) wait_products<kUnderWay - 1>();
            a[0] = pack_bf16(state[n][0], state[n][1]);
            a[1] = pack_bf16(state[n][2], state[n][3]);
            a[2] = pack_bf16(state[n + 1][0], state[n + 1][1]);
            a[3] = pack_bf16(state[n + 1][2], state[n + 1][3]);
            fence_registers();
            multiply(out, a, k_major(phi_q, 8 * n), n > 0);
            commit_products();
        }
        wait_products<0>();
        settle(out);
    }

    // Only tokens of the run before the chunk see the state.
    __device__ __forceinline__ void hide_state_from_later_runs(float (&out)[8][4], int chunk, int group) const {
        const int32_t* marks = chunk_runs(group) + 2 * (thread_index() & 3);
        const int32_t before = run_before(chunk);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (marks[8 * n + (i & 1)] != before) out[n][i] = 0.0f;
    }

    // Only keys of the run that goes on after the chunk enter the state. φ(k) has served the scores and z by now.
    __device__ __forceinline__ void hide_keys_of_earlier_runs(int chunk, int group) const {
        const int32_t last_run = run_at_end(chunk);
        for (uint32_t index = thread_index(); index < kChunk * kFeatures / 2; index += kConsumers * kWarpgroup) {
            const uint32_t row = index / (kFeatures / 2), column = index % (kFeatures / 2) * 2;
            if (chunk_runs(group)[row] != last_run) store_operand(phi_k.pair(row, column), 0u);
        }
        fence_async_proxy();
        barrier_sync(kHidden, kConsumers * kWarpgroup);
    }

    // Leaves products under way: oᵀ += vᵀ tril(A)ᵀ, and Sᵀ += vᵀ φ(k), from zero where a border lies
    // between the state and the chunk's end.
    __device__ __forceinline__ void advance(float (&out)[8][4], float (&state)[kTiles][4], int group, int chunk,
                                            bool survives) const {
        const auto v = values(chunk);
        settle(out);
        settle(state);
        fence_registers();
#pragma unroll
        for (int token = 0; token < kChunk; token += 16)
            multiply<true, false>(out, mn_major(v, token, 64 * group), k_major(scores, token), true);
#pragma unroll
        for (int token = 0; token < kChunk; token += 16)
            multiply<true, true>(state, mn_major(v, token, 64 * group), mn_major(phi_k, token, 0),
                                 token > 0 || survives);
        commit_products();
    }

    // o = oᵀ / d, transposed on its way through shared memory, then rows of 128 bytes to global memory.
    __device__ __forceinline__ void write_out(const float (&out)[8][4], int group, int chunk) const {
        const uint32_t thread = thread_index() & (kWarpgroup - 1), warp = thread / 32, lane = thread & 31;
        const float* scales = one_over_d(chunk) + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int tile = n + (i >> 1), r = i & 1;
                words[i] = pack_bf16(out[tile][2 * r] * scales[8 * tile], out[tile][2 * r + 1] * scales[8 * tile + 1]);
            }
            const uint32_t token = 8 * (n | (lane >> 4)) + (lane & 7);
            const uint32_t unit = 8 * group | 2 * warp | (lane >> 3 & 1);
            store_matrix_x4<true>(staged_out.unit(token, unit), words);
            schedule_barrier();
        }
        barrier_sync(kGroup + group, kWarpgroup);
        const int64_t left = p.length - start_of(chunk);
        const uint32_t unit = 8 * group | (thread & 7);
        uint16_t* to = p.out + row() * p.out_stride.batch + head() * p.out_stride.head +
                       start_of(chunk) * p.out_stride.token + unit * kUnit;
#pragma unroll 1
        for (uint32_t token = thread / 8; token < kChunk; token += kWarpgroup / 8)
            if (token < left)
                *reinterpret_cast<float4*>(to + token * p.out_stride.token) =
                    *reinterpret_cast<const float4*>(staged_out.unit(token, unit));
    }

    const ForwardParameters& p;
};

template <int kHeadDim, int kFeatures, bool kFused>
__global__ void __launch_bounds__(kHopperThreads, 1)
    linear_attention_forward_hopper(const __grid_constant__ ForwardParameters parameters) {
    static_assert(kFused, "given features go to forward.cuh's kernel");
    HopperForwardBlock<kHeadDim, kFeatures>(parameters).run();
}

}  // namespace hedgehog
