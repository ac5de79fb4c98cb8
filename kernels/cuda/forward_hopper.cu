// Host side of the wgmma kernel: what it serves, its resources, its launch. See forward_hopper.cuh for the kernel itself.
#ifndef HEDGEHOG_SM_90A
#define HEDGEHOG_SM_90A  // compiled on its own, by compile_check.py
#endif
#include "forward_hopper.cuh"
#include "forward_hopper.h"

namespace hedgehog {

// As in forward.cu. 168 registers are what 384 threads can have; the warpgroups then share them out (setmaxnreg).
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                  \
    static_assert(HopperLayout<head_dim, features>::kBytes <= shared_bytes && map == fused &&        \
                      registers * kHopperThreads <= 65536,                                           \
                  "linear_attention_forward_hopper<" #head_dim "," #features "," #map "> takes more than declared")
constexpr bool fused = true;
RESOURCES(128, 128, fused, 168, 158720);
RESOURCES(128, 256, fused, 168, 226304);
#undef RESOURCES

bool has_hopper(int32_t head_dim, int32_t features, int32_t feature_map) {
    return head_dim == 128 && (features == 128 || features == 256) && feature_map != HEDGEHOG_GIVEN;
}

template <int kFeatures>
cudaError_t launch_features(const HedgehogForwardArguments& a, const ForwardParameters& p) {
    return launch(&linear_attention_forward_hopper<128, kFeatures, true>,
                  dim3(p.segments, p.heads, static_cast<unsigned>(a.batch)), kHopperThreads,
                  HopperLayout<128, kFeatures>::kBytes, static_cast<cudaStream_t>(a.stream), p);
}

cudaError_t launch_hopper(const HedgehogForwardArguments& a, const ForwardParameters& p) {
    return a.features == 128 ? launch_features<128>(a, p) : launch_features<256>(a, p);
}

}  // namespace hedgehog
