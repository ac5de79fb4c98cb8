// The wgmma kernel as forward.cu sees it: there in builds with HEDGEHOG_SM_90A (build.py) and in the emulation.
#pragma once

#include "forward.cuh"
#include "launches.h"

namespace hedgehog {

#if defined(HEDGEHOG_SM_90A) || !defined(__CUDACC__)
bool has_hopper(int32_t head_dim, int32_t features, int32_t feature_map);
// All segments at once. What `serves_hopper` refuses, it does not take.
cudaError_t launch_hopper(const HedgehogForwardArguments& arguments, const ForwardParameters& parameters);
#else
inline bool has_hopper(int32_t, int32_t, int32_t) { return false; }
inline cudaError_t launch_hopper(const HedgehogForwardArguments&, const ForwardParameters&) {
    return cudaErrorInvalidValue;
}
#endif

inline bool serves_hopper(const HedgehogForwardArguments& a) {
    return has_hopper(a.head_dim, a.features, a.feature_map) && aligned(a.out, 16) && aligned(a.out_stride, kUnit);
}

}  // namespace hedgehog
