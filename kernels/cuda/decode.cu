// Decoding: one token a row, φ fused, S and z updated in place.
//
//     S += φ(k) vᵀ        z += φ(k)        o = φ(q) S / (φ(q)·z + eps)
//
// Reading and writing S is nearly all of the work, so its reads never wait for anything else: a block first asks for W_q and
// W_k (into shared memory) and for the first of its rows of S (eight times 16 bytes into the registers of each thread), then
// makes φ while they come, and from then on asks for a row as it hands one back.
//
// A block takes one (row, head), or with kSplits > 1 a slice of its values, so that a small batch fills the GPU too. Every
// slice needs the old z, and only one may write the new: the last block of a head to arrive does, and puts the counter back
// to zero for the next token. Plain launches with fixed addresses: a CUDA graph may hold them.
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
    int32_t heads, group, feature_map;  // group: heads / kv_heads
    float eps;
};

constexpr int kDecodeThreads = 256, kDecodeWarps = kDecodeThreads / 32, kSideWarps = kDecodeWarps / 2;
constexpr int kDecodeWindow = 8;  // rows of S, 16 bytes of each, that a thread has asked for at a time

template <int kHeadDim, int kFeatures, bool kFused>
struct DecodeShared {
    static constexpr int kProjected = kFeatures / 2;
    static constexpr int kWeightBytes = kFused ? 2 * 2 * kHeadDim * kProjected : 0;
    static constexpr int kOutputBytes = 4 * kDecodeWarps * kHeadDim;
    union {
        alignas(16) uint16_t weights[2][kFused ? kHeadDim : 1][kProjected];
        float outputs[kDecodeWarps * kHeadDim];  // each warp's part of φ(q) S, when the weights are used up
    };
    float inputs[2][kHeadDim];                 // q and k
    float partial[2][kSideWarps][kProjected];  // each warp's part of z = x W
    float phi[2][kFeatures];                   // φ(q) and φ(k), rounded to bf16
    float denominators[kDecodeWarps];
    int32_t is_last;
};

// As in forward.cu, for one, two and four splits. Three blocks of 256 threads fit a multiprocessor of an H100 (85 registers,
// 75 KiB), two one of an A100: each has 32 KiB of S and up to 64 KiB of weights under way.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                      \
    static_assert(sizeof(DecodeShared<head_dim, features, map == fused>) <= shared_bytes && registers <= 80, \
                  "linear_attention_decode<" #head_dim "," #features "," #map "> takes more than declared")
constexpr bool given = false, fused = true;
RESOURCES(64, 128, fused, 80, 20016);
RESOURCES(64, 256, fused, 80, 39472);
RESOURCES(128, 128, fused, 80, 36912);
RESOURCES(128, 256, fused, 80, 72752);
RESOURCES(64, 128, given, 80, 5680);
RESOURCES(64, 256, given, 80, 8752);
RESOURCES(128, 128, given, 80, 8240);
RESOURCES(128, 256, given, 80, 11312);
#undef RESOURCES

__device__ __forceinline__ float warp_sum(float x) {
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) x += shuffle_xor(x, lane_mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) x = fmaxf(x, shuffle_xor(x, lane_mask));
    return x;
}

