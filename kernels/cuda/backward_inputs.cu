// The instances of what the backward's sweeps leave to do where they took the values whole, and their launch.
#include "backward_inputs.cuh"

#include "backward.h"

namespace hedgehog {

// See forward.cu.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                                           \
    static_assert(map == fused && InputLayout<head_dim, features>::kBytes <= shared_bytes && registers <= 128, \
                  "linear_attention_input_gradients<" #head_dim "," #features "," #map "> takes more than declared")
constexpr bool fused = true;
RESOURCES(128, 256, fused, 128, 98304);
#undef RESOURCES

cudaError_t launch_input_gradients(const HedgehogForwardArguments& a, const BackwardParameters& p) {
    static_assert(takes_whole(128, 256, fused), "the one shape");
    InputParameters inputs{};
    inputs.q = p.q;
    inputs.k = p.k;
    inputs.weight_q = p.weight_q;
    inputs.weight_k = p.weight_k;
    inputs.grad_q = p.grad_q;
    inputs.grad_k = p.grad_k;
    inputs.grad_weight_q = p.grad_weight_q;
    inputs.grad_weight_k = p.grad_weight_k;
    inputs.q_stride = p.q_stride;
    inputs.k_stride = p.k_stride;
    inputs.grad_q_stride = p.grad_q_stride;
    inputs.grad_k_stride = p.grad_k_stride;
    inputs.length = p.length;
    inputs.num_chunks = p.num_chunks;
    inputs.chunks_per_segment = p.chunks_per_segment;
    inputs.heads = p.heads;
    inputs.segments = p.segments;
    using Layout = InputLayout<128, 256>;
    return launch(&linear_attention_input_gradients<128, 256, true>, dim3(p.segments, p.heads, 2 * p.batch),
                  Layout::kThreads, Layout::kBytes, static_cast<cudaStream_t>(a.stream), inputs);
}

}  // namespace hedgehog
