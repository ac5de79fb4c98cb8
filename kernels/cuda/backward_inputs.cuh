// Backward: what the gradient of z = x W leaves to do, dx = dz Wᵀ and dW = Σ xᵀ dz. By the sweeps themselves, chunk by chunk,
// or afterwards, by the kernel below, where a sweep has all the values: its state leaves no registers for dW. Until then dz
// waits where dx will be, in columns 0…P-1 of dq and dk.
//
// On paper the kernel reads x and dz and writes dx, 768 bytes a token and head for q and the same for k at D = P = 128: 0.36 ns
// on an H200 (4.3 TB/s). The products are 131 kFLOP, 0.27 ns at six tenths of 790 TFLOP/s, and run while the next chunk comes.
#pragma once

#include "interface.h"
#include "tile.cuh"

namespace hedgehog {

__device__ __forceinline__ void add_pair(uint16_t* to, float left, float right, bool add) {
    uint32_t& pair = *reinterpret_cast<uint32_t*>(to);
    if (add) {
        left += low_bf16(pair);
        right += high_bf16(pair);
    }
    pair = pack_bf16(left, right);
}

// By a block of eight warps. dz lies in the first columns of a tile of kColumns.
template <int kHeadDim, int kProjected, int kColumns>
struct ProjectionGradients {
    static constexpr int kWarps = 8;
    // Of dW a warp has sixteen of the D rows, and of the columns all or half.
    static constexpr int kRowTiles = kHeadDim / 16, kWarpColumns = kProjected * kRowTiles / kWarps;
    float grad_weight[kWarpColumns / 8][4];

    __device__ __forceinline__ static int warp() { return thread_index() / 32; }
    __device__ __forceinline__ static int lane() { return thread_index() % 32; }
    __device__ __forceinline__ static int member_of_quad() { return thread_index() % 4; }
    __device__ __forceinline__ static int weight_row() { return 16 * (warp() % kRowTiles); }
    __device__ __forceinline__ static int weight_column() { return warp() / kRowTiles * kWarpColumns; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& fragment : grad_weight)
#pragma unroll
            for (float& element : fragment) element = 0.0f;
    }

    // Rows of dx, `num_rows` of the chunk's; added to what is there if `add`.
    __device__ __forceinline__ static void write_input_gradient(Tile<kColumns> dz, Tile<kProjected> weight, uint16_t* to,
                                                                int64_t row_stride, int num_rows, bool add) {
        const int row_tile = warp() % 4;
        // thirty-two columns at a time: the registers hold the state and dW already
#pragma unroll 1
        for (int part = 0; part < kHeadDim / 64; ++part) {
            const int first = warp() / 4 * (kHeadDim / 2) + 32 * part;
            float sums[2][2][4] = {};
#pragma unroll 1
            for (int column = 0; column < kProjected; column += 16) {
                uint32_t a[4];
                dz.load_a(a, 16 * row_tile, column, lane());
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    uint32_t b[4];
                    weight.load_b_transposed(b, column, first + 16 * n, lane());
                    mma(sums[n][0], a, b[0], b[1]);
                    mma(sums[n][1], a, b[2], b[3]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = 16 * row_tile + lane() / 4 + 8 * r;
                if (row >= num_rows) continue;
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    add_pair(to + row * row_stride + first + 8 * n + 2 * member_of_quad(), sums[n / 2][n % 2][2 * r],
                             sums[n / 2][n % 2][2 * r + 1], add);
            }
        }
    }

    __device__ __forceinline__ void add_weight_gradient(Tile<kHeadDim> x, Tile<kColumns> dz) {
#pragma unroll 1
        for (int token = 0; token < kChunk; token += 16) {
            uint32_t a[4];
            x.load_a_transposed(a, weight_row(), token, lane());
#pragma unroll
            for (int n = 0; n < kWarpColumns / 8; n += 2) {
                uint32_t b[4];
                dz.load_b(b, token, weight_column() + 8 * n, lane());
                mma(grad_weight[n], a, b[0], b[1]);
                mma(grad_weight[n + 1], a, b[2], b[3]);
            }
        }
    }

    // (D, P) at `to`; added to what is there if `add`.
    __device__ __forceinline__ void write_weight_gradient(float* to, bool add) const {
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int d = weight_row() + lane() / 4 + 8 * (i >> 1);
                float& element = to[d * kProjected + weight_column() + 8 * n + 2 * member_of_quad() + (i & 1)];
                element = add ? element + grad_weight[n][i] : grad_weight[n][i];
            }
    }
};

struct InputParameters {
    const uint16_t *q, *k, *weight_q, *weight_k;
    uint16_t *grad_q, *grad_k;              // dz before, dx after
    float *grad_weight_q, *grad_weight_k;   // (B, segments, H, D, P)
    HedgehogStrides q_stride, k_stride, grad_q_stride, grad_k_stride;
    int64_t length;
    int32_t num_chunks, chunks_per_segment, heads, segments;
};

