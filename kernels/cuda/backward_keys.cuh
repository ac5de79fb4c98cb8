// Backward, second sweep: chunk after chunk from the end, with R and r. Gives dk, dv, dW_k, and the initial state's.
//
// The values become v − μ where they lie, and the rows' dd becomes dd + dn·μ (backward.cuh). R is needed a second time with
// its features as the sum's index, for φ(k) R: a bf16 copy goes to shared memory, if need be over W_q, with all values over
// W_k too, which are fetched again. dz takes the place of φ(k). Raw k comes a second time, for dW, into the place of φ(q).
#pragma once

#include "backward.cuh"

namespace hedgehog {

template <int kHeadDim, int kFeatures, bool kFused, int kKernel>
struct KeyLayout : BackwardShape<kHeadDim, kFeatures, kFused, kKernel> {
    using Shape = BackwardShape<kHeadDim, kFeatures, kFused, kKernel>;
    static constexpr int kStateBytes = Tile<Shape::kSlice>::bytes(kFeatures);
    static constexpr bool kStateOverWeight = kFused && kHeadDim == 128 && kFeatures == 256;
    static constexpr int kState = kStateOverWeight ? Shape::kWeightQ : Shape::kCommonBytes;
    static_assert(!kStateOverWeight || kStateBytes <= (Shape::kWhole ? 2 : 1) * Shape::kWeightBytes, "R fits where W is");
    static constexpr int kAfterState = Shape::kCommonBytes + (kStateOverWeight ? 0 : kStateBytes);
    static constexpr int kScores = Shape::kWgmma ? (kAfterState + 1023) / 1024 * 1024 : kAfterState;
    static constexpr int kGradDenominator = kScores + Shape::kScoresBytes;
    static constexpr int kShiftedSum = kGradDenominator + 4 * kChunk;  // r + R μ
    static constexpr int kRowSums = kShiftedSum + 4 * kFeatures;       // 8 warps × 16 rows × 2; before that μ
    static constexpr int kBytes = kRowSums + 4 * 2 * 16 * Shape::kWarps;
    static_assert(kBytes <= Shape::kMostBytes, "shared memory of a block");
    static_assert(Shape::kSlice <= 2 * 16 * Shape::kWarps, "μ fits");
};

template <int kHeadDim, int kFeatures, bool kFused, int kKernel>
class KeyGradients : BackwardBlock<BackwardShape<kHeadDim, kFeatures, kFused, kKernel>> {
    using Layout = KeyLayout<kHeadDim, kFeatures, kFused, kKernel>;
    using Block = BackwardBlock<BackwardShape<kHeadDim, kFeatures, kFused, kKernel>>;
    static constexpr bool kProjects = kFused && !Layout::kWhole;
    using Block::chunk;
    using Block::grads;
    using Block::kGap;
    using Block::kPairs;
    using Block::kProjected;
    using Block::kSlice;
    using Block::kThreads;
    using Block::kWgmma;
    using Block::kWhole;
    using Block::lane;
    using Block::p;
    using Block::phi_k;
    using Block::phi_q;
    using Block::state;
    using Block::values;
    using Block::warp;
    using Sums = float[kPairs][2][4];

   public:
    __device__ __forceinline__ explicit KeyGradients(const BackwardParameters& parameters) : Block(parameters) {
        unsigned char* shared = dynamic_shared_memory();
        state_copy.data = reinterpret_cast<uint16_t*>(shared + Layout::kState);
        scores.data = reinterpret_cast<uint16_t*>(shared + Layout::kScores);
        grad_denominator = reinterpret_cast<float*>(shared + Layout::kGradDenominator);
        shifted_sum = reinterpret_cast<float*>(shared + Layout::kShiftedSum);
        mean = row_sums = reinterpret_cast<float*>(shared + Layout::kRowSums);
        raw_k_again.data = phi_q.data;
    }

