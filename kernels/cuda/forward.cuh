// Causal linear attention, forward: one thread block per (batch row, head, segment of the length), chunk after chunk.
//
// With S = Σ φ(k) vᵀ, z = Σ φ(k) before a chunk of 64 tokens (chunked_attention.py has the same in PyTorch):
//
//     A = tril(φ(q) φ(k)ᵀ)      d = rowsum A + φ(q)·z + eps      o = (A v + φ(q) S) / d      S += φ(k)ᵀ v, z += Σ φ(k)
//
// A block has V/16 warps. Sᵀ (V × F, float) stays in registers, sixteen of its rows in each warp. Its accumulator
// fragments are at the same time, rounded to bf16, the B operands of φ(q) S: S is never written to shared memory.
// A is rounded to bf16 once, and the rounded A is what the denominator sums: with v = 1, o is 1.
// Raw q and k share their memory with φ(q), which replaces them; the next chunk's are fetched once φ(q) is used up.
//
// Barriers of a chunk:   (A) q, k are there     (B) all have read q, k: φ(q) may take their place     (C) φ, v are there
//                        (D) A and row sums are there     (E) φ(q), A are used up     (F) φ(k), v are used up
#pragma once

#include "feature_map.cuh"

namespace hedgehog {

struct ForwardParameters {
    const uint16_t *q, *k, *v, *weight_q, *weight_k;
    const uint8_t* mask;
    const int32_t* runs;
    const float *initial_kv, *initial_k_sum;
    uint16_t* out;
    float *denominator, *final_kv, *final_k_sum;
    float* segment_states;  // (B, H, segments - 1, F·V + F): what each segment but the last leaves behind
    HedgehogStrides q_stride, k_stride, v_stride, out_stride;
    int64_t length;
    int32_t num_chunks, chunks_per_segment, heads, kv_heads, feature_map, segments;
    float eps;
    bool state_only;  // the pass that only fills segment_states, each segment from zero but the first
};

// Where everything lies in shared memory, in bytes.
template <int kHeadDim, int kFeatures, bool kFused>
struct ForwardLayout {
    static constexpr int kProjected = kFeatures / 2;
    static constexpr int kWarps = kHeadDim / 16, kThreads = 32 * kWarps;
    static constexpr int kWeightBytes = kFused ? Tile<kProjected>::bytes(kHeadDim) : 0;
    static constexpr int kInputBytes = Tile<kHeadDim>::bytes(kChunk);
    static constexpr int kPhiBytes = Tile<kFeatures>::bytes(kChunk);
    static constexpr int kRawBytes = kFused ? 2 * kInputBytes : 0;
    static constexpr int kWeightQ = 0, kWeightK = kWeightBytes;
    static constexpr int kPhiQ = 2 * kWeightBytes, kRawQ = kPhiQ, kRawK = kRawQ + kInputBytes;
    static constexpr int kPhiK = kPhiQ + (kRawBytes > kPhiBytes ? kRawBytes : kPhiBytes);
    static constexpr int kValues = kPhiK + kPhiBytes;
    static constexpr int kScores = kValues + kInputBytes;
    static constexpr int kKSum = kScores + Tile<kChunk>::bytes(kChunk);
    static constexpr int kRowSums = kKSum + 4 * kFeatures;
    static constexpr int kRuns = kRowSums + 2 * 4 * kChunk;
    static constexpr int kReal = kRuns + 4 * kChunk;
    static constexpr int kBytes = kReal + 4 * kChunk;
    static_assert(kBytes <= 163 * 1024, "an A100 gives a block 163 KiB");
};

// One warp's fragment of Sᵀ: row v = 16·warp + lane/4 + 8·(i >> 1), column f = 8n + 2·(lane % 4) + (i & 1).
template <int kHeadDim, int kFeatures>
struct StateFragment {
    float value[kFeatures / 8][4];

