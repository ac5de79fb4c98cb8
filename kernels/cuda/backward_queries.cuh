// Backward, first sweep: chunk after chunk with S and z, as the forward pass. Gives dq, dW_q, and dd for the second sweep.
//
// G = tril(dn (v − μ)ᵀ) φ(k) + dn (S − z μᵀ)ᵀ and Z = tril(1) φ(k) + z come first, sixteen rows at a time, and with them
// the rows' sums of φ(q) G and φ(q) Z. They give dd = −Σ φ(q) G / d, then dφ(q) = G + dd Z, and the softmaxes' Σ φ dφ.
// dz takes the place of φ(q), its owner's lane by lane. Raw q comes a second time, for dW, into the place of φ(k).
#pragma once

#include "backward.cuh"

namespace hedgehog {

template <int kHeadDim, int kFeatures, bool kFused, int kKernel>
struct QueryLayout : BackwardShape<kHeadDim, kFeatures, kFused, kKernel> {
    using Shape = BackwardShape<kHeadDim, kFeatures, kFused, kKernel>;
    static constexpr int kKSum = Shape::kCommonBytes;
    static constexpr int kMean = kKSum + 4 * kFeatures;
    static constexpr int kTotals = kMean + 4 * Shape::kSlice;
    static constexpr int kRowSums = kTotals + 4 * Shape::kSlice;  // two buffers, of 8 warps × 16 rows × 4
    static constexpr int kBytes = kRowSums + 2 * 4 * 4 * 16 * Shape::kWarps;
    static_assert(kBytes <= Shape::kMostBytes, "shared memory of a block");
};

template <int kHeadDim, int kFeatures, bool kFused, int kKernel>
class QueryGradients : BackwardBlock<BackwardShape<kHeadDim, kFeatures, kFused, kKernel>> {
    using Layout = QueryLayout<kHeadDim, kFeatures, kFused, kKernel>;
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
    __device__ __forceinline__ explicit QueryGradients(const BackwardParameters& parameters) : Block(parameters) {
        unsigned char* shared = dynamic_shared_memory();
        k_sum = reinterpret_cast<float*>(shared + Layout::kKSum);
        mean = reinterpret_cast<float*>(shared + Layout::kMean);
        totals = reinterpret_cast<float*>(shared + Layout::kTotals);
        row_sums = reinterpret_cast<float*>(shared + Layout::kRowSums);
        // raw q lies where φ(k) was
        raw_q_again.data = phi_k.data;
    }

    __device__ __forceinline__ void run() {
        if constexpr (kWgmma) use_async_proxy();
        load_state();
        if constexpr (kProjects) this->projection.clear();
        chunk = this->first_chunk();
        if constexpr (kFused) this->copy_weights(head());
        this->copy_values_and_grads(head(), kv_head(), chunk);
        this->copy_inputs(head(), kv_head(), chunk);
#pragma unroll 1
        for (; chunk < this->stop_chunk(); ++chunk) {
            const int next = chunk + 1 < this->stop_chunk() ? chunk + 1 : chunk;  // at the end once more, for nothing
            this->read_marks();
            copy_async_wait<0>();
            this->hand_to_products();
            __syncthreads();
            this->find_mean(mean, totals, tokens_in_state() + (chunk - this->first_chunk()) * kChunk + this->num_rows());
            if constexpr (kFused)
                this->template make_features<true>(true, [&] {  // a barrier inside
                    if constexpr (kWhole) this->copy_inputs(head(), kv_head(), next);
                });
            else
                __syncthreads();
            this->template divide_grads<false>(mean, head());
            this->hand_to_products();
            __syncthreads();
            this->multiply_visible(grads, values, this->shifts, -1.0f, this->grad_scores);
            __syncthreads();
#pragma unroll 1
            for (int row_tile = 0; row_tile < 4; ++row_tile) differentiate_rows(row_tile);
            advance_state();
            __syncthreads();
            if constexpr (kProjects) {
                this->copy_chunk(raw_q_again, p.q, p.q_stride, head(), chunk);
                copy_async_commit();
            }
            this->copy_values_and_grads(head(), kv_head(), next);
            write_gradients();
            if constexpr (kWhole) continue;
            __syncthreads();
            this->copy_inputs(head(), kv_head(), next);
        }
        copy_async_wait<0>();
        if constexpr (kProjects)
            this->projection.write_weight_gradient(p.grad_weight_q + this->weight_offset(head()), p.slice > 0);
    }

   private:
    __device__ __forceinline__ static int64_t head() { return block_y(); }
    __device__ __forceinline__ int64_t kv_head() const { return static_cast<int>(block_y()) / p.group; }
    __device__ __forceinline__ static int member() { return Block::member_of_quad(); }

