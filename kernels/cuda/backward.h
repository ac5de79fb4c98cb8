// What the units of the backward pass have of each other.
#pragma once

#include "backward.cuh"
#include "launches.h"

namespace hedgehog {

// The first sweep over one slice of the values.
cudaError_t launch_query_gradients(const HedgehogForwardArguments& forward, const BackwardParameters& p);

// The second sweep over one slice: the states after the segments, then all segments, group member by group member.
cudaError_t launch_key_gradients(const HedgehogForwardArguments& forward, BackwardParameters p);

int32_t key_gradients_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map);

}  // namespace hedgehog