    __device__ __forceinline__ void run() {
        if constexpr (kWgmma) use_async_proxy();
        if (p.state_only && this->segment() == 0) return;  // nothing comes before the first
        load_state();
        if constexpr (kProjects) this->projection.clear();
        if constexpr (kWgmma) clear_scores();
        chunk = this->stop_chunk() - 1;
        if constexpr (kFused) this->copy_weights(head());
        this->copy_values_and_grads(head(), kv_head(), chunk);
        this->copy_inputs(head(), kv_head(), chunk);
#pragma unroll 1
        for (; chunk >= this->first_chunk(); --chunk) {
            const int next = chunk > this->first_chunk() ? chunk - 1 : chunk;  // at the end once more, for nothing
            this->read_marks();
            read_grad_denominator();
            copy_async_wait<0>();
            this->hand_to_products();
            __syncthreads();
            this->find_mean(mean, nullptr, this->num_rows());
            if constexpr (kFused)
                this->template make_features<(kProjected <= 64)>(!p.state_only, [&] {  // a barrier inside
                    if constexpr (kWhole) this->copy_inputs(head(), kv_head(), next);
                });
            else
                __syncthreads();
            this->template divide_grads<true>(mean, head());
            if (!p.state_only) copy_state();
            this->hand_to_products();
            __syncthreads();
            if (thread_index() < kChunk) this->shifts[thread_index()] += grad_denominator[thread_index()];
            __syncthreads();
            if (!p.state_only) {
                this->multiply_visible(phi_q, phi_k, nullptr, 0.0f, scores);
                this->hand_to_products();
                this->multiply_visible(grads, values, this->shifts, 1.0f, this->grad_scores);
                __syncthreads();
                write_value_gradient();
#pragma unroll 1
                for (int row_tile = 0; row_tile < 4; ++row_tile) {
                    differentiate_rows(row_tile);
                    // R has been read where W_q and W_k were
                    if constexpr (kWhole)
                        if (row_tile == 0) {
                            this->copy_weights(head());
                            copy_async_commit();
                        }
                }
            }
            advance_state();
            __syncthreads();
            if (!p.state_only) write_gradients();
            this->copy_values_and_grads(head(), kv_head(), next);
            if constexpr (kWhole) continue;
            __syncthreads();
            this->copy_inputs(head(), kv_head(), next);
        }
        copy_async_wait<0>();
        if (p.state_only) {
            store_state(segment_state(this->segment() - 1), kSlice, true);
            return;
        }
        if constexpr (kProjects)
            this->projection.write_weight_gradient(p.grad_weight_k + this->weight_offset(head()), p.slice > 0);
        if (p.grad_initial_kv && this->segment() == 0) store_initial_state();
    }

   private:
    // The query heads of a key head come launch by launch.
    __device__ __forceinline__ static int64_t kv_head() { return block_y(); }
    __device__ __forceinline__ int64_t head() const { return block_y() * p.group + p.member; }
    __device__ __forceinline__ static int member() { return Block::member_of_quad(); }

    __device__ __forceinline__ float* segment_state(int index) const {
        const int64_t batch_head = int64_t(p.slice) * p.batch * p.heads + this->batch_head(head());
        return p.segment_states + (batch_head * (p.segments - 1) + index) * Block::Shape::kStateSize;
    }

    // R and r after the segment. The gradient of the final z counts once, for the first slice.
    __device__ __forceinline__ void load_state() {
        const float *kv = nullptr, *sum = nullptr;
        int width = kSlice, offset = 0;
        if (!p.state_only && this->segment() + 1 < p.segments) {
            kv = segment_state(this->segment());
            sum = kv + kFeatures * kSlice;
        } else if (!p.state_only && p.grad_final_kv) {
            width = kHeadDim, offset = p.slice * kSlice;
            kv = p.grad_final_kv + this->batch_head(head()) * kFeatures * kHeadDim;
            sum = p.slice == 0 ? p.grad_final_k_sum + this->batch_head(head()) * kFeatures : nullptr;
        }
        this->visit_state([&](int feature, int column, float& left, float& right) {
            left = kv ? kv[feature * width + offset + column] : 0.0f;
            right = kv ? kv[feature * width + offset + column + 1] : 0.0f;
        });
        q_sum = sum && has_sum() ? sum[sum_feature()] : 0.0f;
    }

    // Of the sums that a quad of lanes shares, each lane keeps one: that of pair j and half h is with member 2j + h.
    __device__ __forceinline__ static bool has_sum() { return member() < 2 * kPairs; }
    __device__ __forceinline__ static int sum_feature() {
        return Block::feature_of(member() / 2, member() % 2) + lane() / 4;
    }

