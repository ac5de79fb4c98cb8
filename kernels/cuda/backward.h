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

// action(BackwardShape<…>) of the kernels that serve, or `otherwise` where there are none.
template <class Result, class Action>
Result for_backward_shape(int32_t head_dim, int32_t features, int32_t feature_map, bool whole, Result otherwise,
                          Action action) {
    return for_shape(head_dim, features, feature_map, otherwise, [&](auto shape) -> Result {
        using Shape = decltype(shape);
        constexpr int kHeadDim = Shape::kHeadDim, kFeatures = Shape::kFeatures;
        if constexpr (has_whole(kHeadDim, kFeatures, Shape::kFused))
            if (whole) return action(BackwardShape<kHeadDim, kFeatures, true, true>{});
        return whole ? otherwise : action(BackwardShape<kHeadDim, kFeatures, Shape::kFused, false>{});
    });
}

int32_t key_gradients_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map, bool whole);

}  // namespace hedgehog
