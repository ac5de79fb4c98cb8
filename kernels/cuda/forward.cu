// Host side of the forward kernel: checks, the split into segments, launches. See forward.cuh for the kernel itself.
//
// One block a (row, head) leaves most of a GPU idle when there are few of them. Then the length is cut into segments:
//   1. every segment but the last sums its own state (the kernel with `state_only`),
//   2. a small kernel adds these up, so that each segment finds the state before it,
//   3. all segments run at once.
// Scratch is one state per segment, head and row: it does not grow with the length.
//
// The last pass is the wgmma kernel's where the caller asks for it (forward_hopper.cu); the first always runs here.
#include "forward.cuh"
#include "forward_hopper.h"
#include "launches.h"

namespace hedgehog {

// Turns each segment's own sum into the state after it. Threads run over the elements of (S, z).
struct PrefixParameters {
    float* segment_states;
    const int32_t* runs;
    int64_t length, chunks_per_segment;
    int32_t heads, num_states, state_size;
};

constexpr int kPrefixThreads = 256;

// What each kernel may take of registers and shared memory. The compiler holds the launch to the shared memory, `make
// cuda` (compile_check.py) holds every architecture to the registers, without spills. 255 is all there is.
#define RESOURCES(head_dim, features, map, registers, shared_bytes)                              \
    static_assert(ForwardLayout<head_dim, features, map == fused>::kBytes <= shared_bytes &&     \
                      registers <= 255,                                                          \
                  "linear_attention_forward<" #head_dim "," #features "," #map "> takes more than declared")
constexpr bool given = false, fused = true;
RESOURCES(64, 128, fused, 240, 67072);
RESOURCES(64, 256, fused, 255, 116736);
RESOURCES(128, 128, fused, 240, 108032);
RESOURCES(128, 256, fused, 255, 157696);
RESOURCES(64, 128, given, 160, 50688);
RESOURCES(64, 256, given, 232, 83968);
RESOURCES(128, 128, given, 160, 58880);
RESOURCES(128, 256, given, 232, 92160);
#undef RESOURCES

__global__ void __launch_bounds__(kPrefixThreads) segment_prefix(const __grid_constant__ PrefixParameters p) {
    const int element = blockIdx.x * kPrefixThreads + threadIdx.x;
    if (element >= p.state_size) return;
    const int64_t row = blockIdx.z, batch_head = row * p.heads + blockIdx.y;
    float* states = p.segment_states + batch_head * p.num_states * p.state_size + element;
    const int32_t* runs = p.runs ? p.runs + row * p.length : nullptr;
    float before = states[0];
    for (int segment = 1; segment < p.num_states; ++segment) {
        const int64_t first = segment * p.chunks_per_segment * kChunk, stop = first + p.chunks_per_segment * kChunk;
        const bool survives = runs == nullptr || runs[first - 1] == runs[stop - 1];
        float& state = states[int64_t(segment) * p.state_size];
        before = survives ? before + state : state;
        state = before;
    }
}

bool valid_inputs(const HedgehogForwardArguments& a) {
    const bool needs_weights = a.feature_map != HEDGEHOG_GIVEN;
    return a.q && a.k && a.v && a.denominator && (!needs_weights || (a.weight_q && a.weight_k)) &&
           a.feature_map >= HEDGEHOG_GIVEN && a.feature_map <= HEDGEHOG_JOINT && a.batch > 0 && a.batch < 65536 &&
           a.heads > 0 && a.heads < 65536 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.length > 0 &&
           a.length < int64_t(kChunk) << 30 &&
           !a.initial_kv == !a.initial_k_sum && aligned(a.q, 16) && aligned(a.k, 16) && aligned(a.v, 16) &&
           aligned(a.weight_q, 16) && aligned(a.weight_k, 16) && aligned(a.q_stride, kUnit) &&
           aligned(a.k_stride, kUnit) && aligned(a.v_stride, kUnit) &&
           (hedgehog_scratch_bytes(&a) == 0 || a.scratch);
}

namespace {

ForwardParameters parameters_of(const HedgehogForwardArguments& a) {
    const Segments segments = split(a.length, a.segments);
    ForwardParameters p{};
    p.q = static_cast<const uint16_t*>(a.q);
    p.k = static_cast<const uint16_t*>(a.k);
    p.v = static_cast<const uint16_t*>(a.v);
    p.weight_q = static_cast<const uint16_t*>(a.weight_q);
    p.weight_k = static_cast<const uint16_t*>(a.weight_k);
    p.mask = static_cast<const uint8_t*>(a.mask);
    p.runs = static_cast<const int32_t*>(a.runs);
    p.initial_kv = static_cast<const float*>(a.initial_kv);
    p.initial_k_sum = static_cast<const float*>(a.initial_k_sum);
    p.out = static_cast<uint16_t*>(a.out);
    p.denominator = static_cast<float*>(a.denominator);
    p.final_kv = static_cast<float*>(a.final_kv);
    p.final_k_sum = static_cast<float*>(a.final_k_sum);
    p.segment_states = static_cast<float*>(a.scratch);
    p.q_stride = a.q_stride;
    p.k_stride = a.k_stride;
    p.v_stride = a.v_stride;
    p.out_stride = a.out_stride;
    p.length = a.length;
    p.num_chunks = static_cast<int32_t>(segments.num_chunks);
    p.chunks_per_segment = static_cast<int32_t>(segments.chunks_per_segment);
    p.heads = static_cast<int32_t>(a.heads);
    p.kv_heads = static_cast<int32_t>(a.kv_heads);
    p.feature_map = a.feature_map;
    p.segments = segments.count;
    p.eps = a.eps;
    return p;
}

// One pass over `segments` segments of every row and head.
cudaError_t launch_pass(const HedgehogForwardArguments& a, const ForwardParameters& p, int32_t segments) {
    return for_shape(a.head_dim, a.features, a.feature_map, cudaErrorInvalidValue, [&](auto shape) {
        using Shape = decltype(shape);
        using Layout = ForwardLayout<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>;
        return launch(&linear_attention_forward<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>,
                      dim3(segments, p.heads, static_cast<unsigned>(a.batch)), Layout::kThreads, Layout::kBytes,
                      static_cast<cudaStream_t>(a.stream), p);
    });
}

}  // namespace

cudaError_t fill_segment_states(const HedgehogForwardArguments& a) {
    ForwardParameters p = parameters_of(a);
    if (p.segments == 1) return cudaSuccess;
    p.state_only = true;
    const cudaError_t error = launch_pass(a, p, p.segments - 1);
    if (error != cudaSuccess) return error;
    const PrefixParameters prefix{p.segment_states,     p.runs,  p.length,
                                  p.chunks_per_segment, p.heads, p.segments - 1,
                                  a.features * (a.head_dim + 1)};
    const unsigned blocks = (prefix.state_size + kPrefixThreads - 1) / kPrefixThreads;
    return launch(&segment_prefix, dim3(blocks, p.heads, static_cast<unsigned>(a.batch)), kPrefixThreads, 0,
                  static_cast<cudaStream_t>(a.stream), prefix);
}

}  // namespace hedgehog

#ifndef __CUDACC__
extern "C" {
void hedgehog_emulation_seed(uint64_t seed) { emulation::Scheduler::get().seed(seed); }

// The places where threads have waited so far, and the one to leave out from here on; -1: none.
int32_t hedgehog_emulation_num_places() { return static_cast<int32_t>(emulation::Scheduler::get().places().size()); }
const char* hedgehog_emulation_place(int32_t place) { return emulation::Scheduler::get().places().at(place).c_str(); }
void hedgehog_emulation_forget_places() { emulation::Scheduler::get().forget_places(); }
void hedgehog_emulation_leave_out(int32_t place) { emulation::Scheduler::get().leave_out(place); }

// Sees every launch from here on: emulation/launch.h. Null: nobody does.
void hedgehog_emulation_observe(emulation::LaunchObserver observer) { emulation::launch_observer() = observer; }

// Three counts of work since the last call: emulation/fibers.h.
void hedgehog_emulation_work(int64_t* counts) {
    emulation::Work& work = emulation::Scheduler::get().work;
    counts[0] = work.matrix_wavefronts, counts[1] = work.products, counts[2] = work.slow_results;
    work = {};
}
}
#endif

extern "C" int32_t hedgehog_num_segments(int64_t length, int32_t requested) {
    return hedgehog::split(length, requested).count;
}

extern "C" int64_t hedgehog_scratch_bytes(const HedgehogForwardArguments* a) {
    const int64_t states = hedgehog::split(a->length, a->segments).count - 1;
    return states * a->batch * a->heads * a->features * (a->head_dim + 1) * int64_t(sizeof(float));
}

extern "C" int32_t hedgehog_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map) {
    using namespace hedgehog;
    return for_shape(head_dim, features, feature_map, 0, [](auto shape) -> int {
        using Shape = decltype(shape);
        return ForwardLayout<Shape::kHeadDim, Shape::kFeatures, Shape::kFused>::kBytes;
    });
}

extern "C" int32_t hedgehog_has_wgmma(int32_t head_dim, int32_t features, int32_t feature_map) {
    return hedgehog::has_hopper(head_dim, features, feature_map);
}

extern "C" int32_t hedgehog_forward(const HedgehogForwardArguments* arguments) {
    using namespace hedgehog;
    const HedgehogForwardArguments& a = *arguments;
    if (!valid_inputs(a) || !a.out || !a.final_kv != !a.final_k_sum || !aligned(a.out, 4) || !aligned(a.out_stride, 2))
        return cudaErrorInvalidValue;
    if (a.kernel != HEDGEHOG_MMA && (a.kernel != HEDGEHOG_WGMMA || !serves_hopper(a))) return cudaErrorInvalidValue;
    const cudaError_t error = fill_segment_states(a);
    if (error != cudaSuccess) return error;
    const ForwardParameters p = parameters_of(a);
    return a.kernel == HEDGEHOG_WGMMA ? launch_hopper(a, p) : launch_pass(a, p, p.segments);
}
