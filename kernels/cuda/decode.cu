// Decoding: one token a row, φ fused, S and z updated in place.
//
//     S += φ(k) vᵀ        z += φ(k)        o = φ(q) S / (φ(q)·z + eps)
//
// Reading and writing S is nearly all of the work. A block takes one (row, head), or with `splits` > 1 a slice of its
// values, so that a small batch fills the GPU too. Every slice needs the old z, and only one may write the new: the
// last block of a head to arrive does, and puts the counter back to zero for the next token.
// Plain launches with fixed addresses: a CUDA graph may hold them.
#include "feature_map.cuh"
#include "launches.h"

namespace hedgehog {

struct DecodeParameters {
    const uint16_t *q, *k, *v, *weight_q, *weight_k;
    const uint8_t* mask;
    float *kv_state, *k_sum;
    uint16_t* out;
    int32_t* arrivals;
    int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;
    int32_t heads, kv_heads, feature_map, splits;
    float eps;
};

constexpr int kDecodeThreads = 256;

template <int kHeadDim, int kFeatures>
struct DecodeShared {
    float inputs[2][kHeadDim];           // q and k
    float partial[2 * kDecodeThreads];   // of z = x W, by group of inputs
    float phi[2][kFeatures];             // φ(q) and φ(k), rounded to bf16
    float outputs[4 * kDecodeThreads];   // each thread's four columns of φ(q) S
    float denominators[kDecodeThreads / 32];
    int32_t is_last;
};

// As in forward.cu. Few registers: five blocks of 256 threads on a multiprocessor keep its memory busy.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                    \
    static_assert(sizeof(DecodeShared<head_dim, features>) <= shared_bytes && registers <= 48, \
                  "linear_attention_decode<" #head_dim "," #features "," #map "> takes more than declared")
RESOURCES(64, 128, fused, 48, 7716);
RESOURCES(64, 256, fused, 48, 8740);
RESOURCES(128, 128, fused, 48, 8228);
RESOURCES(128, 256, fused, 48, 9252);
RESOURCES(64, 128, given, 48, 7716);
RESOURCES(64, 256, given, 48, 8740);
RESOURCES(128, 128, given, 48, 8228);
RESOURCES(128, 256, given, 48, 9252);
#undef RESOURCES

__device__ __forceinline__ float warp_sum(float x) {
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) x += shuffle_xor(x, lane_mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) x = fmaxf(x, shuffle_xor(x, lane_mask));
    return x;
}

// φ from z (P numbers in shared memory) by one warp. Equations and rounding as in feature_map.cuh.
template <int kProjected>
__device__ __forceinline__ void activate_token(const float* z_shared, float* phi, int feature_map, bool is_key,
                                               int lane) {
    float z[kProjected / 32];
    float highest = 0.0f, lowest = 0.0f;
#pragma unroll
    for (int i = 0; i < kProjected / 32; ++i) {
        z[i] = z_shared[lane + 32 * i];
        highest = i ? fmaxf(highest, z[i]) : z[i];
        lowest = i ? fminf(lowest, z[i]) : z[i];
    }
    float scale = kLog2E, offset_plus = 0.0f, offset_minus = 0.0f;
    if (feature_map == HEDGEHOG_EXP && is_key) {
#pragma unroll
        for (int i = 0; i < kProjected / 32; ++i) z[i] = bounded_exponent(z[i]);
    } else {
        if (feature_map == HEDGEHOG_JOINT) scale *= 2.0f;
        offset_plus = warp_max(highest) * scale;
        offset_minus = warp_max(-lowest) * scale;
        if (feature_map != HEDGEHOG_SOFTMAX) offset_plus = offset_minus = fmaxf(offset_plus, offset_minus);
        float sum_plus = 0.0f, sum_minus = 0.0f;
#pragma unroll
        for (int i = 0; i < kProjected / 32; ++i) {
            sum_plus += exp2_approximate(fmaf(z[i], scale, -offset_plus));
            sum_minus += exp2_approximate(fmaf(-z[i], scale, -offset_minus));
        }
        sum_plus = warp_sum(sum_plus);
        sum_minus = warp_sum(sum_minus);
        if (feature_map != HEDGEHOG_SOFTMAX) sum_plus = sum_minus = sum_plus + sum_minus;
        offset_plus += log2_approximate(sum_plus);
        offset_minus += log2_approximate(sum_minus);
    }
#pragma unroll
    for (int i = 0; i < kProjected / 32; ++i) {
        phi[lane + 32 * i] = round_to_bf16(exp2_approximate(fmaf(z[i], scale, -offset_plus)));
        phi[kProjected + lane + 32 * i] = round_to_bf16(exp2_approximate(fmaf(-z[i], scale, -offset_minus)));
    }
}

// Leaves φ(q) and φ(k) in shared memory.
template <int kHeadDim, int kFeatures>
__device__ __forceinline__ void make_token_features(const DecodeParameters& p, DecodeShared<kHeadDim, kFeatures>& shared,
                                                    const uint16_t* q, const uint16_t* k, int64_t head, int thread) {
    constexpr int kProjected = kFeatures / 2, kGroups = kDecodeThreads / kProjected;
    for (int d = thread; d < kHeadDim; d += kDecodeThreads) {
        shared.inputs[0][d] = bf16_value(q[d]);
        shared.inputs[1][d] = bf16_value(k[d]);
    }
    __syncthreads();
    // Neighbouring threads take two neighbouring columns of W each; half of the block works for q, half for k.
    const int side = thread / (kDecodeThreads / 2), in_side = thread % (kDecodeThreads / 2);
    const int column = in_side % (kProjected / 2) * 2, group = in_side / (kProjected / 2);
    const auto* weight = reinterpret_cast<const uint32_t*>((side ? p.weight_k : p.weight_q) +
                                                           head * kHeadDim * kProjected + column);
    float low = 0.0f, high = 0.0f;
#pragma unroll 8
    for (int d = group; d < kHeadDim; d += kGroups) {
        const uint32_t pair = weight[d * (kProjected / 2)];
        low += shared.inputs[side][d] * low_bf16(pair);
        high += shared.inputs[side][d] * high_bf16(pair);
    }
    float* partial = shared.partial + side * kDecodeThreads;
    partial[group * kProjected + column] = low;
    partial[group * kProjected + column + 1] = high;
    __syncthreads();
    if (in_side < kProjected)
        for (int other = 1; other < kGroups; ++other) partial[in_side] += partial[other * kProjected + in_side];
    __syncthreads();
    if (thread / 32 < 2) {
        const int map_side = thread / 32;
        activate_token<kProjected>(shared.partial + map_side * kDecodeThreads, shared.phi[map_side], p.feature_map,
                                   map_side == 1, thread % 32);
    }
}

template <int kHeadDim, int kFeatures, bool kFused>
__global__ void __launch_bounds__(kDecodeThreads)
    linear_attention_decode(const __grid_constant__ DecodeParameters p) {
    auto& shared = *reinterpret_cast<DecodeShared<kHeadDim, kFeatures>*>(dynamic_shared_memory());
    const int thread = threadIdx.x;
    const int64_t split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, kv_head = head / (p.heads / p.kv_heads);
    const int64_t batch_head = row * p.heads + head;
    const uint16_t* q = p.q + row * p.q_batch_stride + head * p.q_head_stride;
    const uint16_t* k = p.k + row * p.k_batch_stride + (kFused ? kv_head : head) * p.k_head_stride;
    const uint16_t* v = p.v + row * p.v_batch_stride + kv_head * p.v_head_stride;

    if constexpr (kFused) {
        make_token_features<kHeadDim, kFeatures>(p, shared, q, k, head, thread);
    } else {
        for (int f = thread; f < kFeatures; f += kDecodeThreads) {
            shared.phi[0][f] = bf16_value(q[f]);
            shared.phi[1][f] = bf16_value(k[f]);
        }
    }
    __syncthreads();
    const bool real = p.mask == nullptr || p.mask[row];

    // The denominator, from the old z and φ(k): z itself is written last.
    float new_k_sum = 0.0f, d = 0.0f;
    if (thread < kFeatures) {
        new_k_sum = p.k_sum[batch_head * kFeatures + thread] + (real ? shared.phi[1][thread] : 0.0f);
        d = shared.phi[0][thread] * new_k_sum;
    }
    d = warp_sum(d);
    if (thread % 32 == 0) shared.denominators[thread / 32] = d;

    // Four columns of S a thread, rows in turn.
    const int columns = kHeadDim / p.splits, threads_per_row = columns / 4;
    const int column = static_cast<int>(split) * columns + thread % threads_per_row * 4;
    const int row_group = thread / threads_per_row, row_groups = kDecodeThreads / threads_per_row;
    float value[4], sums[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = bf16_value(v[column + i]);
    float* state = p.kv_state + batch_head * kFeatures * kHeadDim + column;
#pragma unroll 4
    for (int f = row_group; f < kFeatures; f += row_groups) {
        float4& at = *reinterpret_cast<float4*>(state + f * kHeadDim);
        const float phi_q = shared.phi[0][f], phi_k = real ? shared.phi[1][f] : 0.0f;
        float4 s = at;
        s.x += phi_k * value[0];
        s.y += phi_k * value[1];
        s.z += phi_k * value[2];
        s.w += phi_k * value[3];
        at = s;
        sums[0] += phi_q * s.x;
        sums[1] += phi_q * s.y;
        sums[2] += phi_q * s.z;
        sums[3] += phi_q * s.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.outputs[row_group * columns + thread % threads_per_row * 4 + i] = sums[i];
    __syncthreads();

    if (thread < columns) {
        float numerator = 0.0f, denominator = p.eps;
        for (int group = 0; group < row_groups; ++group) numerator += shared.outputs[group * columns + thread];
        for (int warp = 0; warp < kDecodeThreads / 32; ++warp) denominator += shared.denominators[warp];
        p.out[batch_head * kHeadDim + split * columns + thread] =
            static_cast<uint16_t>(pack_bf16(numerator / denominator, 0.0f) & 0xffff);
    }

    if (p.splits > 1) {
        if (thread == 0) {
            __threadfence();
            shared.is_last = atomicAdd(p.arrivals + batch_head, 1) == p.splits - 1;
        }
        __syncthreads();
        if (!shared.is_last) return;
        if (thread == 0) p.arrivals[batch_head] = 0;
    }
    if (thread < kFeatures) p.k_sum[batch_head * kFeatures + thread] = new_k_sum;
}

namespace {

template <int kHeadDim, int kFeatures, bool kFused>
cudaError_t run(const DecodeParameters& p, int64_t batch, cudaStream_t stream) {
    return launch(&linear_attention_decode<kHeadDim, kFeatures, kFused>,
                  dim3(p.splits, p.heads, static_cast<unsigned>(batch)), kDecodeThreads,
                  static_cast<int>(sizeof(DecodeShared<kHeadDim, kFeatures>)), stream, p);
}

bool valid(const HedgehogDecodeArguments& a) {
    const bool fused = a.feature_map != HEDGEHOG_GIVEN;
    return a.q && a.k && a.v && a.kv_state && a.k_sum && a.out && (!fused || (a.weight_q && a.weight_k)) &&
           a.feature_map >= HEDGEHOG_GIVEN && a.feature_map <= HEDGEHOG_JOINT && a.batch > 0 && a.batch < 65536 &&
           a.heads > 0 && a.heads < 65536 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 &&
           (a.splits == 1 || ((a.splits == 2 || a.splits == 4) && a.arrivals)) && aligned(a.kv_state, 16) &&
           aligned(a.weight_q, 4) && aligned(a.weight_k, 4);
}

}  // namespace
}  // namespace hedgehog

extern "C" int32_t hedgehog_decode(const HedgehogDecodeArguments* arguments) {
    using namespace hedgehog;
    const HedgehogDecodeArguments& a = *arguments;
    if (!valid(a)) return cudaErrorInvalidValue;
    DecodeParameters p{};
    p.q = static_cast<const uint16_t*>(a.q);
    p.k = static_cast<const uint16_t*>(a.k);
    p.v = static_cast<const uint16_t*>(a.v);
    p.weight_q = static_cast<const uint16_t*>(a.weight_q);
    p.weight_k = static_cast<const uint16_t*>(a.weight_k);
    p.mask = static_cast<const uint8_t*>(a.mask);
    p.kv_state = static_cast<float*>(a.kv_state);
    p.k_sum = static_cast<float*>(a.k_sum);
    p.out = static_cast<uint16_t*>(a.out);
    p.arrivals = static_cast<int32_t*>(a.arrivals);
    p.q_batch_stride = a.q_batch_stride;
    p.q_head_stride = a.q_head_stride;
    p.k_batch_stride = a.k_batch_stride;
    p.k_head_stride = a.k_head_stride;
    p.v_batch_stride = a.v_batch_stride;
    p.v_head_stride = a.v_head_stride;
    p.heads = static_cast<int32_t>(a.heads);
    p.kv_heads = static_cast<int32_t>(a.kv_heads);
    p.feature_map = a.feature_map;
    p.splits = a.splits;
    p.eps = a.eps;
    const auto stream = static_cast<cudaStream_t>(a.stream);
    return for_shape(a.head_dim, a.features, a.feature_map, cudaErrorInvalidValue, [&](auto shape) {
        using Shape = decltype(shape);
        return run<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>(p, a.batch, stream);
    });
}

extern "C" const char* hedgehog_error_string(int32_t error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int32_t hedgehog_struct_bytes(int32_t which) {
    return which == 0   ? sizeof(HedgehogForwardArguments)
           : which == 1 ? sizeof(HedgehogDecodeArguments)
                        : sizeof(HedgehogBackwardArguments);
}
