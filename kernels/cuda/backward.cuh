// Causal linear attention, backward: what its two sweeps share. See backward_queries.cuh and backward_keys.cuh.
//
// With dn = do/d and dd = −dn·o, and R = Σ φ(q) dnᵀ, r = Σ dd φ(q) over the tokens after a chunk, as R and r are to S and z:
//
//     dφ(q) = tril(dn vᵀ + dd) φ(k) + dn Sᵀ + dd z        forwards, S and z advancing       (backward_queries.cuh)
//     dφ(k) = tril(dn vᵀ + dd)ᵀ φ(q) + v Rᵀ + r           backwards, R and r advancing      (backward_keys.cuh)
//     dv    = tril(φ(q) φ(k)ᵀ)ᵀ dn + φ(k) R
//
// Numerics. dφ is a small difference of two large sums as soon as the values share a mean. All of it is unchanged if v
// becomes v − μ for any μ and dd becomes dd + dn·μ. Here μ is a mean of values: dn (v − μ), S − z μᵀ and r + R μ are
// taken in float, before anything is rounded to bf16. In the first sweep it is the mean of all values so far: that of a
// chunk alone, an eighth of their spread off, would leave a part in S − z μᵀ that grows with the length. dd is not taken from o, whose rounding would
// remain there alone, but from the sums that it is to cancel: φ(q)·dφ(q) is 0, because o does not change with the length
// of φ(q). dn is rounded to bf16 once, and the rounded dn is what every sum sees.
//
// Work. A block has eight warps and takes one slice of the values (all of them, or half where the state would not fit
// into registers beside dW): dq, dk and the weights' gradients are sums over slices, dv is not. Each warp holds its features'
// rows of the state, for all values of the slice: sixteen or thirty-two features, of each projected column both signs, so that
// a lane has all it needs to go from dφ to dz. The fragments of the state are B operands at the same time (forward.cuh).
//
// "Whole": at D = 128, F = 256 the registers hold the state for all values if they need not hold dW. Then the sweeps leave dz
// where dq and dk will be, and a kernel of its own makes dq, dk and dW of it (backward_inputs.cuh). That takes 211 KiB of
// shared memory, which an A100 does not give, and a key head for each query head: a sum over heads cannot wait in the place of
// one addend. It leaves room for raw q and k a chunk ahead.
//
// "wgmma" (sm_90a): the same, but x W, the state's advance and dv are products of a warpgroup, on operands in shared memory. The
// tiles lie in panels then, φ's two signs of eight columns side by side: a warpgroup's product φᵀ x gives each of its warps
// one pair, in the same lanes as mma.sync does, so that everything from the state to dz stays as it is, on mma.sync.
//
// On paper, in FLOP a token and head at D = V = 128 (of a chunk's scores 5/8 are computed, the tiles up to the diagonal):
//
//                         F = 128    F = 256, two slices    whole
//     φ(q), φ(k) again      33 k       66 k × 2              66 k    z = x W
//     first sweep          129 k      177 k × 2             182 k    dn vᵀ, its products with φ(k) and 1, dn Sᵀ, S (dq, dW_q)
//     φ(q), φ(k) again      33 k       66 k × 2              66 k
//     second sweep         172 k      215 k × 2             258 k    two triangles, dv, dφ(k), R (dk, dW_k)
//     afterwards                                            131 k    dq, dW_q, dk, dW_k
//     in all               367 k     1048 k                 703 k
//
// At F = 128 that is less arithmetic than the limit by memory allows. At F = 256 the slices repeat φ, the products with
// features and the weights' gradients: 1.4 times what one pass would need. Nothing is repeated where the values are whole;
// dz goes to memory and comes back instead, with x once more (backward_inputs.cuh).
#pragma once

#include <type_traits>

#include "backward_inputs.cuh"
#include "feature_map.cuh"
#include "primitives_hopper.cuh"

