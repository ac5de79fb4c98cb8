// Runs the kernels under AddressSanitizer on arrays of exactly the size they may touch, each an allocation of its own.
// An access outside of one, or of a block's shared memory, ends the program. Numbers are another test's business.
#include <memory>

#include "interface.h"
#include "primitives.cuh"

namespace {

template <class Element>
struct Array {
    std::unique_ptr<Element[]> data;
    explicit Array(int64_t size, Element value = Element()) : data(new Element[size]) {
        std::fill_n(data.get(), size, value);
    }
    operator Element*() const { return data.get(); }
};

// bfloat16 numbers of either sign between 2^-7 and 2 in size, others with every call.
Array<uint16_t> numbers(int64_t size) {
    static uint32_t random = 1;
    Array<uint16_t> result(size);
    for (int64_t i = 0; i < size; ++i) {
        random = random * 1664525u + 1013904223u;
        result[i] = static_cast<uint16_t>((random >> 16 & 0x8000u) | 0x3c00u | (random >> 8 & 0x3ffu));
    }
    return result;
}

// Padding at both ends and a hole; one token alone is real.
Array<uint8_t> padding(int64_t length) {
    Array<uint8_t> mask(length, 1);
    for (int64_t i = 0; length > 1 && i < length; ++i) mask[i] = i >= length / 9 && i < length - length / 5 && i % 13 != 6;
    return mask;
}

int check(int32_t error, const char* what, int64_t length) {
    if (error == 0) return 0;
    std::fprintf(stderr, "%s, %lld tokens: %s\n", what, static_cast<long long>(length), hedgehog_error_string(error));
    return 1;
}

int sequence(int head_dim, int features, int feature_map, int64_t length, int segments, bool backwards,
             int64_t kv_heads = 1, HedgehogForwardKernel kernel = HEDGEHOG_MMA,
             HedgehogBackwardKernel backward_kernel = HEDGEHOG_SLICES) {
    const int64_t batch = 1, heads = 2;
    const bool given = feature_map == HEDGEHOG_GIVEN;
    const int64_t k_heads = given ? heads : kv_heads, width = given ? features : head_dim;
    Array<uint16_t> q = numbers(batch * heads * length * width), k = numbers(batch * k_heads * length * width);
    Array<uint16_t> v = numbers(batch * kv_heads * length * head_dim), out(batch * heads * length * head_dim);
    Array<uint16_t> weight_q = numbers(heads * head_dim * features / 2), weight_k = numbers(heads * head_dim * features / 2);
    Array<uint8_t> mask = padding(batch * length);
    Array<int32_t> runs(batch * length);
    Array<float> kv(batch * heads * features * head_dim), k_sum(batch * heads * features);
    Array<float> final_kv(batch * heads * features * head_dim), final_k_sum(batch * heads * features);
    Array<float> denominator(batch * heads * length);
    for (int64_t i = 0; i < batch * length; ++i) runs[i] = int32_t(i % length / 50);

    HedgehogForwardArguments a{};
    a.q = q, a.k = k, a.v = v, a.mask = mask, a.runs = runs, a.initial_kv = kv, a.initial_k_sum = k_sum;
    if (!given) a.weight_q = weight_q, a.weight_k = weight_k;
    a.out = out, a.denominator = denominator, a.final_kv = final_kv, a.final_k_sum = final_k_sum;
    a.q_stride = {heads * length * width, length * width, width};
    a.k_stride = {k_heads * length * width, length * width, width};
    a.v_stride = {kv_heads * length * head_dim, length * head_dim, head_dim};
    a.out_stride = {heads * length * head_dim, head_dim, heads * head_dim};
    a.batch = batch, a.heads = heads, a.kv_heads = kv_heads, a.length = length;
    a.head_dim = head_dim, a.features = features, a.feature_map = feature_map, a.segments = segments;
    a.eps = 1e-30f, a.kernel = kernel;
    Array<unsigned char> scratch(hedgehog_scratch_bytes(&a));
    a.scratch = hedgehog_scratch_bytes(&a) ? scratch.data.get() : nullptr;
    const int failures = check(hedgehog_forward(&a), "forward", length);
    if (!backwards) return failures;

    Array<uint16_t> grad_out = numbers(batch * heads * length * head_dim), grad_q(batch * heads * length * width);
    Array<uint16_t> grad_k(batch * k_heads * length * width), grad_v(batch * kv_heads * length * head_dim);
    const int64_t weights = hedgehog_num_segments(length, segments) * batch * heads * head_dim * features / 2;
    Array<float> grad_weight_q(weights), grad_weight_k(weights);
    Array<float> grad_kv(batch * heads * features * head_dim), grad_k_sum(batch * heads * features);
    Array<float> grad_denominator(hedgehog_num_slices(head_dim, features, backward_kernel) * batch * heads * length);
    const bool in_grad_v = heads == kv_heads;
    Array<unsigned char> more_scratch(hedgehog_backward_scratch_bytes(&a, backward_kernel));
    HedgehogBackwardArguments b{};
    b.kernel = backward_kernel;
    b.forward = a;
    b.forward.scratch = hedgehog_backward_scratch_bytes(&a, backward_kernel) ? more_scratch.data.get() : nullptr;
    b.grad_out = grad_out, b.grad_final_kv = final_kv, b.grad_final_k_sum = final_k_sum;
    b.grad_q = grad_q, b.grad_k = grad_k, b.grad_v = grad_v;
    if (!in_grad_v) b.grad_denominator = grad_denominator;
    if (!given) b.grad_weight_q = grad_weight_q, b.grad_weight_k = grad_weight_k;
    b.grad_initial_kv = grad_kv, b.grad_initial_k_sum = grad_k_sum;
    b.grad_out_stride = {heads * length * head_dim, length * head_dim, head_dim};
    b.grad_q_stride = a.q_stride, b.grad_k_stride = a.k_stride, b.grad_v_stride = a.v_stride;
    return failures + check(hedgehog_backward(&b), "backward", length);
}

int decode(int head_dim, int features, int feature_map, int splits) {
    const int64_t batch = 2, heads = 2, kv_heads = 1;
    const bool given = feature_map == HEDGEHOG_GIVEN;
    const int64_t k_heads = given ? heads : kv_heads, width = given ? features : head_dim;
    Array<uint16_t> q = numbers(batch * heads * width), k = numbers(batch * k_heads * width);
    Array<uint16_t> v = numbers(batch * kv_heads * head_dim), out(batch * heads * head_dim);
    Array<uint16_t> weight_q = numbers(heads * head_dim * features / 2), weight_k = numbers(heads * head_dim * features / 2);
    Array<uint8_t> mask(batch, 1);
    mask[1] = 0;
    Array<float> kv(batch * heads * features * head_dim), k_sum(batch * heads * features);
    Array<int32_t> arrivals(batch * heads);
    HedgehogDecodeArguments a{};
    a.q = q, a.k = k, a.v = v, a.mask = mask, a.kv_state = kv, a.k_sum = k_sum, a.out = out, a.arrivals = arrivals;
    if (!given) a.weight_q = weight_q, a.weight_k = weight_k;
    a.q_batch_stride = heads * width, a.k_batch_stride = k_heads * width, a.v_batch_stride = kv_heads * head_dim;
    a.q_head_stride = a.k_head_stride = width, a.v_head_stride = head_dim;
    a.batch = batch, a.heads = heads, a.kv_heads = kv_heads;
    a.head_dim = head_dim, a.features = features, a.feature_map = feature_map, a.splits = splits;
    a.eps = 1e-30f;
    return check(hedgehog_decode(&a), "decode", 1);
}

}  // namespace