    __device__ __forceinline__ static int offset(int n, int i, int thread) {
        const int warp = thread / 32, lane = thread % 32;
        return (8 * n + 2 * (lane % 4) + (i & 1)) * kHeadDim + 16 * warp + lane / 4 + 8 * (i >> 1);
    }
    // From (F, V) in global memory, or zeros where `source` is null.
    __device__ __forceinline__ void load(const float* source) {
        const int thread = thread_index();
#pragma unroll
        for (int n = 0; n < kFeatures / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[n][i] = source ? source[offset(n, i, thread)] : 0.0f;
    }
    __device__ __forceinline__ void store(float* destination) const {
        const int thread = thread_index();
#pragma unroll
        for (int n = 0; n < kFeatures / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) destination[offset(n, i, thread)] = value[n][i];
    }
};

template <int kHeadDim, int kFeatures, bool kFused>
class ForwardBlock {
    using Layout = ForwardLayout<kHeadDim, kFeatures, kFused>;
    static constexpr int kProjected = Layout::kProjected, kWarps = Layout::kWarps, kThreads = Layout::kThreads;
    static constexpr int kColumnGroups = kWarps / 4;  // warps that share sixteen rows of the scores
    static constexpr int kPairs = 4 / kColumnGroups;  // sixteen columns of the scores each

   public:
    __device__ __forceinline__ explicit ForwardBlock(const ForwardParameters& parameters)
        : p(parameters) {
        unsigned char* shared = dynamic_shared_memory();
        weight_q.data = reinterpret_cast<uint16_t*>(shared + Layout::kWeightQ);
        weight_k.data = reinterpret_cast<uint16_t*>(shared + Layout::kWeightK);
        raw_q.data = reinterpret_cast<uint16_t*>(shared + Layout::kRawQ);
        raw_k.data = reinterpret_cast<uint16_t*>(shared + Layout::kRawK);
        phi_q.data = reinterpret_cast<uint16_t*>(shared + Layout::kPhiQ);
        phi_k.data = reinterpret_cast<uint16_t*>(shared + Layout::kPhiK);
        values.data = reinterpret_cast<uint16_t*>(shared + Layout::kValues);
        scores.data = reinterpret_cast<uint16_t*>(shared + Layout::kScores);
        k_sum = reinterpret_cast<float*>(shared + Layout::kKSum);
        row_sums = reinterpret_cast<float*>(shared + Layout::kRowSums);
        chunk_runs = reinterpret_cast<int32_t*>(shared + Layout::kRuns);
        chunk_real = reinterpret_cast<int32_t*>(shared + Layout::kReal);
    }

    __device__ __forceinline__ void run() {
        const int first = segment() * p.chunks_per_segment;
        load_state();
        if (kFused) copy_weights();
        copy_queries_and_raw_keys(first);
        copy_values_and_given_keys(first);
#pragma unroll 1
        for (chunk = first; chunk < stop(); ++chunk) {
            read_row_marks();
            if (kFused) {
                copy_async_wait<1>();
                __syncthreads();  // (A)
                make_features();
            }
            copy_async_wait<0>();
            __syncthreads();  // (C)
            if (!p.state_only) make_scores();
            __syncthreads();  // (D)
            if (!p.state_only) write_output();
            if (p.runs) hide_keys_of_earlier_runs();
            __syncthreads();  // (E)
            if (chunk + 1 < stop()) copy_queries_and_raw_keys(chunk + 1);
            advance_state();
            __syncthreads();  // (F)
            if (chunk + 1 < stop()) copy_values_and_given_keys(chunk + 1);
        }
        store_state();
    }

   private:
    // Where this block's row and head begin. Made afresh each time: the registers are needed for the state.
    __device__ __forceinline__ static int64_t row() { return block_z(); }
    __device__ __forceinline__ static int64_t head() { return block_y(); }
    __device__ __forceinline__ int64_t kv_head() const { return head() / (p.heads / p.kv_heads); }
    __device__ __forceinline__ int64_t batch_head() const { return row() * p.heads + head(); }
    __device__ __forceinline__ const uint8_t* mask() const { return p.mask ? p.mask + row() * p.length : nullptr; }
    __device__ __forceinline__ const int32_t* runs() const { return p.runs ? p.runs + row() * p.length : nullptr; }
    __device__ __forceinline__ static int segment() { return block_x(); }
    __device__ __forceinline__ int stop() const {
        const int whole = (segment() + 1) * p.chunks_per_segment;
        return whole < p.num_chunks ? whole : p.num_chunks;
    }
    __device__ __forceinline__ int64_t start() const { return int64_t(chunk) * kChunk; }
    // Runs of the tokens just before the chunk (the first token of all has none: its own) and at its end.
    __device__ __forceinline__ int32_t run_before() const { return runs()[chunk > 0 ? start() - 1 : 0]; }
    __device__ __forceinline__ int32_t run_at_end() const {
        return runs()[(chunk + 1 < p.num_chunks ? start() + kChunk : p.length) - 1];
    }
    template <class Element>
    __device__ __forceinline__ static Element* at(Element* data, const HedgehogStrides& stride, int64_t head,
                                                  int64_t token) {
        return data + row() * stride.batch + head * stride.head + token * stride.token;
    }