    __device__ __forceinline__ void store_state(float* kv, int width, bool sum_follows) {
        this->visit_state([&](int feature, int column, float left, float right) {
            kv[feature * width + column] = left;
            kv[feature * width + column + 1] = right;
        });
        if (sum_follows) store_sum(kv + kFeatures * width, false);
    }

    __device__ __forceinline__ void store_sum(float* to, bool add) const {
        if (!has_sum()) return;
        float& element = to[sum_feature()];
        element = add ? element + q_sum : q_sum;
    }

    __device__ __forceinline__ void store_initial_state() {
        const int64_t batch_head = this->batch_head(head());
        store_state(p.grad_initial_kv + batch_head * kFeatures * kHeadDim + p.slice * kSlice, kHeadDim, false);
        store_sum(p.grad_initial_k_sum + batch_head * kFeatures, p.slice > 0);
    }

    __device__ __forceinline__ void read_grad_denominator() const {
        const int thread = thread_index();
        if (thread >= kChunk) return;
        const float* from = this->grad_denominators(head()) + thread * p.grad_denominator_stride.token;
        grad_denominator[thread] = thread < this->num_rows() ? *from : 0.0f;
    }

    // R in bf16, and r + R μ.
    __device__ __forceinline__ void copy_state() const {
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int feature = this->feature_of(j, half) + lane() / 4;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < kSlice / 8; ++n) {
                    const int column = 8 * n + 2 * member();
                    const float left = state[j][n][2 * half], right = state[j][n][2 * half + 1];
                    state_copy.pair(this->place_of(j, half) + lane() / 4, column) = pack_bf16(left, right);
                    sum += left * mean[column] + right * mean[column + 1];
                }
                sum = quad_sum(sum);
                if (member() == 2 * j + half) shifted_sum[feature] = q_sum + sum;
            }
    }

    // wgmma reads the tiles above the diagonal too, which nobody writes.
    __device__ __forceinline__ void clear_scores() const {
        for (int index = thread_index(); index < kChunk * kChunk / 2; index += kThreads)
            scores.pair(index / (kChunk / 2), index % (kChunk / 2) * 2) = 0u;
    }

    // dv = tril(φ(q) φ(k)ᵀ)ᵀ dn + φ(k) R; added to what other query heads of the group gave.
    __device__ __forceinline__ void write_value_gradient() const {
        // at most thirty-two columns a warp and time: the registers hold the state already
        constexpr int kParts = kSlice == 128 && kWhole && !kWgmma ? 2 : 1, kColumns = kSlice / 2 / kParts;
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
            const int first = kColumns * (warp() / 4 * kParts + part);
            float sums[kColumns / 8][4];
            if constexpr (kWgmma)
                multiply_values(sums, first);
            else
                add_up_values<kColumns>(sums, first);
            store_values<kColumns>(sums, first);
        }
    }

    // Keys' rows that end in another run than the chunk do not see R.
    template <int kTiles>
    __device__ __forceinline__ void hide_state_from_other_runs(float (&sums)[kTiles][4]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (!this->enters_state(16 * (warp() % 4) + lane() / 4 + 8 * r))
#pragma unroll
                for (int n = 0; n < kTiles; ++n) sums[n][2 * r] = sums[n][2 * r + 1] = 0.0f;
    }

    __device__ __forceinline__ void multiply_values(float (&sums)[8][4], int first) const {
        fence_registers();
#pragma unroll
        for (int f = 0; f < kFeatures; f += 16)
            multiply<false, true>(sums, k_major(this->operand(phi_k), f), mn_major(this->operand(state_copy), f, first),
                                  f > 0);
        commit_products();
        wait_products<0>();
        settle(sums);
        if (p.runs) hide_state_from_other_runs(sums);
        settle(sums);
        fence_registers();
#pragma unroll
        for (int token = 0; token < kChunk; token += 16)
            multiply<true, true>(sums, mn_major(this->operand(scores), token, 0),
                                 mn_major(this->operand(grads), token, first), true);
        commit_products();
        wait_products<0>();
        settle(sums);
    }

    template <int kColumns>
    __device__ __forceinline__ void add_up_values(float (&sums)[kColumns / 8][4], int first) const {
        const int row_tile = warp() % 4;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
#pragma unroll 1
        for (int f = 0; f < kFeatures; f += 16) {
            uint32_t a[4];
            phi_k.load_a(a, 16 * row_tile, f, lane());
#pragma unroll
            for (int n = 0; n < kColumns / 8; n += 2) {
                uint32_t b[4];
                state_copy.load_b(b, f, first + 8 * n, lane());
                mma(sums[n], a, b[0], b[1]);
                mma(sums[n + 1], a, b[2], b[3]);
            }
        }
        if (p.runs) hide_state_from_other_runs(sums);
#pragma unroll 1
        for (int query_tile = row_tile; query_tile < 4; ++query_tile) {
            uint32_t a[4];
            scores.load_a_transposed(a, 16 * row_tile, 16 * query_tile, lane());
#pragma unroll
            for (int n = 0; n < kColumns / 8; n += 2) {
                uint32_t b[4];
                grads.load_b(b, 16 * query_tile, first + 8 * n, lane());
                mma(sums[n], a, b[0], b[1]);
                mma(sums[n + 1], a, b[2], b[3]);
            }
        }
    }

    template <int kColumns>
    __device__ __forceinline__ void store_values(const float (&sums)[kColumns / 8][4], int first) const {
        uint16_t* to = this->at(p.grad_v, p.grad_v_stride, kv_head(), this->start()) + p.slice * kSlice + first;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * (warp() % 4) + lane() / 4 + 8 * r;
            if (row >= this->num_rows()) continue;
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
                add_pair(to + row * p.grad_v_stride.token + 8 * n + 2 * member(), sums[n][2 * r], sums[n][2 * r + 1],
                         p.member > 0);
        }
    }

    // dz of sixteen keys.
    __device__ __forceinline__ void differentiate_rows(int row_tile) {
        Sums g = {};
        add_state(row_tile, g);
        add_chunk(row_tile, g);
        sum_rows(row_tile, g);
        __syncthreads();
        finish_rows(row_tile, g);
        __syncthreads();  // the sums' memory is free again
    }

    __device__ __forceinline__ void add_state(int row_tile, Sums& g) const {
#pragma unroll
        for (int v = 0; v < kSlice; v += 16) {
            uint32_t a[4];
            values.load_a(a, 16 * row_tile, v, lane());
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float *here = state[j][v / 8] + 2 * half, *there = state[j][v / 8 + 1] + 2 * half;
                    mma(g[j][half], a, pack_bf16(here[0], here[1]), pack_bf16(there[0], there[1]));
                }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool enters = this->enters_state(16 * row_tile + lane() / 4 + 8 * r);
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int feature = this->feature_of(j, half) + 2 * member() + i;
                        float& element = g[j][half][2 * r + i];
                        element = enters ? element + shifted_sum[feature] : 0.0f;
                    }
        }
    }

    __device__ __forceinline__ void add_chunk(int row_tile, Sums& g) const {
#pragma unroll 1
        for (int query_tile = row_tile; query_tile < 4; ++query_tile) {
            uint32_t a[4];
            this->grad_scores.load_a_transposed(a, 16 * row_tile, 16 * query_tile, lane());
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t b[4];
                phi_q.load_b(b, 16 * query_tile, this->place_of(j, 0), lane(), kGap);
                mma(g[j][0], a, b[0], b[1]);
                mma(g[j][1], a, b[2], b[3]);
            }
        }
    }

    __device__ __forceinline__ decltype(auto) feature_pair(int row, int j, int half) const {
        return phi_k.pair(row, this->place_of(j, half) + 2 * member());
    }

    __device__ __forceinline__ void sum_rows(int row_tile, const Sums& g) const {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
                    const uint32_t phi = feature_pair(16 * row_tile + lane() / 4 + 8 * r, j, half);
                    sum += low_bf16(phi) * g[j][half][2 * r] + high_bf16(phi) * g[j][half][2 * r + 1];
                }
                sum = quad_sum(sum);
                if (member() == 0) row_sums[2 * (16 * warp() + lane() / 4 + 8 * r) + half] = sum;
            }
    }

    __device__ __forceinline__ void finish_rows(int row_tile, const Sums& g) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * row_tile + lane() / 4 + 8 * r;
            float s_plus = 0.0f, s_minus = 0.0f;
