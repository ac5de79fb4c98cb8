// The instances of the backward's first sweep, and their launch.
#include "backward_queries.cuh"

#include "backward.h"

namespace hedgehog {

// See forward.cu.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                               \
    static_assert(QueryLayout<head_dim, features, map == fused>::kBytes <= shared_bytes && registers <= 255,      \
                  "linear_attention_query_gradients<" #head_dim "," #features "," #map "> takes more than declared")
constexpr bool given = false, fused = true;
RESOURCES(64, 128, fused, 216, 79360);
RESOURCES(64, 256, fused, 255, 129024);
RESOURCES(128, 128, fused, 240, 129024);
RESOURCES(128, 256, fused, 255, 161792);
RESOURCES(64, 128, given, 216, 62976);
RESOURCES(64, 256, given, 240, 96256);
RESOURCES(128, 128, given, 240, 79872);
RESOURCES(128, 256, given, 240, 96256);
#undef RESOURCES

cudaError_t launch_query_gradients(const HedgehogForwardArguments& a, const BackwardParameters& p) {
    return for_shape(a.head_dim, a.features, a.feature_map, cudaErrorInvalidValue, [&](auto shape) {
        using Shape = decltype(shape);
        using Layout = QueryLayout<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>;
        return launch(&linear_attention_query_gradients<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>,
                      dim3(p.segments, p.heads, p.batch), Layout::kThreads, Layout::kBytes,
                      static_cast<cudaStream_t>(a.stream), p);
    });
}

}  // namespace hedgehog
