// The instances of the backward's second sweep, the sums over segments from the end, and the launches.
#include "backward_keys.cuh"

#include "backward.h"

namespace hedgehog {

// See forward.cu.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                             \
    static_assert(KeyLayout<head_dim, features, map != given, map == whole ? whole : fused>::kBytes <= shared_bytes && registers <= 255,      \
                  "linear_attention_key_gradients<" #head_dim "," #features "," #map "> takes more than declared")
constexpr int fused = HEDGEHOG_SLICES, whole = HEDGEHOG_WHOLE, given = -1;
RESOURCES(64, 128, fused, 200, 100608);
RESOURCES(64, 256, fused, 255, 166656);
RESOURCES(128, 128, fused, 248, 166144);
RESOURCES(128, 256, fused, 255, 166656);
RESOURCES(128, 256, whole, 255, 215808);
RESOURCES(64, 128, given, 96, 84224);
RESOURCES(64, 256, given, 160, 133888);
RESOURCES(128, 128, given, 168, 116992);
RESOURCES(128, 256, given, 160, 133888);
#undef RESOURCES

// Turns what each segment but the first adds to (R, r) into (R, r) after each segment but the last. Threads run over
// the elements; the gradient of the final state comes in at the end.
struct SuffixParameters {
    float* segment_states;  // of one slice
    const float *grad_final_kv, *grad_final_k_sum;
    const int32_t* runs;
    int64_t length, chunks_per_segment;
    int32_t heads, num_states, state_size, features, head_dim, width, offset;
    bool with_sum;
};

constexpr int kSuffixThreads = 256;

__global__ void __launch_bounds__(kSuffixThreads) segment_suffix(const __grid_constant__ SuffixParameters p) {
    const int element = blockIdx.x * kSuffixThreads + threadIdx.x;
    if (element >= p.state_size) return;
    const int64_t row = blockIdx.z, batch_head = row * p.heads + blockIdx.y;
    float* states = p.segment_states + batch_head * p.num_states * p.state_size + element;
    const int32_t* runs = p.runs ? p.runs + row * p.length : nullptr;
    float after = 0.0f;
    if (p.grad_final_kv) {
        const int feature = element / p.width, column = element % p.width;
        if (feature < p.features)
            after = p.grad_final_kv[(batch_head * p.features + feature) * p.head_dim + p.offset + column];
        else if (p.with_sum)
            after = p.grad_final_k_sum[batch_head * p.features + element - p.features * p.width];
    }
    for (int segment = p.num_states; segment > 0; --segment) {
        const int64_t first = segment * p.chunks_per_segment * kChunk, whole = first + p.chunks_per_segment * kChunk;
        const int64_t stop = whole < p.length ? whole : p.length;
        const bool survives = runs == nullptr || runs[first - 1] == runs[stop - 1];
        float& state = states[int64_t(segment - 1) * p.state_size];
        after = survives ? after + state : state;
        state = after;
    }
}

int32_t key_gradients_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map, int32_t kernel) {
    return for_backward_shape(head_dim, features, feature_map, kernel, 0, [](auto shape) -> int {
        using Shape = decltype(shape);
        return KeyLayout<Shape::kHeadDim, Shape::kFeatures, Shape::kFused, Shape::kKernelNumber>::kBytes;
    });
}

cudaError_t launch_key_gradients(const HedgehogForwardArguments& a, BackwardParameters p) {
    const auto stream = static_cast<cudaStream_t>(a.stream);
    const auto launch_all = [&](auto shape) -> cudaError_t {
        using Shape = decltype(shape);
        using Layout = KeyLayout<Shape::kHeadDim, Shape::kFeatures, Shape::kFused, Shape::kKernelNumber>;
        const auto launch_pass = [&](dim3 grid) {
            if constexpr (Shape::kWgmma)
                return launch_key_gradients_hopper(grid, stream, p);
            else
                return launch(&linear_attention_key_gradients<Shape::kHeadDim, Shape::kFeatures, Shape::kFused,
                                                              Shape::kKernelNumber>,
                              grid, Layout::kThreads, Layout::kBytes, stream, p);
        };
        const auto pass = [&](bool state_only) {
            const dim3 grid(p.segments, p.heads / p.group, p.batch);
            cudaError_t error = cudaSuccess;
            p.state_only = state_only;
            for (p.member = 0; error == cudaSuccess && p.member < p.group; ++p.member)
                error = launch_pass(grid);
            return error;
        };
        if (p.segments > 1) {
            cudaError_t error = pass(true);
            if (error != cudaSuccess) return error;
            const int64_t slice = int64_t(p.slice) * p.batch * p.heads * (p.segments - 1) * Layout::kStateSize;
            const SuffixParameters suffix{p.segment_states + slice,
                                          p.grad_final_kv,
                                          p.grad_final_k_sum,
                                          p.runs,
                                          p.length,
                                          p.chunks_per_segment,
                                          p.heads,
                                          p.segments - 1,
                                          Layout::kStateSize,
                                          Shape::kFeatures,
                                          Shape::kHeadDim,
                                          Layout::kSlice,
                                          p.slice * Layout::kSlice,
                                          p.slice == 0};
            const unsigned blocks = (Layout::kStateSize + kSuffixThreads - 1) / kSuffixThreads;
            error = launch(&segment_suffix, dim3(blocks, p.heads, p.batch), kSuffixThreads, 0, stream, suffix);
            if (error != cudaSuccess) return error;
        }
        return pass(false);
    };
    return for_backward_shape(a.head_dim, a.features, a.feature_map, p.kernel, cudaErrorInvalidValue, launch_all);
}

}  // namespace hedgehog