template <int kHeadDim, int kFeatures>
struct InputLayout {
    static constexpr int kProjected = kFeatures / 2, kThreads = 256;
    static constexpr int kXBytes = Tile<kHeadDim>::bytes(kChunk), kGradZBytes = Tile<kProjected>::bytes(kChunk);
    static constexpr int kWeight = 0, kX = Tile<kProjected>::bytes(kHeadDim);  // two chunks, in turn
    static constexpr int kGradZ = kX + 2 * kXBytes;                            // the same
    static constexpr int kBytes = kGradZ + 2 * kGradZBytes;
    static_assert(kProjected <= kHeadDim, "dz fits where dx will be");
};

// One block per (batch row and side, head, segment): even block_z is q's side, odd is k's.
template <int kHeadDim, int kFeatures>
class InputGradients {
    using Layout = InputLayout<kHeadDim, kFeatures>;
    static constexpr int kProjected = Layout::kProjected, kThreads = Layout::kThreads;

   public:
    __device__ __forceinline__ explicit InputGradients(const InputParameters& parameters) : p(parameters) {}

    __device__ __forceinline__ void run() {
        const bool keys = block_z() & 1;
        const int64_t row = block_z() / 2, head = block_y();
        const int first = block_x() * p.chunks_per_segment, whole = first + p.chunks_per_segment;
        const int stop = whole < p.num_chunks ? whole : p.num_chunks;
        const HedgehogStrides &x_stride = keys ? p.k_stride : p.q_stride,
                              &grad_stride = keys ? p.grad_k_stride : p.grad_q_stride;
        const uint16_t* x = (keys ? p.k : p.q) + row * x_stride.batch + head * x_stride.head;
        uint16_t* grad = (keys ? p.grad_k : p.grad_q) + row * grad_stride.batch + head * grad_stride.head;
        const int64_t x_token = x_stride.token, grad_token = grad_stride.token;
        const Tile<kProjected> weight{shared(Layout::kWeight)};
        weight.template copy_rows<kHeadDim, kThreads>(
            (keys ? p.weight_k : p.weight_q) + head * kHeadDim * kProjected, kProjected, [](int) { return true; });
        const auto fetch = [&](int chunk) {
            const int64_t from = int64_t(chunk) * kChunk, left = p.length - from;
            const auto exists = [left](int token) { return token < left; };
            if (chunk < stop) {
                x_of(chunk).template copy_rows<kChunk, kThreads>(x + from * x_token, x_token, exists);
                dz_of(chunk).template copy_rows<kChunk, kThreads>(grad + from * grad_token, grad_token, exists);
            }
            copy_async_commit();
        };
        Gradients gradients;
        gradients.clear();
        fetch(first);
#pragma unroll 1
        for (int chunk = first; chunk < stop; ++chunk) {
            fetch(chunk + 1);
            copy_async_wait<1>();
            __syncthreads();
            const int64_t from = int64_t(chunk) * kChunk, left = p.length - from;
            Gradients::write_input_gradient(dz_of(chunk), weight, grad + from * grad_token, grad_token,
                                            left < kChunk ? static_cast<int>(left) : kChunk, false);
            gradients.add_weight_gradient(x_of(chunk), dz_of(chunk));
            __syncthreads();
        }
        copy_async_wait<0>();
        const int64_t index = (row * p.segments + block_x()) * p.heads + head;
        gradients.write_weight_gradient((keys ? p.grad_weight_k : p.grad_weight_q) + index * (kHeadDim * kProjected),
                                        false);
    }

   private:
    using Gradients = ProjectionGradients<kHeadDim, kProjected, kProjected>;

    __device__ __forceinline__ static uint16_t* shared(int offset) {
        return reinterpret_cast<uint16_t*>(dynamic_shared_memory() + offset);
    }
    __device__ __forceinline__ static Tile<kHeadDim> x_of(int chunk) {
        return {shared(Layout::kX + chunk % 2 * Layout::kXBytes)};
    }
    __device__ __forceinline__ static Tile<kProjected> dz_of(int chunk) {
        return {shared(Layout::kGradZ + chunk % 2 * Layout::kGradZBytes)};
    }

    const InputParameters& p;
};

template <int kHeadDim, int kFeatures, bool kFused>
__global__ void __launch_bounds__(InputLayout<kHeadDim, kFeatures>::kThreads, 2)
    linear_attention_input_gradients(const __grid_constant__ InputParameters parameters) {
    static_assert(kFused, "given features have no W");
    InputGradients<kHeadDim, kFeatures>(parameters).run();
}

}  // namespace hedgehog