namespace hedgehog {

struct BackwardParameters {
    const uint16_t *q, *k, *v, *weight_q, *weight_k, *grad_out;
    const uint8_t* mask;
    const int32_t* runs;
    const float *denominator, *initial_kv, *initial_k_sum, *grad_final_kv, *grad_final_k_sum;
    uint16_t *grad_q, *grad_k, *grad_v;
    float *grad_weight_q, *grad_weight_k;            // (B, segments, H, D, P)
    float *grad_initial_kv, *grad_initial_k_sum;     // of S and z; or null
    float* grad_denominator;                         // dd (slices, B, H, T), from the one sweep to the other: backward.cu
    float* segment_states;                           // forwards as in forward.cuh; backwards (slices, B, H, segments - 1, ·)
    HedgehogStrides q_stride, k_stride, v_stride, grad_out_stride, grad_q_stride, grad_k_stride, grad_v_stride;
    HedgehogStrides grad_denominator_stride;
    int64_t grad_denominator_slice, length;
    int32_t num_chunks, chunks_per_segment, batch, heads, group, feature_map, segments;  // group: heads / kv_heads
    int32_t slice;       // of the values
    int32_t member;      // of the query heads that share a key head; launches of members follow each other
    float eps;
    int32_t kernel;      // HedgehogBackwardKernel
    bool state_only;     // the pass that only fills segment_states, each segment from zero
};

template <int kHeadDim_, int kFeatures_, bool kFused_, int kKernel>
struct BackwardShape {
    static constexpr int kHeadDim = kHeadDim_, kFeatures = kFeatures_, kProjected = kFeatures / 2;
    static constexpr int kKernelNumber = kKernel;
    static constexpr bool kFused = kFused_, kWgmma = kKernel == HEDGEHOG_WHOLE_WGMMA;
    static constexpr bool kWhole = kWgmma || kKernel == HEDGEHOG_WHOLE;
    static_assert(!kWhole || (kFused && kProjected <= kHeadDim), "dz waits where dq and dk will be");
    static constexpr int kWarps = 8, kThreads = 32 * kWarps;
    static constexpr int kSlice = kFeatures == 256 && !kWhole ? 64 : kHeadDim, kSlices = kHeadDim / kSlice;
    static constexpr int kPairs = kFeatures / 128;  // of eight features: a warp's share
    // Where φ's two signs of eight projected columns lie, a pair of units: halves apart, or with wgmma side by side, so that
    // the features of a warpgroup are a panel. Given features come in pairs of neighbours too.
    static constexpr bool kSideBySide = !kFused || kWgmma;
    static constexpr int kGap = kSideBySide ? 1 : kProjected / kUnit;  // units between the two of a pair
    static constexpr int kStateSize = kFeatures * (kSlice + 1);   // of one segment's R and r

    template <int kColumns, int kRows>
    using Matrix = Tile<kColumns, kWgmma ? kRows : 0>;
    using Weight = Matrix<kFused ? kProjected : 64, kHeadDim>;
    using Input = Matrix<kHeadDim, kChunk>;
    using Phi = Matrix<kFeatures, kChunk>;
    using Slice = Matrix<kSlice, kChunk>;
    using Scores = Matrix<kChunk, kChunk>;

    static constexpr int kWeightBytes = kFused ? Tile<kProjected>::bytes(kHeadDim) : 0;
    static constexpr int kInputBytes = Tile<kHeadDim>::bytes(kChunk);
    static constexpr int kPhiBytes = Tile<kFeatures>::bytes(kChunk);
    static constexpr int kRawBytes = kFused && !kWhole ? 2 * kInputBytes : 0;
    static constexpr int kSliceBytes = Tile<kSlice>::bytes(kChunk);
    static constexpr int kScoresBytes = Tile<kChunk>::bytes(kChunk);
    // Where things lie in shared memory, as far as both sweeps have them. Raw q and k are where φ(q) will be; with all the
    // values they have a place of their own, so that they can come a chunk ahead.
    static constexpr int kWeightQ = 0, kWeightK = kWeightBytes;
    static constexpr int kRawQ = 2 * kWeightBytes, kRawK = kRawQ + kInputBytes;
    static constexpr int kPhiQ = kWhole ? kRawK + kInputBytes : kRawQ;
    static constexpr int kPhiK = kPhiQ + (kRawBytes > kPhiBytes ? kRawBytes : kPhiBytes);
    static constexpr int kValues = kPhiK + kPhiBytes;
    static constexpr int kGrads = kValues + kSliceBytes;
    static constexpr int kGradScores = kGrads + kSliceBytes;
    static constexpr int kMarks = kGradScores + kScoresBytes;
    static constexpr int kShifts = kMarks + 4 * kChunk;
    static constexpr int kCommonBytes = kShifts + 4 * kChunk;
    static constexpr int kMostBytes = (kWhole ? 227 : 163) * 1024;  // what a block gets of an H100, and of an A100
};

// One block's view of its row, head and segment, and the steps that both sweeps take.
template <class Shape_>
class BackwardBlock {
   protected:
    using Shape = Shape_;
    static constexpr int kHeadDim = Shape::kHeadDim, kFeatures = Shape::kFeatures, kProjected = Shape::kProjected;
    static constexpr int kSlice = Shape::kSlice, kPairs = Shape::kPairs, kGap = Shape::kGap;
    static constexpr int kThreads = Shape::kThreads, kWarps = Shape::kWarps;
    static constexpr bool kFused = Shape::kFused, kWhole = Shape::kWhole, kWgmma = Shape::kWgmma;
    using Weight = typename Shape::Weight;
    using Input = typename Shape::Input;
    using Phi = typename Shape::Phi;
    using Slice = typename Shape::Slice;
    using Scores = typename Shape::Scores;

