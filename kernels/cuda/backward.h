// What the units of the backward pass have of each other.
#pragma once

#include "backward.cuh"
#include "launches.h"

namespace hedgehog {

// The first sweep over one slice of the values.
cudaError_t launch_query_gradients(const HedgehogForwardArguments& forward, const BackwardParameters& p);

// The second sweep over one slice: the states after the segments, then all segments, group member by group member.
cudaError_t launch_key_gradients(const HedgehogForwardArguments& forward, BackwardParameters p);

// What is left after sweeps that took the values whole: dq, dk and the weights' gradients from dz, which waits in dq and dk.
cudaError_t launch_input_gradients(const HedgehogForwardArguments& forward, const BackwardParameters& p);

// One pass of a sweep over `grid` by the wgmma kernels: there in builds with HEDGEHOG_SM_90A (build.py) and in the emulation.
#if defined(HEDGEHOG_SM_90A) || !defined(__CUDACC__)
constexpr bool kHasWgmma = true;
cudaError_t launch_query_gradients_hopper(dim3 grid, cudaStream_t stream, const BackwardParameters& p);
cudaError_t launch_key_gradients_hopper(dim3 grid, cudaStream_t stream, const BackwardParameters& p);
#else
constexpr bool kHasWgmma = false;
inline cudaError_t launch_query_gradients_hopper(dim3, cudaStream_t, const BackwardParameters&) {
    return cudaErrorInvalidValue;
}
inline cudaError_t launch_key_gradients_hopper(dim3, cudaStream_t, const BackwardParameters&) {
    return cudaErrorInvalidValue;
}
#endif

// action(BackwardShape<…>) of the kernels that serve, or `otherwise` where there are none.
template <class Result, class Action>
Result for_backward_shape(int32_t head_dim, int32_t features, int32_t feature_map, int32_t kernel, Result otherwise,
                          Action action) {
    return for_shape(head_dim, features, feature_map, otherwise, [&](auto shape) -> Result {
        using Shape = decltype(shape);
        constexpr int kHeadDim = Shape::kHeadDim, kFeatures = Shape::kFeatures;
        if (kernel == HEDGEHOG_SLICES)
            return action(BackwardShape<kHeadDim, kFeatures, Shape::kFused, HEDGEHOG_SLICES>{});
        if constexpr (takes_whole(kHeadDim, kFeatures, Shape::kFused)) {
            if (kernel == HEDGEHOG_WHOLE) return action(BackwardShape<kHeadDim, kFeatures, true, HEDGEHOG_WHOLE>{});
            if (kernel == HEDGEHOG_WHOLE_WGMMA && kHasWgmma)
                return action(BackwardShape<kHeadDim, kFeatures, true, HEDGEHOG_WHOLE_WGMMA>{});
        }
        return otherwise;
    });
}

int32_t key_gradients_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map, int32_t kernel);

}  // namespace hedgehog
