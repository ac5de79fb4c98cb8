// φ of 64 rows by a warpgroup, from the accumulators of z = x W to shared memory as wgmma reads it. The maps, and what a
// NaN does, are those of feature_map.cuh.
//
// Exponentials cost as much time as the products here, so each is taken once. Between the sum over a row and the
// division by it they wait in sixteen bits, two in the place of one z: 2^x with x ≤ 0 needs neither sign nor the highest
// bit of the exponent, which leaves nine bits after the point. bf16 has seven: rounding twice makes the error of a
// feature 3 % larger (√(1 + 1/16)).
#pragma once

#include "feature_map.cuh"
#include "primitives_hopper.cuh"

namespace hedgehog {

// Two numbers in [0, 2), rounded half up.
__device__ __forceinline__ uint32_t pack_fractions(float low, float high) {
    const uint32_t a = bits_of_float(low) * 4 + 0x8000, b = bits_of_float(high) * 4 + 0x8000;
    return upper_halves(a, b);
}
__device__ __forceinline__ float low_fraction(uint32_t packed) { return float_of_bits((packed & 0xffffu) << 14); }
__device__ __forceinline__ float high_fraction(uint32_t packed) { return float_of_bits(packed >> 16 << 14); }

// x, but not before `before` is computed. `nothing` is zero, which the compiler is not to know: it would take all
// exponentials at once, for which there are no registers. Neither asm volatile nor __syncwarp keeps it from that.
__device__ __forceinline__ float not_before(uint32_t before, float x, uint32_t nothing) {
    return float_of_bits(bits_of_float(x) | (before & nothing));
}

// One row's part of a pair of tiles' accumulators: plus and minus halves of φ, packed.
struct PackedPair {
    uint32_t plus, minus;
};

// Replaces z by what store_features wants: the exponentials as fractions and what divides them, or bf16 features already
// (`scaled` false) for the keys of hedgehog_exp, which have no sum.
template <int kTiles>
struct Features {
    PackedPair pairs[kTiles][2];  // by tile of eight columns and row lane/4, lane/4 + 8
    float scale_plus[2], scale_minus[2];
    bool scaled;
};

template <int kTiles>
__device__ __forceinline__ void exponentiate(Features<kTiles>& features, float (&z)[kTiles][4], int feature_map,
                                             bool is_key, uint32_t nothing) {
    features.scaled = feature_map != HEDGEHOG_EXP || !is_key;
    if (!features.scaled) {
        features.scale_plus[0] = features.scale_plus[1] = features.scale_minus[0] = features.scale_minus[1] = 1.0f;
        float log2_e = kLog2E;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (n + r > 0) log2_e = not_before(features.pairs[r ? n : n - 1][1 - r].minus, log2_e, nothing);
                const float z0 = bounded_exponent(z[n][2 * r]) * log2_e, z1 = bounded_exponent(z[n][2 * r + 1]) * log2_e;
                features.pairs[n][r] = {pack_bf16(exp2_here(z0), exp2_here(z1)),
                                        pack_bf16(exp2_here(-z0), exp2_here(-z1))};
            }
        return;
    }
    const float scale = feature_map == HEDGEHOG_JOINT ? 2.0f * kLog2E : kLog2E;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float highest = z[0][2 * r], lowest = z[0][2 * r];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            highest = fmaxf(highest, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
            lowest = fminf(lowest, fminf(z[n][2 * r], z[n][2 * r + 1]));
        }
        float top_plus = quad_max(highest) * scale, top_minus = quad_max(-lowest) * scale;
        if (feature_map != HEDGEHOG_SOFTMAX) top_plus = top_minus = fmaxf(top_plus, top_minus);
        float sum_plus = 0.0f, sum_minus = 0.0f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            // three to four of these may be under way
            const int step = r * kTiles + n;
            if (step >= 1) {
                const PackedPair& one_before = features.pairs[(step - 1) % kTiles][(step - 1) / kTiles];
                top_minus = not_before(one_before.plus, top_minus, nothing);
            }
            if (step >= 2) {
                const PackedPair& two_before = features.pairs[(step - 2) % kTiles][(step - 2) / kTiles];
                top_plus = not_before(two_before.minus, top_plus, nothing);
            }
            const float z0 = z[n][2 * r], z1 = z[n][2 * r + 1];
            const float plus0 = exp2_here(fmaf(z0, scale, -top_plus));
            const float plus1 = exp2_here(fmaf(z1, scale, -top_plus));
            const float minus0 = exp2_here(fmaf(-z0, scale, -top_minus));
            const float minus1 = exp2_here(fmaf(-z1, scale, -top_minus));
            sum_plus += plus0 + plus1;
            sum_minus += minus0 + minus1;
            features.pairs[n][r] = {pack_fractions(plus0, plus1), pack_fractions(minus0, minus1)};
        }
        sum_plus = quad_sum(sum_plus);
        sum_minus = quad_sum(sum_minus);
        if (feature_map != HEDGEHOG_SOFTMAX) sum_plus = sum_minus = sum_plus + sum_minus;
        features.scale_plus[r] = exp2_approximate(-log2_approximate(sum_plus));
        features.scale_minus[r] = exp2_approximate(-log2_approximate(sum_minus));
    }
}

// φ of the warp's sixteen rows, from `first_row` on; a row whose `keep` is false becomes zero.
template <int kTiles, int kRows>
__device__ __forceinline__ void store_features(const Features<kTiles>& features, const bool (&keep)[2],
                                               Panels<kRows, 16 * kTiles> phi, uint32_t first_row, uint32_t nothing) {
    const uint32_t lane = thread_index() & 31, row = first_row | (lane & 15);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float scale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) scale[r] = half ? features.scale_minus[r] : features.scale_plus[r];
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = i & 1;
                const PackedPair& pair = features.pairs[n + (i >> 1)][r];
                uint32_t word = read_here(half ? pair.minus : pair.plus);
                if (features.scaled) word = pack_bf16(low_fraction(word) * scale[r], high_fraction(word) * scale[r]);
                words[i] = keep[r] ? word : 0u;
            }
            store_matrix_x4<false>(phi.unit(row, (half * kTiles + n) | (lane >> 4)), words);
#pragma unroll
            for (int r = 0; r < 2; ++r) scale[r] = not_before(words[2 + r], scale[r], nothing);
        }
    }
}

}  // namespace hedgehog