    __device__ __forceinline__ explicit BackwardBlock(const BackwardParameters& parameters) : p(parameters) {
        unsigned char* shared = dynamic_shared_memory();
        weight_q.data = reinterpret_cast<uint16_t*>(shared + Shape::kWeightQ);
        weight_k.data = reinterpret_cast<uint16_t*>(shared + Shape::kWeightK);
        raw_q.data = reinterpret_cast<uint16_t*>(shared + Shape::kRawQ);
        raw_k.data = reinterpret_cast<uint16_t*>(shared + Shape::kRawK);
        phi_q.data = reinterpret_cast<uint16_t*>(shared + Shape::kPhiQ);
        phi_k.data = reinterpret_cast<uint16_t*>(shared + Shape::kPhiK);
        values.data = reinterpret_cast<uint16_t*>(shared + Shape::kValues);
        grads.data = reinterpret_cast<uint16_t*>(shared + Shape::kGrads);
        grad_scores.data = reinterpret_cast<uint16_t*>(shared + Shape::kGradScores);
        marks = reinterpret_cast<int32_t*>(shared + Shape::kMarks);
        shifts = reinterpret_cast<float*>(shared + Shape::kShifts);
    }

    __device__ __forceinline__ static int warp() { return thread_index() / 32; }
    __device__ __forceinline__ static int lane() { return thread_index() % 32; }
    __device__ __forceinline__ static int member_of_quad() { return thread_index() % 4; }
    __device__ __forceinline__ static int64_t row() { return block_z(); }
    __device__ __forceinline__ static int segment() { return block_x(); }
    __device__ __forceinline__ int first_chunk() const { return segment() * p.chunks_per_segment; }
    __device__ __forceinline__ int stop_chunk() const {
        const int whole = (segment() + 1) * p.chunks_per_segment;
        return whole < p.num_chunks ? whole : p.num_chunks;
    }
    __device__ __forceinline__ int64_t start() const { return int64_t(chunk) * kChunk; }
    __device__ __forceinline__ int num_rows() const {
        return chunk + 1 < p.num_chunks ? kChunk : static_cast<int>(p.length - start());
    }
    __device__ __forceinline__ int64_t batch_head(int64_t head) const { return row() * p.heads + head; }
    __device__ __forceinline__ const uint8_t* mask() const { return p.mask ? p.mask + row() * p.length : nullptr; }
    __device__ __forceinline__ const int32_t* runs() const { return p.runs + row() * p.length; }
    __device__ __forceinline__ int32_t run_before() const { return runs()[chunk > 0 ? start() - 1 : 0]; }
    __device__ __forceinline__ int32_t run_at_end() const {
        return runs()[(chunk + 1 < p.num_chunks ? start() + kChunk : p.length) - 1];
    }
    __device__ __forceinline__ bool survives() const { return p.runs == nullptr || run_before() == run_at_end(); }
    __device__ __forceinline__ bool sees_state(int row) const {
        return p.runs == nullptr || marks[row] >> 1 == run_before();
    }
    __device__ __forceinline__ bool enters_state(int row) const {
        return p.runs == nullptr || marks[row] >> 1 == run_at_end();
    }
    __device__ __forceinline__ bool is_real(int row) const { return marks[row] & 1; }
    __device__ __forceinline__ bool sees(int row, int column) const {
        return column <= row && (p.runs == nullptr || marks[row] >> 1 == marks[column] >> 1);
    }
    template <class Element>
    __device__ __forceinline__ static Element* at(Element* data, const HedgehogStrides& stride, int64_t head,
                                                  int64_t token) {
        return data + row() * stride.batch + head * stride.head + token * stride.token;
    }
    // dd of the chunk's first token; of the others, a token's stride further.
    __device__ __forceinline__ float* grad_denominators(int64_t head) const {
        return at(p.grad_denominator, p.grad_denominator_stride, head, start()) + p.slice * p.grad_denominator_slice;
    }
    // A warp's pairs of units. With wgmma a product gives each warp of a warpgroup one pair, so that a panel has four.
    __device__ __forceinline__ static int pair_of(int j) {
        return kWgmma ? 4 * (warp() / 4 * kPairs + j) + warp() % 4 : warp() * kPairs + j;
    }
    // The first of a pair's units in φ's tile; the other lies kGap units after it.
    __device__ __forceinline__ static int unit_of(int j) { return (Shape::kSideBySide ? 2 : 1) * pair_of(j); }
    // The first column of a pair's unit in φ's tile.
    __device__ __forceinline__ static int place_of(int j, int half) { return kUnit * (unit_of(j) + half * kGap); }
    // The first of the eight features that it holds.
    __device__ __forceinline__ static int feature_of(int j, int half) {
        return kUnit * (kFused ? pair_of(j) + half * (kProjected / kUnit) : 2 * pair_of(j) + half);
    }

