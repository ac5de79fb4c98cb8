// The instances of the backward's first sweep, and their launch.
#include "backward_queries.cuh"

#include "backward.h"

namespace hedgehog {

// See forward.cu.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                               \
    static_assert(QueryLayout<head_dim, features, map != given, map == whole ? whole : fused>::kBytes <= shared_bytes && registers <= 255,      \
                  "linear_attention_query_gradients<" #head_dim "," #features "," #map "> takes more than declared")
constexpr int fused = HEDGEHOG_SLICES, whole = HEDGEHOG_WHOLE, given = -1;
RESOURCES(64, 128, fused, 216, 79360);
RESOURCES(64, 256, fused, 255, 129024);
RESOURCES(128, 128, fused, 240, 129024);
RESOURCES(128, 256, fused, 255, 161792);
RESOURCES(128, 256, whole, 255, 211456);
RESOURCES(64, 128, given, 216, 62976);
RESOURCES(64, 256, given, 240, 96256);
RESOURCES(128, 128, given, 240, 79872);
RESOURCES(128, 256, given, 240, 96256);
#undef RESOURCES

cudaError_t launch_query_gradients(const HedgehogForwardArguments& a, const BackwardParameters& p) {
    const auto stream = static_cast<cudaStream_t>(a.stream);
    const dim3 grid(p.segments, p.heads, p.batch);
    const auto launch_sweep = [&](auto shape) -> cudaError_t {
        using Shape = decltype(shape);
        constexpr int kHeadDim = Shape::kHeadDim, kFeatures = Shape::kFeatures, kKernel = Shape::kKernelNumber;
        if constexpr (Shape::kWgmma)
            return launch_query_gradients_hopper(grid, stream, p);
        else
            return launch(&linear_attention_query_gradients<kHeadDim, kFeatures, Shape::kFused, kKernel>, grid,
                          Shape::kThreads, QueryLayout<kHeadDim, kFeatures, Shape::kFused, kKernel>::kBytes, stream, p);
    };
    return for_backward_shape(a.head_dim, a.features, a.feature_map, p.kernel, cudaErrorInvalidValue, launch_sweep);
}

}  // namespace hedgehog
