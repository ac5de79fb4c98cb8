// φ(x) = f(x W) for sixteen rows by one warp, in registers, rounded once to bf16 on the way to shared memory.
//
//     hedgehog_softmax   [softmax(z) ⊕ softmax(−z)]
//     hedgehog_joint     softmax([2z ⊕ −2z])
//     hedgehog_exp       queries: softmax([z ⊕ −z]);  keys: [exp(b(z)) ⊕ exp(−b(z))], b bends beyond ±40
//
// All of them are 2^(c z − offset₊) and 2^(−c z − offset₋) with offsets per row, which hold maximum and log-sum. The
// exponentials are taken twice, once for the sums and once for the features: kept ones would need P more registers.
// A NaN in a row makes an offset NaN, hence all features of that row.
#pragma once

#include "interface.h"
#include "tile.cuh"

namespace hedgehog {

constexpr float kKeyExponentBound = 40.0f;  // feature_maps.py: KEY_EXPONENT_BOUND

__device__ __forceinline__ float bounded_exponent(float z) {
    const float excess = fmaxf(fabsf(z) - kKeyExponentBound, 0.0f);
    // The true division keeps the compiler from working on all sixty-four z of a lane at once, which spills registers.
    return z - copysignf(excess - log2_approximate(1.0f + excess) / kLog2E, z);
}

// Fragment C of x W: row lane/4 (+8) of the sixteen, columns 8n + 2(lane%4) (+1).
template <int kHeadDim, int kProjected>
__device__ __forceinline__ void project(float (&z)[kProjected / 8][4], Tile<kHeadDim> x, int first_row,
                                        Tile<kProjected> weight) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int n = 0; n < kProjected / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) z[n][i] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < kHeadDim; k += 16) {
        uint32_t a[4];
        x.load_a(a, first_row, k, lane);
#pragma unroll
        for (int n = 0; n < kProjected / 8; n += 2) {
            uint32_t b[4];
            weight.load_b(b, k, 8 * n, lane);
            mma(z[n], a, b[0], b[1]);
            mma(z[n + 1], a, b[2], b[3]);
        }
    }
}

// Writes φ of the sixteen rows into `phi`; a row whose `keep` is false becomes zero.
template <int kProjected>
__device__ __forceinline__ void activate(float (&z)[kProjected / 8][4], int feature_map, bool is_key,
                                         const bool (&keep)[2], Tile<2 * kProjected> phi, int first_row) {
    const int lane = thread_index() % 32;
    float scale = kLog2E;
    float offset_plus[2] = {0.0f, 0.0f}, offset_minus[2] = {0.0f, 0.0f};
    if (feature_map == HEDGEHOG_EXP && is_key) {
#pragma unroll
        for (int n = 0; n < kProjected / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) z[n][i] = bounded_exponent(z[n][i]);
    } else {
        if (feature_map == HEDGEHOG_JOINT) scale *= 2.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = z[0][2 * r], lowest = z[0][2 * r];
#pragma unroll
            for (int n = 0; n < kProjected / 8; ++n) {
                highest = fmaxf(highest, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
                lowest = fminf(lowest, fminf(z[n][2 * r], z[n][2 * r + 1]));
            }
            float top_plus = quad_max(highest) * scale, top_minus = quad_max(-lowest) * scale;
            if (feature_map != HEDGEHOG_SOFTMAX) top_plus = top_minus = fmaxf(top_plus, top_minus);
            float sum_plus = 0.0f, sum_minus = 0.0f;
#pragma unroll
            for (int n = 0; n < kProjected / 8; ++n)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    sum_plus += exp2_approximate(fmaf(z[n][i], scale, -top_plus));
                    sum_minus += exp2_approximate(fmaf(-z[n][i], scale, -top_minus));
                }
            sum_plus = quad_sum(sum_plus);
            sum_minus = quad_sum(sum_minus);
            if (feature_map != HEDGEHOG_SOFTMAX) sum_plus = sum_minus = sum_plus + sum_minus;
            offset_plus[r] = top_plus + log2_approximate(sum_plus);
            offset_minus[r] = top_minus + log2_approximate(sum_minus);
        }
    }
#pragma unroll
    for (int n = 0; n < kProjected / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + lane / 4 + 8 * r, column = 8 * n + 2 * (lane % 4);
            const float z0 = z[n][2 * r], z1 = z[n][2 * r + 1];
            const uint32_t plus = pack_bf16(exp2_approximate(fmaf(z0, scale, -offset_plus[r])),
                                            exp2_approximate(fmaf(z1, scale, -offset_plus[r])));
            const uint32_t minus = pack_bf16(exp2_approximate(fmaf(-z0, scale, -offset_minus[r])),
                                             exp2_approximate(fmaf(-z1, scale, -offset_minus[r])));
            phi.pair(row, column) = keep[r] ? plus : 0u;
            phi.pair(row, kProjected + column) = keep[r] ? minus : 0u;
            if (r == 1) schedule_barrier();
        }
}

}  // namespace hedgehog
