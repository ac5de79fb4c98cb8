// The instance of the backward's first sweep on wgmma, and its launch.
#ifndef HEDGEHOG_SM_90A
#define HEDGEHOG_SM_90A  // compiled on its own, by compile_check.py
#endif
#include "backward_queries.cuh"

#include "backward.h"

namespace hedgehog {

// See forward.cu.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                                  \
    static_assert(QueryLayout<head_dim, features, true, map>::kBytes <= shared_bytes && registers <= 255, \
                  "linear_attention_query_gradients<" #head_dim "," #features "," #map "> takes more than declared")
constexpr int wgmma = HEDGEHOG_WHOLE_WGMMA;
RESOURCES(128, 256, wgmma, 255, 211456);
#undef RESOURCES

cudaError_t launch_query_gradients_hopper(dim3 grid, cudaStream_t stream, const BackwardParameters& p) {
    using Layout = QueryLayout<128, 256, true, wgmma>;
    return launch(&linear_attention_query_gradients<128, 256, true, wgmma>, grid, Layout::kThreads, Layout::kBytes,
                  stream, p);
}

}  // namespace hedgehog
