// What the host sides of the kernels share: which template serves a shape, how a length is cut, addresses that fit.
#pragma once

#include "interface.h"
#include "tile.cuh"

namespace hedgehog {

template <int kHeadDim_, int kFeatures_, bool kFused_>
struct KernelShape {
    static constexpr int kHeadDim = kHeadDim_, kFeatures = kFeatures_;
    static constexpr bool kFused = kFused_;
};

// action(KernelShape<…>) for the shape at hand, or `otherwise` where there is no kernel for it.
template <class Result, class Action>
Result for_shape(int32_t head_dim, int32_t features, int32_t feature_map, Result otherwise, Action action) {
    const bool fused = feature_map != HEDGEHOG_GIVEN;
    switch (head_dim * 1000 + features) {
        case 64128:
            return fused ? action(KernelShape<64, 128, true>{}) : action(KernelShape<64, 128, false>{});
        case 64256:
            return fused ? action(KernelShape<64, 256, true>{}) : action(KernelShape<64, 256, false>{});
        case 128128:
            return fused ? action(KernelShape<128, 128, true>{}) : action(KernelShape<128, 128, false>{});
        case 128256:
            return fused ? action(KernelShape<128, 256, true>{}) : action(KernelShape<128, 256, false>{});
    }
    return otherwise;
}

// Whether the backward has kernels for the shape that take the values whole (backward.cuh).
constexpr bool takes_whole(int32_t head_dim, int32_t features, bool fused) {
    return head_dim == 128 && features == 256 && fused;
}

struct Segments {
    int64_t num_chunks, chunks_per_segment;
    int32_t count;
};

// At most as many segments as chunks.
inline Segments split(int64_t length, int32_t requested) {
    Segments segments{};
    segments.num_chunks = (length + kChunk - 1) / kChunk;
    const int64_t wanted = requested < 1 ? 1 : requested < segments.num_chunks ? requested : segments.num_chunks;
    segments.chunks_per_segment = (segments.num_chunks + wanted - 1) / wanted;
    segments.count =
        static_cast<int32_t>((segments.num_chunks + segments.chunks_per_segment - 1) / segments.chunks_per_segment);
    return segments;
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline bool aligned(const HedgehogStrides& stride, int elements) {
    return stride.batch % elements == 0 && stride.head % elements == 0 && stride.token % elements == 0;
}

// Whether the inputs that forward and backward share are there and fit the loads.
bool valid_inputs(const HedgehogForwardArguments& arguments);

// The passes that leave S and z before each segment but the first in `scratch`; nothing where there is one segment.
cudaError_t fill_segment_states(const HedgehogForwardArguments& arguments);

}  // namespace hedgehog
