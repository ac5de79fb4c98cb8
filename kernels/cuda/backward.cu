// Host side of the backward pass: checks, and the order of its launches. See backward.cuh for the mathematics.
//
//   1. S and z before each segment, as for the forward pass        3. R and r after each segment
//   2. first sweep: dq, dW_q, dd                                   4. second sweep: dk, dv, dW_k
//   5. where the sweeps took the values whole: dq, dk, dW_q, dW_k from their dz (backward_inputs.cuh)
//
// 2, and then 3 and 4, come once for each slice of the values, and 4 once for each query head that shares a key head: what
// several launches give to one address is added up in their order, never by atomics, so that results are the same each time.
// Beyond inputs and results there is one state per segment. dd, a float a token, head and slice, waits in dv: a slice's at the
// head of its columns, which the second sweep reads before it writes them. Where query heads share a key head dv has no room
// for the dd of them all, since it is added to from the first of them on: then dd is scratch.
#include "backward.h"

namespace hedgehog {
namespace {

bool valid(const HedgehogBackwardArguments& b) {
    const HedgehogForwardArguments& a = b.forward;
    const bool fused = a.feature_map != HEDGEHOG_GIVEN;
    if (b.kernel != HEDGEHOG_SLICES && !(aligned(b.grad_q, 16) && aligned(b.grad_k, 16) &&
                                         aligned(b.grad_q_stride, kUnit) && aligned(b.grad_k_stride, kUnit)))
        return false;
    return hedgehog_has_backward(&a, b.kernel) && valid_inputs(a) && b.grad_out && b.grad_q && b.grad_k && b.grad_v &&
           (b.grad_denominator || a.heads == a.kv_heads) &&
           (!fused || (b.grad_weight_q && b.grad_weight_k)) && !b.grad_final_kv == !b.grad_final_k_sum &&
           !b.grad_initial_kv == !b.grad_initial_k_sum && aligned(b.grad_out, 16) &&
           aligned(b.grad_out_stride, kUnit) && aligned(b.grad_q, 4) && aligned(b.grad_k, 4) && aligned(b.grad_v, 4) &&
           aligned(b.grad_q_stride, 2) && aligned(b.grad_k_stride, 2) && aligned(b.grad_v_stride, 2) &&
           (hedgehog_backward_scratch_bytes(&a, b.kernel) == 0 || a.scratch);
}

BackwardParameters parameters_of(const HedgehogBackwardArguments& b) {
    const HedgehogForwardArguments& a = b.forward;
    const Segments segments = split(a.length, a.segments);
    BackwardParameters p{};
    p.q = static_cast<const uint16_t*>(a.q);
    p.k = static_cast<const uint16_t*>(a.k);
    p.v = static_cast<const uint16_t*>(a.v);
    p.weight_q = static_cast<const uint16_t*>(a.weight_q);
    p.weight_k = static_cast<const uint16_t*>(a.weight_k);
    p.grad_out = static_cast<const uint16_t*>(b.grad_out);
    p.mask = static_cast<const uint8_t*>(a.mask);
    p.runs = static_cast<const int32_t*>(a.runs);
    p.denominator = static_cast<const float*>(a.denominator);
    p.initial_kv = static_cast<const float*>(a.initial_kv);
    p.initial_k_sum = static_cast<const float*>(a.initial_k_sum);
    p.grad_final_kv = static_cast<const float*>(b.grad_final_kv);
    p.grad_final_k_sum = static_cast<const float*>(b.grad_final_k_sum);
    p.grad_q = static_cast<uint16_t*>(b.grad_q);
    p.grad_k = static_cast<uint16_t*>(b.grad_k);
    p.grad_v = static_cast<uint16_t*>(b.grad_v);
    p.grad_weight_q = static_cast<float*>(b.grad_weight_q);
    p.grad_weight_k = static_cast<float*>(b.grad_weight_k);
    p.grad_initial_kv = static_cast<float*>(b.grad_initial_kv);
    p.grad_initial_k_sum = static_cast<float*>(b.grad_initial_k_sum);
    if (b.grad_denominator) {
        p.grad_denominator = static_cast<float*>(b.grad_denominator);
        p.grad_denominator_stride = {a.heads * a.length, a.length, 1};
        p.grad_denominator_slice = a.batch * a.heads * a.length;
    } else {
        const HedgehogStrides& v = b.grad_v_stride;
        p.grad_denominator = static_cast<float*>(b.grad_v);
        p.grad_denominator_stride = {v.batch / 2, v.head / 2, v.token / 2};  // in floats, of two bf16 each
        p.grad_denominator_slice = a.head_dim / hedgehog_num_slices(a.head_dim, a.features, b.kernel) / 2;
    }
    p.segment_states = static_cast<float*>(a.scratch);
    p.q_stride = a.q_stride;
    p.k_stride = a.k_stride;
    p.v_stride = a.v_stride;
    p.grad_out_stride = b.grad_out_stride;
    p.grad_q_stride = b.grad_q_stride;
    p.grad_k_stride = b.grad_k_stride;
    p.grad_v_stride = b.grad_v_stride;
    p.length = a.length;
    p.num_chunks = static_cast<int32_t>(segments.num_chunks);
    p.chunks_per_segment = static_cast<int32_t>(segments.chunks_per_segment);
    p.batch = static_cast<int32_t>(a.batch);
    p.heads = static_cast<int32_t>(a.heads);
    p.group = static_cast<int32_t>(a.heads / a.kv_heads);
    p.feature_map = a.feature_map;
    p.segments = segments.count;
    p.eps = a.eps;
    p.kernel = b.kernel;
    return p;
}

}  // namespace
}  // namespace hedgehog