    // What was written to shared memory may be read by wgmma after the next barrier.
    __device__ __forceinline__ static void hand_to_products() {
        if constexpr (kWgmma) fence_async_proxy();
    }

    template <int kColumns, int kRows>
    __device__ __forceinline__ static Panels<kRows, kColumns> operand(Tile<kColumns, kRows> tile) {
        return {static_cast<int>(reinterpret_cast<unsigned char*>(tile.data) - dynamic_shared_memory())};
    }

    __device__ __forceinline__ void copy_weights(int64_t head) const {
        const int64_t offset = head * kHeadDim * kProjected;
        const auto all = [](int) { return true; };
        weight_q.template copy_rows<kHeadDim, kThreads>(p.weight_q + offset, kProjected, all);
        weight_k.template copy_rows<kHeadDim, kThreads>(p.weight_k + offset, kProjected, all);
    }

    // Rows of `from_chunk` into a tile; those beyond the end become zeros.
    template <int kColumns, int kRows>
    __device__ __forceinline__ void copy_chunk(Tile<kColumns, kRows> tile, const uint16_t* source,
                                               const HedgehogStrides& stride, int64_t head, int from_chunk,
                                               int offset = 0) const {
        const int64_t from = int64_t(from_chunk) * kChunk, left = p.length - from;
        tile.template copy_rows<kChunk, kThreads>(at(source, stride, head, from) + offset, stride.token,
                                                  [left](int row) { return row < left; });
    }

    __device__ __forceinline__ void copy_inputs(int64_t head, int64_t kv_head, int from_chunk) const {
        if constexpr (kFused) {
            copy_chunk(raw_q, p.q, p.q_stride, head, from_chunk);
            copy_chunk(raw_k, p.k, p.k_stride, kv_head, from_chunk);
        } else {
            copy_chunk(phi_q, p.q, p.q_stride, head, from_chunk);
            const int64_t from = int64_t(from_chunk) * kChunk, left = p.length - from;
            const uint8_t* mask_from = p.mask ? mask() + from : nullptr;
            phi_k.template copy_rows<kChunk, kThreads>(
                at(p.k, p.k_stride, head, from), p.k_stride.token,
                [left, mask_from](int row) { return row < left && (mask_from == nullptr || mask_from[row]); });
        }
        copy_async_commit();
    }

    __device__ __forceinline__ void copy_values_and_grads(int64_t head, int64_t kv_head, int from_chunk) const {
        copy_chunk(values, p.v, p.v_stride, kv_head, from_chunk, p.slice * kSlice);
        copy_chunk(grads, p.grad_out, p.grad_out_stride, head, from_chunk, p.slice * kSlice);
        copy_async_commit();
    }

    // Whether each row is a real token, and its run.
    __device__ __forceinline__ void read_marks() const {
        const int thread = thread_index();
        if (thread >= kChunk) return;
        const int64_t token = start() + thread;
        const bool exists = token < p.length, real = exists && (p.mask == nullptr || mask()[token]);
        marks[thread] = (p.runs && exists ? runs()[token] << 1 : 0) | (real ? 1 : 0);
    }