    __device__ __forceinline__ float* segment_state(int index) const {
        return p.segment_states + (batch_head() * (p.segments - 1) + index) * (kFeatures * (kHeadDim + 1));
    }

    __device__ __forceinline__ void load_state() {
        const float *kv = nullptr, *sum = nullptr;
        if (segment() == 0 && p.initial_kv) {
            kv = p.initial_kv + batch_head() * kFeatures * kHeadDim;
            sum = p.initial_k_sum + batch_head() * kFeatures;
        } else if (segment() > 0 && !p.state_only) {
            kv = segment_state(segment() - 1);
            sum = kv + kFeatures * kHeadDim;
        }
        state.load(kv);
        for (int f = thread_index(); f < kFeatures; f += kThreads) k_sum[f] = sum ? sum[f] : 0.0f;
    }

    __device__ __forceinline__ void store_state() const {
        float *kv = nullptr, *sum = nullptr;
        if (p.state_only) {
            kv = segment_state(segment());
            sum = kv + kFeatures * kHeadDim;
        } else if (p.final_kv && segment() == p.segments - 1) {
            kv = p.final_kv + batch_head() * kFeatures * kHeadDim;
            sum = p.final_k_sum + batch_head() * kFeatures;
        }
        if (kv == nullptr) return;
        state.store(kv);
        for (int f = thread_index(); f < kFeatures; f += kThreads) sum[f] = k_sum[f];
    }

    __device__ __forceinline__ void copy_weights() const {
        const int64_t offset = head() * kHeadDim * kProjected;
        const auto all = [](int) { return true; };
        weight_q.template copy_rows<kHeadDim, kThreads>(p.weight_q + offset, kProjected, all);
        weight_k.template copy_rows<kHeadDim, kThreads>(p.weight_k + offset, kProjected, all);
    }

    // What lies in the memory that φ(q) takes: raw q and k, or φ(q) itself. Rows beyond the end become zeros.
    __device__ __forceinline__ void copy_queries_and_raw_keys(int from_chunk) const {
        const int64_t from = int64_t(from_chunk) * kChunk;
        const int64_t left = p.length - from;
        const auto exists = [left](int row) { return row < left; };
        if constexpr (kFused) {
            if (!p.state_only)
                raw_q.template copy_rows<kChunk, kThreads>(at(p.q, p.q_stride, head(), from), p.q_stride.token, exists);
            raw_k.template copy_rows<kChunk, kThreads>(at(p.k, p.k_stride, kv_head(), from), p.k_stride.token, exists);
        } else if (!p.state_only) {
            phi_q.template copy_rows<kChunk, kThreads>(at(p.q, p.q_stride, head(), from), p.q_stride.token, exists);
        }
        copy_async_commit();
    }

    __device__ __forceinline__ void copy_values_and_given_keys(int from_chunk) const {
        const int64_t from = int64_t(from_chunk) * kChunk;
        const int64_t left = p.length - from;
        values.template copy_rows<kChunk, kThreads>(at(p.v, p.v_stride, kv_head(), from), p.v_stride.token,
                                                    [left](int row) { return row < left; });
        if constexpr (!kFused) {
            const uint8_t* mask_from = p.mask ? mask() + from : nullptr;
            phi_k.template copy_rows<kChunk, kThreads>(
                at(p.k, p.k_stride, head(), from), p.k_stride.token,
                [left, mask_from](int row) { return row < left && (mask_from == nullptr || mask_from[row]); });
        }
        copy_async_commit();
    }

    // Which rows are real tokens, and which run each belongs to.
    __device__ __forceinline__ void read_row_marks() {
        const int thread = thread_index();
        if (thread >= kChunk) return;
        const int64_t token = start() + thread;
        const bool exists = token < p.length;
        chunk_real[thread] = exists && (p.mask == nullptr || mask()[token]);
        chunk_runs[thread] = p.runs && exists ? runs()[token] : 0;
    }

    __device__ __forceinline__ bool sees_state(int row) const {
        return p.runs == nullptr || chunk_runs[row] == run_before();
    }