int main() {
    int failures = 0;
    for (int feature_map : {HEDGEHOG_SOFTMAX, HEDGEHOG_GIVEN}) {
        failures += sequence(64, 128, feature_map, 1, 1, true);
        failures += sequence(64, 128, feature_map, 65, 1, false);
        failures += sequence(64, 256, feature_map, 66, 2, feature_map == HEDGEHOG_GIVEN);
        failures += sequence(128, 128, feature_map, 130, 3, false);
        failures += sequence(128, 256, feature_map, 63, 1, false);
        for (int splits : {1, 2, 4}) failures += decode(128, 256, feature_map, splits);
        failures += decode(64, 128, feature_map, 4);
    }
    for (int feature_map : {HEDGEHOG_EXP, HEDGEHOG_JOINT}) {
        failures += sequence(64, 128, feature_map, 66, 2, true);
        failures += decode(64, 128, feature_map, 2);
    }
    failures += sequence(64, 256, HEDGEHOG_SOFTMAX, 65, 1, true);
    failures += sequence(128, 256, HEDGEHOG_GIVEN, 3, 1, true);
    failures += sequence(128, 256, HEDGEHOG_SOFTMAX, 66, 2, true, 2);
    failures += sequence(128, 256, HEDGEHOG_SOFTMAX, 66, 2, true, 2, HEDGEHOG_MMA, HEDGEHOG_WHOLE);
    failures += sequence(128, 128, HEDGEHOG_SOFTMAX, 3, 1, true);
    failures += sequence(128, 128, HEDGEHOG_SOFTMAX, 130, 2, false, 1, HEDGEHOG_WGMMA);
    failures += sequence(128, 256, HEDGEHOG_EXP, 65, 1, false, 2, HEDGEHOG_WGMMA);
    return failures != 0;
}