    // What the state before the segment counts for in μ. How many tokens are in an initial state is not known.
    __device__ __forceinline__ float tokens_in_state() const {
        if (this->segment() > 0) return static_cast<float>(this->first_chunk()) * kChunk;
        return p.initial_kv ? 16.0f * kChunk : 0.0f;
    }

    // S and z before the segment.
    __device__ __forceinline__ void load_state() {
        const float *kv = nullptr, *sum = nullptr;
        if (this->segment() > 0) {
            const int64_t index = this->batch_head(head()) * (p.segments - 1) + this->segment() - 1;
            kv = p.segment_states + index * (kFeatures * (kHeadDim + 1));
            sum = kv + kFeatures * kHeadDim;
        } else if (p.initial_kv) {
            kv = p.initial_kv + this->batch_head(head()) * kFeatures * kHeadDim;
            sum = p.initial_k_sum + this->batch_head(head()) * kFeatures;
        }
        const int offset = p.slice * kSlice;
        this->visit_state([&](int feature, int column, float& left, float& right) {
            left = kv ? kv[feature * kHeadDim + offset + column] : 0.0f;
            right = kv ? kv[feature * kHeadDim + offset + column + 1] : 0.0f;
        });
        for (int f = thread_index(); f < kFeatures; f += kThreads) k_sum[f] = sum ? sum[f] : 0.0f;

        // The mean value in the state.
        for (int column = thread_index(); column < kSlice; column += kThreads) {
            float on_values = 0.0f, on_ones = 0.0f;
            for (int f = 0; kv && f < kFeatures; ++f) {
                on_values += kv[f * kHeadDim + offset + column];
                on_ones += sum[f];
            }
            totals[column] = on_ones > 0.0f ? tokens_in_state() * (on_values / on_ones) : 0.0f;
        }
    }

    // dz of sixteen rows, and their dd.
    __device__ __forceinline__ void differentiate_rows(int row_tile) {
        Sums g = {}, z = {};
        add_state(row_tile, g, z);
        add_chunk(row_tile, g, z);
        float* buffer = row_sums + (row_tile & 1) * (4 * 16 * Block::kWarps);
        sum_rows(row_tile, g, z, buffer);
        __syncthreads();
        finish_rows(row_tile, g, z, buffer);
    }

    __device__ __forceinline__ void add_state(int row_tile, Sums& g, Sums& z) const {
        float sums[kPairs][2];
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                sums[j][half] = k_sum[this->feature_of(j, half) + lane() / 4];
#pragma unroll
        for (int v = 0; v < kSlice; v += 16) {
            uint32_t a[4];
            grads.load_a(a, 16 * row_tile, v, lane());
            const float *near = mean + v + 2 * member(), *far = near + 8;
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float *here = state[j][v / 8] + 2 * half, *there = state[j][v / 8 + 1] + 2 * half;
                    const float sum = sums[j][half];
                    mma(g[j][half], a, pack_bf16(here[0] - sum * near[0], here[1] - sum * near[1]),
                        pack_bf16(there[0] - sum * far[0], there[1] - sum * far[1]));
                }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool sees = this->sees_state(16 * row_tile + lane() / 4 + 8 * r);
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int feature = this->feature_of(j, half) + 2 * member() + i;
                        if (!sees) g[j][half][2 * r + i] = 0.0f;
                        z[j][half][2 * r + i] = sees ? k_sum[feature] : 0.0f;
                    }
        }
    }

    __device__ __forceinline__ void add_chunk(int row_tile, Sums& g, Sums& z) const {
#pragma unroll 1
        for (int key_tile = 0; key_tile <= row_tile; ++key_tile) {
            uint32_t scores[4], visible[4];
            this->grad_scores.load_a(scores, 16 * row_tile, 16 * key_tile, lane());
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * row_tile + lane() / 4 + 8 * (i & 1);
                const int column = 16 * key_tile + 2 * member() + 8 * (i >> 1);
                visible[i] = (this->sees(row, column) ? 0x3f80u : 0u) | (this->sees(row, column + 1) ? 0x3f800000u : 0u);
            }
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t b[4];
                phi_k.load_b(b, 16 * key_tile, this->place_of(j, 0), lane(), kGap);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    mma(g[j][half], scores, b[2 * half], b[2 * half + 1]);
                    mma(z[j][half], visible, b[2 * half], b[2 * half + 1]);
                }
            }
        }
    }

    __device__ __forceinline__ decltype(auto) feature_pair(int row, int j, int half) const {
        return phi_q.pair(row, this->place_of(j, half) + 2 * member());
    }

    // Σ φ(q) G and Σ φ(q) Z over this warp's features, of either sign.
    __device__ __forceinline__ void sum_rows(int row_tile, const Sums& g, const Sums& z, float* buffer) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float on_g[2] = {}, on_z[2] = {};
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t phi = feature_pair(16 * row_tile + lane() / 4 + 8 * r, j, half);
                    on_g[half] += low_bf16(phi) * g[j][half][2 * r] + high_bf16(phi) * g[j][half][2 * r + 1];
                    on_z[half] += low_bf16(phi) * z[j][half][2 * r] + high_bf16(phi) * z[j][half][2 * r + 1];
                }
            float* to = buffer + 4 * (16 * warp() + lane() / 4 + 8 * r);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum_g = quad_sum(on_g[half]), sum_z = quad_sum(on_z[half]);
                if (member() == 0) to[half] = sum_g, to[2 + half] = sum_z;
            }
        }
    }

    __device__ __forceinline__ void finish_rows(int row_tile, const Sums& g, const Sums& z, const float* buffer) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * row_tile + lane() / 4 + 8 * r;
            float sums[4] = {};
