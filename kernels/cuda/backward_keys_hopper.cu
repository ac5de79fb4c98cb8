// The instance of the backward's second sweep on wgmma, and its launch.
#ifndef HEDGEHOG_SM_90A
#define HEDGEHOG_SM_90A  // compiled on its own, by compile_check.py
#endif
#include "backward_keys.cuh"

#include "backward.h"

namespace hedgehog {

// See forward.cu.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                                  \
    static_assert(KeyLayout<head_dim, features, true, map>::kBytes <= shared_bytes && registers <= 255, \
                  "linear_attention_key_gradients<" #head_dim "," #features "," #map "> takes more than declared")
constexpr int wgmma = HEDGEHOG_WHOLE_WGMMA;
RESOURCES(128, 256, wgmma, 255, 216320);
#undef RESOURCES

cudaError_t launch_key_gradients_hopper(dim3 grid, cudaStream_t stream, const BackwardParameters& p) {
    using Layout = KeyLayout<128, 256, true, wgmma>;
    return launch(&linear_attention_key_gradients<128, 256, true, wgmma>, grid, Layout::kThreads, Layout::kBytes,
                  stream, p);
}

}  // namespace hedgehog