    // μ, the mean of the chunk's values; with `totals`, of all values so far, `count` of them.
    __device__ __forceinline__ void find_mean(float* mean, float* totals, float count) const {
        if (warp() >= kSlice / 16) return;
        constexpr uint32_t kOnes = 0x3f803f80u;
        const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
        float sums[2][4] = {};
#pragma unroll
        for (int token = 0; token < kChunk; token += 16) {
            uint32_t b[4];
            values.load_b(b, token, 16 * warp(), lane());
            mma(sums[0], ones, b[0], b[1]);
            mma(sums[1], ones, b[2], b[3]);
        }
        if (lane() >= 4) return;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = 16 * warp() + 8 * n + 2 * lane() + i;
                const float total = sums[n][i] + (totals ? totals[column] : 0.0f);
                if (totals) totals[column] = total;
                mean[column] = total / count;
            }
    }

    // dn = do/d takes the place of do, and dn·μ goes to `shifts`. A row that sees no key has no gradient. With kCentred
    // v − μ takes the place of v.
    template <bool kCentred>
    __device__ __forceinline__ void divide_grads(const float* mean, int64_t head) const {
        constexpr int kShare = kSlice / kUnit / 4;  // units: four lanes have a row
        static_assert(kShare % 2 == 0, "units come in twos");
        const int token_row = thread_index() / 4;
        const float d = token_row < num_rows() ? p.denominator[batch_head(head) * p.length + start() + token_row] : 0.0f;
        const float one_over_d = d <= p.eps ? 0.0f : 1.0f / d;
        const auto divided = [one_over_d](uint32_t dn) {
            return one_over_d == 0.0f ? 0u : pack_bf16(low_bf16(dn) * one_over_d, high_bf16(dn) * one_over_d);
        };
        float shift = 0.0f;
#pragma unroll 1
        for (int i = 0; i < kShare; ++i) {
            // Eight lanes take 16 bytes each at a time, of two rows: in the second they begin elsewhere, so that all banks serve.
            const int unit = 4 * (i ^ (token_row & 1)) + member_of_quad();
            decltype(auto) place = grads.eight(token_row, unit);
            const uint4 raw = place;
            const uint32_t dn[4] = {divided(raw.x), divided(raw.y), divided(raw.z), divided(raw.w)};
            place = uint4{dn[0], dn[1], dn[2], dn[3]};
#pragma unroll
            for (int c = 0; c < 4; ++c)
                shift += low_bf16(dn[c]) * mean[unit * kUnit + 2 * c] + high_bf16(dn[c]) * mean[unit * kUnit + 2 * c + 1];
            if constexpr (kCentred) {
                decltype(auto) values_place = values.eight(token_row, unit);
                const uint4 v = values_place;
                const auto centred = [&](uint32_t pair, int c) {
                    return pack_bf16(low_bf16(pair) - mean[unit * kUnit + c], high_bf16(pair) - mean[unit * kUnit + c + 1]);
                };
                values_place = uint4{centred(v.x, 0), centred(v.y, 2), centred(v.z, 4), centred(v.w, 6)};
            }
        }
        shift = quad_sum(shift);
        if (member_of_quad() == 0) shifts[token_row] = shift;
    }

    // φ(k) and φ(q), sixteen rows in each warp. Raw q and k are used up when `fetch` is called. kKept: see `activate`.
    template <bool kKept, class Fetch>
    __device__ __forceinline__ void make_features(bool keys_too, Fetch fetch) const {
        const int first_row = 16 * (warp() % 4);
        const bool is_key = warp() >= 4, wanted = keys_too || !is_key;
        float z[kProjected / 8][4];
        if constexpr (kWgmma) {
            if (wanted) project_chunk(z, is_key ? raw_k : raw_q, is_key ? weight_k : weight_q);
        } else {
            if (wanted)
                project<kHeadDim, kProjected>(z, is_key ? raw_k : raw_q, first_row, is_key ? weight_k : weight_q);
        }
        __syncthreads();  // all have read q and k
        fetch();
        if (!wanted) return;
        const bool keep[2] = {!is_key || is_real(first_row + lane() / 4), !is_key || is_real(first_row + lane() / 4 + 8)};
        // not a choice between two tiles: the compiler is to see that this is shared memory
        const Phi phi{reinterpret_cast<uint16_t*>(dynamic_shared_memory() + (is_key ? Shape::kPhiK : Shape::kPhiQ))};
        if constexpr (kWgmma)
            activate<kProjected, kKept>(z, p.feature_map, is_key, keep, SideBySide{phi}, first_row);
        else
            activate<kProjected, kKept>(z, p.feature_map, is_key, keep, phi, first_row);
    }