    // φ(k) and φ(q), sixteen rows at a time. Of eight warps four make φ(k) and four φ(q); four warps make φ(k), then φ(q).
    __device__ __forceinline__ void make_features() {
        const int thread = thread_index(), warp = thread / 32, lane = thread % 32, first_row = 16 * (warp % 4);
        float z[kProjected / 8][4];
#pragma unroll 1
        for (int pass = 0; pass < 8 / kWarps; ++pass) {
            const bool is_key = kWarps == 8 ? warp >= 4 : pass == 0;
            const bool wanted = is_key || !p.state_only;
            if (wanted)
                project<kHeadDim, kProjected>(z, is_key ? raw_k : raw_q, first_row, is_key ? weight_k : weight_q);
            __syncthreads();  // (B)
            if (!wanted) continue;
            const bool keep[2] = {!is_key || chunk_real[first_row + lane / 4] != 0,
                                  !is_key || chunk_real[first_row + lane / 4 + 8] != 0};
            // not a choice between two tiles: the compiler is to see that this is shared memory
            const int phi = is_key ? Layout::kPhiK : Layout::kPhiQ;
            activate<kProjected>(z, p.feature_map, is_key, keep,
                                 Tile<kFeatures>{reinterpret_cast<uint16_t*>(dynamic_shared_memory() + phi)}, first_row);
        }
    }

    // A in bf16, and the rows' parts of the denominator: those of A, and φ(q)·z in float.
    __device__ __forceinline__ void make_scores() {
        const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
        const int member = lane % 4, row_tile = warp % 4, group = warp / 4;
        float a_sums[kPairs][2][4] = {};
        float on_state[2] = {0.0f, 0.0f};
#pragma unroll 2
        for (int f = 0; f < kFeatures; f += 16) {
            uint32_t a[4];
            phi_q.load_a(a, 16 * row_tile, f, lane);
            if ((f / 16) % kColumnGroups == group) {
                const float *near = k_sum + f + 2 * member, *far = near + 8;
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    on_state[r] += low_bf16(a[r]) * near[0] + high_bf16(a[r]) * near[1] + low_bf16(a[r + 2]) * far[0] +
                                   high_bf16(a[r + 2]) * far[1];
            }
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                const int column_tile = group + i * kColumnGroups;
                if (column_tile > row_tile) continue;  // wholly above the diagonal
                uint32_t b[4];
                phi_k.load_b_transposed(b, f, 16 * column_tile, lane);
                mma(a_sums[i][0], a, b[0], b[1]);
                mma(a_sums[i][1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * row_tile + lane / 4 + 8 * r;
            float sum = sees_state(row) ? on_state[r] : 0.0f;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                const int column_tile = group + i * kColumnGroups;
                if (column_tile > row_tile) continue;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int column = 16 * column_tile + 8 * n + 2 * member;
                    const float left = sees(row, column) ? a_sums[i][n][2 * r] : 0.0f;
                    const float right = sees(row, column + 1) ? a_sums[i][n][2 * r + 1] : 0.0f;
                    const uint32_t pair = pack_bf16(left, right);
                    scores.pair(row, column) = pair;
                    sum += low_bf16(pair) + high_bf16(pair);
                }
            }
            sum = quad_sum(sum);
            if (member == 0) row_sums[group * kChunk + row] = sum;
        }
    }

    __device__ __forceinline__ bool sees(int row, int column) const {
        return column <= row && (p.runs == nullptr || chunk_runs[row] == chunk_runs[column]);
    }

