// The C interface: plain structures of addresses, strides and sizes. kernels/cuda/library.py mirrors them field by
// field and checks their sizes when it loads the library. Strides count elements; the last dimension is contiguous.
#pragma once

#include <cstdint>

extern "C" {

// How φ comes about. `hedgehog_*` are the maps of kernels/feature_maps.py; GIVEN means that q and k are φ already.
enum HedgehogFeatureMap : int32_t {
    HEDGEHOG_GIVEN = 0,
    HEDGEHOG_SOFTMAX = 1,
    HEDGEHOG_EXP = 2,
    HEDGEHOG_JOINT = 3,
};

// Which forward kernel: forward.cuh's, on mma.sync, for every shape and GPU; or forward_hopper.cuh's, on wgmma, for the
// shapes that hedgehog_has_wgmma names. Both keep the same contract, but wgmma wants `out` aligned to 16 bytes.
enum HedgehogForwardKernel : int32_t {
    HEDGEHOG_MMA = 0,
    HEDGEHOG_WGMMA = 1,
};

// Which backward kernels: those for every shape, which at F = 256 take the values in slices; or, for the shapes that
// hedgehog_has_backward names, those that take them whole: less work, in more shared memory than an A100 has. They want grad_q and
// grad_k aligned to 16 bytes. The last do much of it with wgmma.
enum HedgehogBackwardKernel : int32_t {
    HEDGEHOG_SLICES = 0,
    HEDGEHOG_WHOLE = 1,
    HEDGEHOG_WHOLE_WGMMA = 2,
};

struct HedgehogStrides {
    int64_t batch, head, token;
};

// bf16: q, k, v, out, weights. float: denominator, states. Addresses may be null where a comment says so.
struct HedgehogForwardArguments {
    const void* q;           // (B, H, T, D); with GIVEN (B, H, T, F)
    const void* k;           // (B, K, T, D); with GIVEN (B, H, T, F)
    const void* v;           // (B, K, T, V)
    const void* weight_q;    // (H, D, F/2) contiguous; null with GIVEN
    const void* weight_k;    // the same
    const void* mask;        // (B, T) bytes, 0 = padding; or null
    const void* runs;        // (B, T) int32, equal in each packed segment (conventions.py: run_index_BL); or null
    const void* initial_kv;  // (B, H, F, V) contiguous; or null
    const void* initial_k_sum;  // (B, H, F); null together with initial_kv
    void* out;               // (B, H, T, V)
    void* denominator;       // (B, H, T) contiguous
    void* final_kv;          // (B, H, F, V); or null
    void* final_k_sum;       // (B, H, F); null together with final_kv
    void* scratch;           // hedgehog_scratch_bytes; null if that is 0
    void* stream;
    HedgehogStrides q_stride, k_stride, v_stride, out_stride;
    int64_t batch, heads, kv_heads, length;
    int32_t head_dim, features, feature_map, segments;
    float eps;
    int32_t kernel;  // HedgehogForwardKernel
};

// One token a row. State and k_sum are updated in place.
struct HedgehogDecodeArguments {
    const void* q;         // (B, H, D); with GIVEN (B, H, F)
    const void* k;         // (B, K, D); with GIVEN (B, H, F)
    const void* v;         // (B, K, V)
    const void* weight_q;  // as above
    const void* weight_k;
    const void* mask;      // (B) bytes; or null
    void* kv_state;        // (B, H, F, V) contiguous
    void* k_sum;           // (B, H, F) contiguous
    void* out;             // (B, H, V) contiguous
    void* arrivals;        // (B, H) int32, zero before and after; null with splits = 1
    void* stream;
    int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;
    int64_t batch, heads, kv_heads;
    int32_t head_dim, features, feature_map, splits;
    float eps;
    int32_t reserved;
};

// `forward`: what the forward pass was called with, its denominator as it came out; out and final_* are not looked at,
// scratch is hedgehog_backward_scratch_bytes. bf16: grad_out, grad_q, grad_k, grad_v. The rest is float and contiguous.
struct HedgehogBackwardArguments {
    HedgehogForwardArguments forward;
    const void* grad_out;          // (B, H, T, V)
    const void* grad_final_kv;     // (B, H, F, V); or null
    const void* grad_final_k_sum;  // (B, H, F); null together with grad_final_kv
    void* grad_q;                  // as q
    void* grad_k;                  // as k
    void* grad_v;                  // as v
    void* grad_weight_q;           // (B, segments that run, H, D, F/2), to be summed over the first two; null with GIVEN
    void* grad_weight_k;           // the same
    void* grad_initial_kv;         // (B, H, F, V); or null
    void* grad_initial_k_sum;      // (B, H, F); null together with grad_initial_kv
    void* grad_denominator;        // (hedgehog_num_slices, B, H, T): scratch; null if H = K, when grad_v has room for it
    HedgehogStrides grad_out_stride, grad_q_stride, grad_k_stride, grad_v_stride;
    int32_t kernel;  // HedgehogBackwardKernel
    int32_t reserved;
};

// 0, or an error that hedgehog_error_string explains. Launches only: nothing here waits for the GPU.
int32_t hedgehog_forward(const HedgehogForwardArguments* arguments);
int32_t hedgehog_decode(const HedgehogDecodeArguments* arguments);
int32_t hedgehog_backward(const HedgehogBackwardArguments* arguments);

// Whether this build has the wgmma kernel (for sm_90a; emulated), and it serves the shape.
int32_t hedgehog_has_wgmma(int32_t head_dim, int32_t features, int32_t feature_map);

// Segments of the length that really run: at most `requested`, at most one per chunk.
int32_t hedgehog_num_segments(int64_t length, int32_t requested);
int64_t hedgehog_scratch_bytes(const HedgehogForwardArguments* arguments);
int64_t hedgehog_backward_scratch_bytes(const HedgehogForwardArguments* arguments, int32_t kernel);

// Whether this build has the kernels (wgmma: for sm_90a; emulated), and they serve the shape.
int32_t hedgehog_has_backward(const HedgehogForwardArguments* arguments, int32_t kernel);

// Slices of the values that the backward kernels take one after the other.
int32_t hedgehog_num_slices(int32_t head_dim, int32_t features, int32_t kernel);

// Shared memory that a block of the forward kernel takes, and of the backward's larger one; 0 for a shape that there is
// no kernel for.
int32_t hedgehog_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map);
int32_t hedgehog_backward_shared_bytes(int32_t head_dim, int32_t features, int32_t feature_map, int32_t kernel);

const char* hedgehog_error_string(int32_t error);
int32_t hedgehog_struct_bytes(int32_t which);  // 0: forward, 1: decode, 2: backward

}  // extern "C"