    // φ's tile by feature.
    struct SideBySide {
        Phi phi;
        __device__ __forceinline__ decltype(auto) pair(int row, int feature) const {
            const int half = feature / kProjected, column = feature % kProjected;
            return phi.pair(row, (2 * (column / kUnit) + half) * kUnit + column % kUnit);
        }
    };

    // z = x W of the chunk, by a warpgroup.
    __device__ __forceinline__ static void project_chunk(float (&z)[kProjected / 8][4], Input x, Weight weight) {
        fence_registers();
#pragma unroll
        for (int d = 0; d < kHeadDim; d += 16)
            multiply<false, true>(z, k_major(operand(x), d), mn_major(operand(weight), d, 0), d > 0);
        commit_products();
        wait_products<0>();
        settle(z);
    }

    // tril(x yᵀ + shift) of the rows' own shift, in bf16; x and y are tiles of kColumns.
    template <class Rows, int kColumns = 8 * Rows::kUnits>
    __device__ __forceinline__ void multiply_visible(Rows x, Rows y, const float* shift, float sign,
                                                     Scores product) const {
        const int row_tile = warp() % 4, group = warp() / 4;
        float sums[2][2][4] = {};
#pragma unroll 1
        for (int column = 0; column < kColumns; column += 16) {
            uint32_t a[4];
            x.load_a(a, 16 * row_tile, column, lane());
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column_tile = group + 2 * i;
                if (column_tile > row_tile) continue;
                uint32_t b[4];
                y.load_b_transposed(b, column, 16 * column_tile, lane());
                mma(sums[i][0], a, b[0], b[1]);
                mma(sums[i][1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * row_tile + lane() / 4 + 8 * r;
            const float add = shift ? sign * shift[row] : 0.0f;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int column_tile = group + 2 * i;
                    if (column_tile > row_tile) continue;
                    const int column = 16 * column_tile + 8 * n + 2 * member_of_quad();
                    product.pair(row, column) =
                        pack_bf16(sees(row, column) ? sums[i][n][2 * r] + add : 0.0f,
                                  sees(row, column + 1) ? sums[i][n][2 * r + 1] + add : 0.0f);
                }
        }
    }

    // state += φᵀ x over the chunk, and sums += Σ weight φ: a lane of each quad has its part of the sum.
    __device__ __forceinline__ void advance(Phi phi, Slice x, const float* weight, float (&sums)[kPairs][2]) {
        if constexpr (kWgmma) start_advance(phi, x);
#pragma unroll 1
        for (int token = 0; token < kChunk; token += 16) {
            float w[4] = {1.0f, 1.0f, 1.0f, 1.0f};
            if (weight) {
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = weight[token + 2 * member_of_quad() + (i & 1) + 8 * (i >> 1)];
            }
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t a[4];
                phi.load_a_transposed(a, kUnit * unit_of(j), token, lane(), kGap);
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    sums[j][half] += low_bf16(a[half]) * w[0] + high_bf16(a[half]) * w[1] +
                                     low_bf16(a[half + 2]) * w[2] + high_bf16(a[half + 2]) * w[3];
                if constexpr (!kWgmma) {
#pragma unroll
                    for (int v = 0; v < kSlice; v += 16) {
                        uint32_t b[4];
                        x.load_b(b, token, v, lane());
                        mma(state[j][v / 8], a, b[0], b[1]);
                        mma(state[j][v / 8 + 1], a, b[2], b[3]);
                    }
                }
            }
        }
        if constexpr (kWgmma) finish_advance();
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) sums[j][half] = quad_sum(sums[j][half]);
    }

    // The products of `advance`, each of a warpgroup's panels of features by itself.
    __device__ __forceinline__ void start_advance(Phi phi, Slice x) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) settle(state[j]);
        fence_registers();
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int token = 0; token < kChunk; token += 16)
                multiply<true, true>(state[j],
                                     mn_major(operand(phi), token, kPanelColumns * (warp() / 4 * kPairs + j)),
                                     mn_major(operand(x), token, 0), true);
        commit_products();
    }

    __device__ __forceinline__ void finish_advance() {
        wait_products<0>();
#pragma unroll
        for (int j = 0; j < kPairs; ++j) settle(state[j]);
    }

    __device__ __forceinline__ void clear_state() {
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int n = 0; n < kSlice / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) state[j][n][i] = 0.0f;
    }

    // Rows of φ whose run is not `run` become zeros.
    __device__ __forceinline__ void hide_other_runs(Phi phi, int32_t run) const {
        for (int index = thread_index(); index < kChunk * kFeatures / 2; index += kThreads) {
            const int row = index / (kFeatures / 2), column = index % (kFeatures / 2) * 2;
            if (marks[row] >> 1 != run) phi.pair(row, column) = 0u;
        }
        hand_to_products();
    }

    // The lane's share of a state in global memory: (F, columns), of which the slice begins at `source`.
    template <class Visit>
    __device__ __forceinline__ void visit_state(Visit visit) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int feature = feature_of(j, half) + lane() / 4;