#pragma unroll
            for (int w = 0; w < Block::kWarps; ++w)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[i] += buffer[4 * (16 * w + row - 16 * row_tile) + i];
            const bool exists = row < this->num_rows();
            const int64_t token = this->batch_head(head()) * p.length + this->start() + row;
            const float d = exists ? p.denominator[token] : 1.0f;
            const float grad_d = d <= p.eps ? 0.0f : -(sums[0] + sums[1]) / d;
            if (exists && warp() == 0 && member() == 0)
                this->grad_denominators(head())[row * p.grad_denominator_stride.token] = grad_d - this->shifts[row];
            float s_plus = sums[0] + grad_d * sums[2], s_minus = sums[1] + grad_d * sums[3];
            if (p.feature_map != HEDGEHOG_SOFTMAX) s_plus = s_minus = s_plus + s_minus;
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                decltype(auto) plus = feature_pair(row, j, 0);
                decltype(auto) minus = feature_pair(row, j, 1);
                float grad[2][2];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        grad[half][i] = g[j][half][2 * r + i] + grad_d * z[j][half][2 * r + i];
                if constexpr (kFused) {
                    plus = pack_bf16(this->through_map(false, low_bf16(plus), low_bf16(minus), grad[0][0], grad[1][0],
                                                       s_plus, s_minus),
                                     this->through_map(false, high_bf16(plus), high_bf16(minus), grad[0][1],
                                                       grad[1][1], s_plus, s_minus));
                } else {
                    plus = pack_bf16(grad[0][0], grad[0][1]);
                    minus = pack_bf16(grad[1][0], grad[1][1]);
                }
            }
        }
    }

    // S += φ(k)ᵀ v and z += Σ φ(k), as in forward.cuh.
    __device__ __forceinline__ void advance_state() {
        const bool survives = this->survives();
        // all have read φ(k) and z of their rows: they have met to sum the last ones
        if (p.runs) {
            this->hide_other_runs(phi_k, this->run_at_end());
            __syncthreads();
        }
        if (!survives) this->clear_state();
        float sums[kPairs][2] = {};
        this->advance(phi_k, values, nullptr, sums);
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& total = k_sum[this->feature_of(j, half) + lane() / 4];
                if (member() == 0) total = (survives ? total : 0.0f) + sums[j][half];
            }
    }

    // dq and dW_q, or what they are made of.
    __device__ __forceinline__ void write_gradients() {
        uint16_t* to = this->at(p.grad_q, p.grad_q_stride, head(), this->start());
        if constexpr (kWhole) {
            this->write_projected_gradient(phi_q, to, p.grad_q_stride.token);
        } else if constexpr (kFused) {
            this->projection.write_input_gradient(phi_q, this->weight_q, to, p.grad_q_stride.token, this->num_rows(),
                                                  p.slice > 0);
            copy_async_wait<1>();
            __syncthreads();
            this->projection.add_weight_gradient(raw_q_again, phi_q);
        } else {
            this->write_feature_gradient(phi_q, to, p.grad_q_stride.token, p.slice > 0);
        }
    }

    float *k_sum, *mean, *row_sums;
    float* totals;  // of the values so far
    typename Layout::Input raw_q_again;
};

template <int kHeadDim, int kFeatures, bool kFused, int kKernel>
__global__ void __launch_bounds__(BackwardShape<kHeadDim, kFeatures, kFused, kKernel>::kThreads, 1)
    linear_attention_query_gradients(const __grid_constant__ BackwardParameters parameters) {
    QueryGradients<kHeadDim, kFeatures, kFused, kKernel>(parameters).run();
}

}  // namespace hedgehog