extern "C" int32_t hedgehog_has_backward(const HedgehogForwardArguments* a, int32_t kernel) {
    using namespace hedgehog;
    const auto there = [](auto) { return true; };
    if (!for_backward_shape(a->head_dim, a->features, a->feature_map, kernel, false, there)) return false;
    // Whole, dk waits in pieces where it will be: of query heads that share a key head it is a sum, and has no place for each
    // addend. The last kernel has two blocks for each row of the batch.
    return kernel == HEDGEHOG_SLICES || (a->heads == a->kv_heads && 2 * a->batch <= 65535);
}

extern "C" int32_t hedgehog_num_slices(int32_t head_dim, int32_t features, int32_t kernel) {
    using namespace hedgehog;
    if (kernel != HEDGEHOG_SLICES) return 1;
    const auto slices = [](auto shape) -> int { return decltype(shape)::kSlices; };
    return for_backward_shape(head_dim, features, HEDGEHOG_GIVEN, HEDGEHOG_SLICES, 0, slices);
}

extern "C" int64_t hedgehog_backward_scratch_bytes(const HedgehogForwardArguments* a, int32_t kernel) {
    const int64_t states = (hedgehog::split(a->length, a->segments).count - 1) * a->batch * a->heads;
    const int64_t slices = hedgehog_num_slices(a->head_dim, a->features, kernel);
    return states * a->features * (a->head_dim + slices) * int64_t(sizeof(float));
}

extern "C" int32_t hedgehog_backward_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map,
                                                  int32_t kernel) {
    return hedgehog::key_gradients_shared_bytes(head_dim, features, feature_map, kernel);
}

extern "C" int32_t hedgehog_backward(const HedgehogBackwardArguments* arguments) {
    using namespace hedgehog;
    if (!valid(*arguments)) return cudaErrorInvalidValue;
    const HedgehogForwardArguments& a = arguments->forward;
    const int32_t slices = hedgehog_num_slices(a.head_dim, a.features, arguments->kernel);
    BackwardParameters p = parameters_of(*arguments);
    cudaError_t error = fill_segment_states(a);
    for (p.slice = 0; error == cudaSuccess && p.slice < slices; ++p.slice) error = launch_query_gradients(a, p);
    for (p.slice = 0; error == cudaSuccess && p.slice < slices; ++p.slice) error = launch_key_gradients(a, p);
    if (error == cudaSuccess && p.kernel != HEDGEHOG_SLICES) error = launch_input_gradients(a, p);
    return error;
}