#pragma unroll
                for (int n = 0; n < kSlice / 8; ++n)
                    visit(feature, 8 * n + 2 * member_of_quad(), state[j][n][2 * half], state[j][n][2 * half + 1]);
            }
    }

    // One row's dz from dφ: the softmaxes' Jacobian with their sums s = Σ φ dφ, or the exponential's derivative.
    __device__ __forceinline__ float through_map(bool is_key, float plus, float minus, float grad_plus, float grad_minus,
                                                 float s_plus, float s_minus) const {
        if (is_key && p.feature_map == HEDGEHOG_EXP) {
            // exp(±b(z)) with b' = 1/(1 + excess) beyond the bound, where 1 + excess = exp(|b| − bound)
            const float bend = exp2_approximate(kKeyExponentBound * kLog2E) * fminf(plus, minus);
            return fminf(bend, 1.0f) * (plus * grad_plus - minus * grad_minus);
        }
        const float z = plus * (grad_plus - s_plus) - minus * (grad_minus - s_minus);
        return p.feature_map == HEDGEHOG_JOINT ? 2.0f * z : z;
    }

    // dz, which lies in the first unit of each pair, to where dx will be.
    __device__ __forceinline__ void write_projected_gradient(Phi dz, uint16_t* to, int64_t row_stride) const {
        constexpr int kUnits = kProjected / kUnit;
#pragma unroll 1
        for (int index = thread_index(); index < kChunk * kUnits; index += kThreads) {
            const int row = index / kUnits, column_unit = index % kUnits;
            if (row < num_rows())
                *reinterpret_cast<uint4*>(to + row * row_stride + column_unit * kUnit) =
                    dz.eight(row, (Shape::kSideBySide ? 2 : 1) * column_unit);
        }
    }

    // Where φ was given: dφ itself, which lies in φ's place.
    __device__ __forceinline__ void write_feature_gradient(Phi grad, uint16_t* to, int64_t row_stride,
                                                           bool add) const {
        for (int index = thread_index(); index < kChunk * kFeatures / 2; index += kThreads) {
            const int row = index / (kFeatures / 2), column = index % (kFeatures / 2) * 2;
            if (row >= num_rows()) continue;
            const uint32_t pair = grad.pair(row, column);
            add_pair(to + row * row_stride + column, low_bf16(pair), high_bf16(pair), add);
        }
    }

    __device__ __forceinline__ int64_t weight_offset(int64_t head) const {
        return ((row() * p.segments + segment()) * p.heads + head) * (kHeadDim * kProjected);
    }

    const BackwardParameters& p;
    int chunk = 0;
    Weight weight_q, weight_k;
    Input raw_q, raw_k;
    Phi phi_q, phi_k;
    Slice values, grads;
    Scores grad_scores;  // tril(dn vᵀ + dd), or without dd
    int32_t* marks;            // run << 1 | is it a real token
    float* shifts;             // dn·μ of each row
    float state[kPairs][kSlice / 8][4];
    struct Nothing {};
    std::conditional_t<kFused && !kWhole, ProjectionGradients<kHeadDim, kProjected, kFeatures>, Nothing> projection;
};

}  // namespace hedgehog