#pragma unroll
            for (int w = 0; w < Block::kWarps; ++w) {
                s_plus += row_sums[2 * (16 * w + row - 16 * row_tile)];
                s_minus += row_sums[2 * (16 * w + row - 16 * row_tile) + 1];
            }
            if (p.feature_map == HEDGEHOG_JOINT) s_plus = s_minus = s_plus + s_minus;
            const bool keep = this->is_real(row);
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                decltype(auto) plus = feature_pair(row, j, 0);
                decltype(auto) minus = feature_pair(row, j, 1);
                const float* grad_plus = g[j][0] + 2 * r;
                const float* grad_minus = g[j][1] + 2 * r;
                if constexpr (kFused) {
                    plus = !keep ? 0u
                                 : pack_bf16(this->through_map(true, low_bf16(plus), low_bf16(minus), grad_plus[0],
                                                               grad_minus[0], s_plus, s_minus),
                                             this->through_map(true, high_bf16(plus), high_bf16(minus), grad_plus[1],
                                                               grad_minus[1], s_plus, s_minus));
                } else {
                    plus = keep ? pack_bf16(grad_plus[0], grad_plus[1]) : 0u;
                    minus = keep ? pack_bf16(grad_minus[0], grad_minus[1]) : 0u;
                }
            }
        }
    }

    // R += φ(q)ᵀ dn and r += Σ dd φ(q), of the queries that saw the state before the chunk.
    __device__ __forceinline__ void advance_state() {
        if (p.runs) {
            this->hide_other_runs(phi_q, this->run_before());
            __syncthreads();
        }
        const bool survives = this->survives();
        if (!survives) this->clear_state();
        float sums[kPairs][2] = {};
        this->advance(phi_q, grads, grad_denominator, sums);
        if (!survives) q_sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (member() == 2 * j + half) q_sum += sums[j][half];
    }

    // dk and dW_k. Ends with all copies in shared memory used up but those of `next`.
    __device__ __forceinline__ void write_gradients() {
        if constexpr (kWhole) {
            uint16_t* to = this->at(p.grad_k, p.grad_k_stride, kv_head(), this->start());
            this->write_projected_gradient(phi_k, to, p.grad_k_stride.token);
        } else if constexpr (kFused) {
            this->copy_chunk(raw_k_again, p.k, p.k_stride, kv_head(), chunk);
            if constexpr (Layout::kStateOverWeight)
                this->weight_q.template copy_rows<kHeadDim, kThreads>(
                    p.weight_q + head() * kHeadDim * kProjected, kProjected, [](int) { return true; });
            copy_async_commit();
            uint16_t* to = this->at(p.grad_k, p.grad_k_stride, kv_head(), this->start());
            this->projection.write_input_gradient(phi_k, this->weight_k, to, p.grad_k_stride.token, this->num_rows(),
                                                  p.slice > 0 || p.member > 0);
            copy_async_wait<0>();
            __syncthreads();
            this->projection.add_weight_gradient(raw_k_again, phi_k);
        } else {
            uint16_t* to = this->at(p.grad_k, p.grad_k_stride, head(), this->start());
            this->write_feature_gradient(phi_k, to, p.grad_k_stride.token, p.slice > 0);
        }
    }

    typename Layout::template Matrix<kSlice, kFeatures> state_copy;
    typename Layout::Scores scores;
    typename Layout::Input raw_k_again;
    float *grad_denominator, *shifted_sum, *mean, *row_sums;
    float q_sum;  // this lane's part of r
};

template <int kHeadDim, int kFeatures, bool kFused, int kKernel>
__global__ void __launch_bounds__(BackwardShape<kHeadDim, kFeatures, kFused, kKernel>::kThreads, 1)
    linear_attention_key_gradients(const __grid_constant__ BackwardParameters parameters) {
    KeyGradients<kHeadDim, kFeatures, kFused, kKernel>(parameters).run();
}

}  // namespace hedgehog