    // o of all 64 rows, sixteen values wide in each warp.
    __device__ __forceinline__ void write_output() {
        const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
        float sums[4][2][4] = {};
#pragma unroll
        for (int f = 0; f < kFeatures; f += 16) {
            const float(&near)[4] = state.value[f / 8];
            const float(&far)[4] = state.value[f / 8 + 1];
            const uint32_t left[2] = {pack_bf16(near[0], near[1]), pack_bf16(far[0], far[1])};
            const uint32_t right[2] = {pack_bf16(near[2], near[3]), pack_bf16(far[2], far[3])};
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                uint32_t a[4];
                phi_q.load_a(a, 16 * m, f, lane);
                mma(sums[m][0], a, left[0], left[1]);
                mma(sums[m][1], a, right[0], right[1]);
            }
        }
        if (p.runs) {
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (!sees_state(16 * m + lane / 4 + 8 * r))
#pragma unroll
                        for (int n = 0; n < 2; ++n) sums[m][n][2 * r] = sums[m][n][2 * r + 1] = 0.0f;
        }
#pragma unroll
        for (int key_tile = 0; key_tile < 4; ++key_tile) {
            uint32_t b[4];
            values.load_b(b, 16 * key_tile, 16 * warp, lane);
#pragma unroll
            for (int m = key_tile; m < 4; ++m) {
                uint32_t a[4];
                scores.load_a(a, 16 * m, 16 * key_tile, lane);
                mma(sums[m][0], a, b[0], b[1]);
                mma(sums[m][1], a, b[2], b[3]);
            }
        }
        uint16_t* chunk_out = at(p.out, p.out_stride, head(), start()) + 16 * warp + 2 * (lane % 4);
        float* chunk_denominator = p.denominator + batch_head() * p.length + start();
        const int num_rows = chunk + 1 < p.num_chunks ? kChunk : static_cast<int>(p.length - start());
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = 16 * m + lane / 4 + 8 * r;
                if (row >= num_rows) continue;
                float d = row_sums[row] + p.eps;
                if (kColumnGroups == 2) d += row_sums[kChunk + row];
                const float one_over_d = 1.0f / d;
                uint16_t* to = chunk_out + row * p.out_stride.token;
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    *reinterpret_cast<uint32_t*>(to + 8 * n) =
                        pack_bf16(sums[m][n][2 * r] * one_over_d, sums[m][n][2 * r + 1] * one_over_d);
                if (warp == 0 && lane % 4 == 0) chunk_denominator[row] = d;
            }
    }

    // Only keys of the run that goes on after the chunk enter the state. φ(k) has served the scores by now.
    __device__ __forceinline__ void hide_keys_of_earlier_runs() const {
        const int32_t last_run = run_at_end();
        for (int index = thread_index(); index < kChunk * kFeatures / 2; index += kThreads) {
            const int row = index / (kFeatures / 2), column = index % (kFeatures / 2) * 2;
            if (chunk_runs[row] != last_run) phi_k.pair(row, column) = 0u;
        }
    }

    // Sᵀ += vᵀ φ(k) and z += Σ φ(k), from zero where a border lies between the state and the chunk's end.
    __device__ __forceinline__ void advance_state() {
        const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
        const bool survives = p.runs == nullptr || run_before() == run_at_end();
        if (!survives) {
#pragma unroll
            for (int n = 0; n < kFeatures / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) state.value[n][i] = 0.0f;
        }
        // Each warp sums the keys of its share of the features; the B operands hold all it needs.
        constexpr int kShare = kFeatures / 16 / kWarps;
        float sums[kShare][2] = {};
#pragma unroll 1
        for (int token = 0; token < kChunk; token += 16) {
            uint32_t a[4];
            values.load_a_transposed(a, 16 * warp, token, lane);
#pragma unroll
            for (int f = 0; f < kFeatures; f += 16) {
                uint32_t b[4];
                phi_k.load_b(b, token, f, lane);
                mma(state.value[f / 8], a, b[0], b[1]);
                mma(state.value[f / 8 + 1], a, b[2], b[3]);
                if (f / 16 / kShare == warp) {
                    float(&sum)[2] = sums[f / 16 % kShare];
                    sum[0] += low_bf16(b[0]) + high_bf16(b[0]) + low_bf16(b[1]) + high_bf16(b[1]);
                    sum[1] += low_bf16(b[2]) + high_bf16(b[2]) + low_bf16(b[3]) + high_bf16(b[3]);
                }
            }
        }
#pragma unroll
        for (int share = 0; share < kShare; ++share)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = quad_sum(sums[share][half]);
                float& total = k_sum[16 * (warp * kShare + share) + 8 * half + lane / 4];
                if (lane % 4 == 0) total = (survives ? total : 0.0f) + sum;
            }
    }

    const ForwardParameters& p;
    int chunk = 0;
    Tile<kProjected> weight_q, weight_k;
    Tile<kHeadDim> raw_q, raw_k, values;
    Tile<kFeatures> phi_q, phi_k;
    Tile<kChunk> scores;
    float *k_sum, *row_sums;
    int32_t *chunk_runs, *chunk_real;
    StateFragment<kHeadDim, kFeatures> state;
};

template <int kHeadDim, int kFeatures, bool kFused>
__global__ void __launch_bounds__(ForwardLayout<kHeadDim, kFeatures, kFused>::kThreads, 1)
    linear_attention_forward(const __grid_constant__ ForwardParameters parameters) {
    ForwardBlock<kHeadDim, kFeatures, kFused>(parameters).run();
}

}  // namespace hedgehog