// φ from the warps' parts of z by one warp. Equations and rounding as in feature_map.cuh.
template <int kProjected>
__device__ __forceinline__ void activate_token(const float (&partial)[kSideWarps][kProjected], float* phi,
                                               int feature_map, bool is_key, int lane) {
    float z[kProjected / 32];
    float highest = 0.0f, lowest = 0.0f;
#pragma unroll
    for (int i = 0; i < kProjected / 32; ++i) {
        z[i] = 0.0f;
#pragma unroll
        for (const auto& part : partial) z[i] += part[lane + 32 * i];
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

// Asks for W_q and W_k.
template <int kHeadDim, int kFeatures>
__device__ __forceinline__ void copy_token_weights(const DecodeParameters& p,
                                                   DecodeShared<kHeadDim, kFeatures, true>& shared, int64_t head,
                                                   int thread) {
    constexpr int kSize = kHeadDim * (kFeatures / 2);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const uint16_t* from = (side ? p.weight_k : p.weight_q) + head * kSize;
#pragma unroll
        for (int i = 0; i < kSize; i += kUnit * kDecodeThreads)
            copy_async(&shared.weights[side][0][0] + i + kUnit * thread, from + i + kUnit * thread, true);
    }
    copy_async_commit();
}

// Leaves φ(q) and φ(k) in shared memory, whose `inputs` are there.
template <int kHeadDim, int kFeatures>
__device__ __forceinline__ void make_token_features(int feature_map, DecodeShared<kHeadDim, kFeatures, true>& shared,
                                                    int thread) {
    constexpr int kProjected = kFeatures / 2, kUnits = kProjected / kUnit;
    copy_async_wait<0>();
    __syncthreads();
    // Half of the block works for q, half for k. Neighbouring lanes take neighbouring units of eight columns of W, and the
    // lanes of a warp as many of its rows as there are units for.
    const int warp = thread / 32, lane = thread % 32, side = warp / kSideWarps;
    const int column = lane % kUnits * kUnit, first_row = (warp % kSideWarps) * (32 / kUnits) + lane / kUnits;
    float sums[kUnit] = {};
#pragma unroll 4
    for (int d = first_row; d < kHeadDim; d += kSideWarps * 32 / kUnits) {
        const uint16_t* weights = &shared.weights[side][d][column];
        const uint4 unit = *reinterpret_cast<const uint4*>(weights);
        const float x = shared.inputs[side][d];
        const uint32_t pairs[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[2 * i] += x * low_bf16(pairs[i]);
            sums[2 * i + 1] += x * high_bf16(pairs[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
#pragma unroll
        for (int lane_mask = kUnits; lane_mask < 32; lane_mask *= 2) sums[i] += shuffle_xor(sums[i], lane_mask);
        if (lane < kUnits) shared.partial[side][warp % kSideWarps][column + i] = sums[i];
    }
    __syncthreads();
    if (warp % kSideWarps == 0)
        activate_token<kProjected>(shared.partial[side], shared.phi[side], feature_map, side == 1, lane);
}

template <int kHeadDim, int kFeatures, bool kFused, int kSplits>
__global__ void __launch_bounds__(kDecodeThreads, 3)
    linear_attention_decode(const __grid_constant__ DecodeParameters p) {
    using Shared = DecodeShared<kHeadDim, kFeatures, kFused>;
    auto& shared = *reinterpret_cast<Shared*>(dynamic_shared_memory());
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int64_t split = blockIdx.x, head = blockIdx.y, row = blockIdx.z;
    const int64_t batch_head = row * p.heads + head;
    if constexpr (kFused) copy_token_weights(p, shared, head, thread);

    // Four columns of S a thread, rows in turn.
    constexpr int kColumns = kHeadDim / kSplits, kThreadsPerRow = kColumns / 4;
    constexpr int kRowGroups = kDecodeThreads / kThreadsPerRow, kRows = kFeatures / kRowGroups;
    constexpr int kWindow = kRows < kDecodeWindow ? kRows : kDecodeWindow;
    static_assert(kFeatures % kRowGroups == 0 && kRows % kWindow == 0, "every thread has as many rows");
    const int column = thread % kThreadsPerRow * 4, row_group = thread / kThreadsPerRow;
    float* state = p.kv_state + batch_head * kFeatures * kHeadDim + row_group * kHeadDim + split * kColumns + column;
    const auto row_of_state = [state](int i) { return reinterpret_cast<float4*>(state + i * kRowGroups * kHeadDim); };
    float4 window[kWindow];
#pragma unroll
    for (int i = 0; i < kWindow; ++i) window[i] = load_streaming(row_of_state(i));

    const int64_t kv_head = static_cast<int>(blockIdx.y) / p.group;
    float value[4];
    const uint16_t* v = p.v + row * p.v_batch_stride + kv_head * p.v_head_stride + split * kColumns + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = bf16_value(v[i]);
    const bool real = p.mask == nullptr || p.mask[row];
    float k_sum = thread < kFeatures ? p.k_sum[batch_head * kFeatures + thread] : 0.0f;

    const uint16_t* q = p.q + row * p.q_batch_stride + head * p.q_head_stride;
    const uint16_t* k = p.k + row * p.k_batch_stride + (kFused ? kv_head : head) * p.k_head_stride;
    if constexpr (kFused) {
        static_assert(2 * kHeadDim <= kDecodeThreads, "a thread for each input");
        if (thread < 2 * kHeadDim)
            shared.inputs[thread / kHeadDim][thread % kHeadDim] =
                bf16_value(thread < kHeadDim ? q[thread] : k[thread - kHeadDim]);
        make_token_features(p.feature_map, shared, thread);
    } else {
        static_assert(kFeatures <= kDecodeThreads, "a thread for each feature");
        if (thread < kFeatures) {
            shared.phi[0][thread] = bf16_value(q[thread]);
            shared.phi[1][thread] = bf16_value(k[thread]);
        }
    }
    __syncthreads();

    // The denominator, from the old z and φ(k): z itself is written last.
    float d = 0.0f;
    if (thread < kFeatures) {
        k_sum += real ? shared.phi[1][thread] : 0.0f;
        d = shared.phi[0][thread] * k_sum;
    }
    d = warp_sum(d);
    if (lane == 0) shared.denominators[warp] = d;

    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int f = row_group + i * kRowGroups;
        const float phi_q = shared.phi[0][f], phi_k = real ? shared.phi[1][f] : 0.0f;
        float4& s = window[i % kWindow];
        s.x += phi_k * value[0];
        s.y += phi_k * value[1];
        s.z += phi_k * value[2];
        s.w += phi_k * value[3];
        sums[0] += phi_q * s.x;
        sums[1] += phi_q * s.y;
        sums[2] += phi_q * s.z;
        sums[3] += phi_q * s.w;
        store_streaming(row_of_state(i), s);
        if (i + kWindow < kRows) s = load_streaming(row_of_state(i + kWindow));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int lane_mask = kThreadsPerRow; lane_mask < 32; lane_mask *= 2)
            sums[i] += shuffle_xor(sums[i], lane_mask);
        if (lane < kThreadsPerRow) shared.outputs[warp * kColumns + column + i] = sums[i];
    }
    __syncthreads();

    if (thread < kColumns) {
        float numerator = 0.0f, denominator = p.eps;
#pragma unroll
        for (int other = 0; other < kDecodeWarps; ++other) {
            numerator += shared.outputs[other * kColumns + thread];
            denominator += shared.denominators[other];
        }
        p.out[batch_head * kHeadDim + split * kColumns + thread] =
            static_cast<uint16_t>(pack_bf16(numerator / denominator, 0.0f) & 0xffff);
    }

    if constexpr (kSplits > 1) {
        if (thread == 0) {
            __threadfence();
            shared.is_last = atomicAdd(p.arrivals + batch_head, 1) == kSplits - 1;
        }
        __syncthreads();
        if (!shared.is_last) return;
        if (thread == 0) p.arrivals[batch_head] = 0;
    }
    if (thread < kFeatures) p.k_sum[batch_head * kFeatures + thread] = k_sum;
}

namespace {

template <class Shape, int kSplits>
cudaError_t run(const DecodeParameters& p, int64_t batch, cudaStream_t stream) {
    return launch(&linear_attention_decode<Shape::kHeadDim, Shape::kFeatures, Shape::kFused, kSplits>,
                  dim3(kSplits, p.heads, static_cast<unsigned>(batch)), kDecodeThreads,
                  static_cast<int>(sizeof(DecodeShared<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>)), stream, p);
}

bool valid(const HedgehogDecodeArguments& a) {
    const bool fused = a.feature_map != HEDGEHOG_GIVEN;
    return a.q && a.k && a.v && a.kv_state && a.k_sum && a.out && (!fused || (a.weight_q && a.weight_k)) &&
           a.feature_map >= HEDGEHOG_GIVEN && a.feature_map <= HEDGEHOG_JOINT && a.batch > 0 && a.batch < 65536 &&
           a.heads > 0 && a.heads < 65536 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 &&
           (a.splits == 1 || ((a.splits == 2 || a.splits == 4) && a.arrivals)) && aligned(a.kv_state, 16) &&
           aligned(a.weight_q, 16) && aligned(a.weight_k, 16);
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
    p.group = static_cast<int32_t>(a.heads / a.kv_heads);
    p.feature_map = a.feature_map;
    p.eps = a.eps;
    const auto stream = static_cast<cudaStream_t>(a.stream);
    return for_shape(a.head_dim, a.features, a.feature_map, cudaErrorInvalidValue, [&](auto shape) {
        using Shape = decltype(shape);
        return a.splits == 1   ? run<Shape, 1>(p, a.batch, stream)
               : a.splits == 2 ? run<Shape, 2>(p, a.batch, stream)
                               : run<Shape, 4>(p, a.batch, stream);
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
