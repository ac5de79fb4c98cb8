// φ(x) = f(x W) for sixteen rows by one warp, in registers, rounded once to bf16 on the way to shared memory.
//
//     hedgehog_softmax   [softmax(z) ⊕ softmax(−z)]
//     hedgehog_joint     softmax([2z ⊕ −2z])
//     hedgehog_exp       queries: softmax([z ⊕ −z]);  keys: [exp(b(z)) ⊕ exp(−b(z))], b bends beyond ±40
//
// All of them are 2^(c z − offset₊) and 2^(−c z − offset₋) with offsets per row, which hold maximum and log-sum. A row of
// exponentials is needed twice, for its sums and for the features, and the multiplexed unit gives only 16 a clock. So those of
// −z are reciprocals, of two at once: with e = 2^(c z − top) and r = 1/(e₀ e₁),
//
//     1/e₀ = e₁ r      1/e₁ = e₀ r      1/e₀ + 1/e₁ = (e₀ + e₁) r
//
// which makes three slow instructions for each z where four exponentials were; two where e has a register to wait in. In
// rows so wide that r might leave the range of float, four they are.
// A NaN in a row makes its sums NaN, hence all features of that row.
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

// How far a row's lowest exponent (of two) may be from its highest: the product of two reciprocals has twice that.
constexpr float kWidestRow = 48.0f;

// φ of a lane's eight-column units, pair by pair: features(z₀, z₁, row half, their φ₊, their φ₋) into shared memory; zeros in
// a row whose `keep` is false. `phi` has pair(row, feature), as Tile does.
template <int kProjected, class Phi, class Features>
__device__ __forceinline__ void store_features(const float (&z)[kProjected / 8][4], const bool (&keep)[2], Phi phi,
                                               int first_row, Features features) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int n = 0; n < kProjected / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + lane / 4 + 8 * r, column = 8 * n + 2 * (lane % 4);
            float plus[2], minus[2];
            features(z[n][2 * r], z[n][2 * r + 1], r, plus, minus);
            phi.pair(row, column) = keep[r] ? pack_bf16(plus[0], plus[1]) : 0u;
            phi.pair(row, kProjected + column) = keep[r] ? pack_bf16(minus[0], minus[1]) : 0u;
            if (r == 1) schedule_barrier();
        }
}

// Writes φ of the sixteen rows into `phi`; a row whose `keep` is false becomes zero. kKept: e waits in the place of z. With 128
// columns the compiler finds the registers for that in some kernels only.
template <int kProjected, bool kKept = kProjected <= 64, class Phi>
__device__ __forceinline__ void activate(float (&z)[kProjected / 8][4], int feature_map, bool is_key,
                                         const bool (&keep)[2], Phi phi, int first_row) {
    if (feature_map == HEDGEHOG_EXP && is_key) {
        store_features<kProjected>(z, keep, phi, first_row,
                                   [](float z0, float z1, int, float (&plus)[2], float (&minus)[2]) {
                                       z0 = bounded_exponent(z0) * kLog2E, z1 = bounded_exponent(z1) * kLog2E;
                                       plus[0] = exp2_approximate(z0), plus[1] = exp2_approximate(z1);
                                       minus[0] = exp2_approximate(-z0), minus[1] = exp2_approximate(-z1);
                                   });
        return;
    }
    const float scale = feature_map == HEDGEHOG_JOINT ? 2.0f * kLog2E : kLog2E;
    float top_plus[2], top_minus[2], width = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float highest = z[0][2 * r], lowest = z[0][2 * r];
#pragma unroll
        for (int n = 0; n < kProjected / 8; ++n) {
            highest = fmaxf(highest, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
            lowest = fminf(lowest, fminf(z[n][2 * r], z[n][2 * r + 1]));
        }
        top_plus[r] = quad_max(highest) * scale, top_minus[r] = quad_max(-lowest) * scale;
        const float bottom = -top_minus[r];
        if (feature_map != HEDGEHOG_SOFTMAX) top_plus[r] = top_minus[r] = fmaxf(top_plus[r], top_minus[r]);
        width = fmaxf(width, top_plus[r] - bottom);
    }
    for (int lane_mask = 4; lane_mask < 32; lane_mask *= 2) width = fmaxf(width, shuffle_xor(width, lane_mask));

    const bool joint = feature_map != HEDGEHOG_SOFTMAX;
    if (width <= kWidestRow) {
        float to_plus[2], to_minus[2];  // a factor of e or an offset of the exponent; 1/(φ₊ φ₋) of one z
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum_plus = 0.0f, sum_minus = 0.0f;
#pragma unroll
            for (int n = 0; n < kProjected / 8; ++n) {
                const float e0 = exp2_approximate(fmaf(z[n][2 * r], scale, -top_plus[r]));
                const float e1 = exp2_approximate(fmaf(z[n][2 * r + 1], scale, -top_plus[r]));
                const float sum = e0 + e1;
                sum_plus += sum;
                sum_minus = fmaf(sum, reciprocal_approximate(e0 * e1), sum_minus);
                if (kKept) z[n][2 * r] = e0, z[n][2 * r + 1] = e1;
            }
            sum_plus = quad_sum(sum_plus);
            sum_minus = quad_sum(sum_minus);
            // 2^(−c z − top) is 2^(−2 top) / e; with sums of their own the factor cancels.
            if (joint) sum_plus = fmaf(sum_minus, exp2_approximate(-2.0f * top_plus[r]), sum_plus);
            to_plus[r] = kKept ? reciprocal_approximate(sum_plus) : top_plus[r] + log2_approximate(sum_plus);
            to_minus[r] = sum_plus * (joint ? sum_plus * exp2_approximate(2.0f * top_plus[r]) : sum_minus);
        }
        store_features<kProjected>(
            z, keep, phi, first_row, [&](float z0, float z1, int r, float (&plus)[2], float (&minus)[2]) {
                plus[0] = kKept ? z0 * to_plus[r] : exp2_approximate(fmaf(z0, scale, -to_plus[r]));
                plus[1] = kKept ? z1 * to_plus[r] : exp2_approximate(fmaf(z1, scale, -to_plus[r]));
                const float both = reciprocal_approximate(plus[0] * to_minus[r] * plus[1]);
                minus[0] = plus[1] * both, minus[1] = plus[0] * both;
            });
        return;
    }
    float offset_plus[2], offset_minus[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum_plus = 0.0f, sum_minus = 0.0f;
#pragma unroll
        for (int n = 0; n < kProjected / 8; ++n)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                sum_plus += exp2_approximate(fmaf(z[n][i], scale, -top_plus[r]));
                sum_minus += exp2_approximate(fmaf(-z[n][i], scale, -top_minus[r]));
            }
        sum_plus = quad_sum(sum_plus);
        sum_minus = quad_sum(sum_minus);
        if (joint) sum_plus = sum_minus = sum_plus + sum_minus;
        offset_plus[r] = top_plus[r] + log2_approximate(sum_plus);
        offset_minus[r] = top_minus[r] + log2_approximate(sum_minus);
    }
    store_features<kProjected>(z, keep, phi, first_row,
                               [&](float z0, float z1, int r, float (&plus)[2], float (&minus)[2]) {
                                   plus[0] = exp2_approximate(fmaf(z0, scale, -offset_plus[r]));
                                   plus[1] = exp2_approximate(fmaf(z1, scale, -offset_plus[r]));
                                   minus[0] = exp2_approximate(fmaf(-z0, scale, -offset_minus[r]));
                                   minus[1] = exp2_approximate(fmaf(-z1, scale, -offset_minus[r]));
                               });
}

}  // namespace hedgehog
