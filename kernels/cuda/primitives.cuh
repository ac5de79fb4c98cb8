// The few instructions the kernels are made of, each with one body for the GPU and one for the emulation.
//
// bf16 travels as raw bits: uint16_t, or two of them in a uint32_t with the lower column in the lower half.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation/launch.h"
#endif

namespace hedgehog {

constexpr float kLog2E = 1.4426950408889634f;

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
    extern __shared__ __align__(1024) unsigned char hedgehog_shared_memory[];
    return hedgehog_shared_memory;
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// threadIdx and blockIdx, read afresh: what follows from them is computed where it stands. With the state in registers
// none are left for addresses that the compiler would otherwise carry through the whole loop over chunks.
__device__ __forceinline__ int thread_index() {
    int value;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
    return value;
}
__device__ __forceinline__ int block_x() {
    int value;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(value));
    return value;
}
__device__ __forceinline__ int64_t block_y() {
    int value;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(value));
    return value;
}
__device__ __forceinline__ int64_t block_z() {
    int value;
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(value));
    return value;
}

// c (16×8, float) += a (16×16) b (16×8)
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory; zeros where `valid` is false (nothing is read then).
__device__ __forceinline__ void copy_async(void* destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Memory that wgmma may read has been written.
__device__ __forceinline__ void note_operand(const void*, int) {}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of memory that is read once and written once: the caches are for others.
__device__ __forceinline__ float4 load_streaming(const float4* from) { return __ldcs(from); }
__device__ __forceinline__ void store_streaming(float4* to, float4 value) { __stcs(to, value); }

// The compiler moves no store across it: what is computed for a later one does not wait in registers.
__device__ __forceinline__ void schedule_barrier() { __syncwarp(); }

__device__ __forceinline__ float log2_approximate(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else

inline unsigned char* dynamic_shared_memory() { return emulation::Scheduler::get().shared_memory(); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulation::load_matrix_x4(r, row, false); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) { emulation::load_matrix_x4(r, row, true); }
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::multiply_accumulate(c, a, b0, b1);
}
inline void copy_async(void* destination, const void* source, bool valid) {
    emulation::copy_async_16(destination, source, valid ? 16 : 0);
}
inline void note_operand(const void* where, int num_bytes) {
    emulation::Scheduler::get().note_write(where, num_bytes);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
void copy_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulation::Scheduler::get().waits_at(file, line)) emulation::copy_async_wait(kPending);
}
inline int thread_index() { return threadIdx.x; }
inline int block_x() { return blockIdx.x; }
inline int64_t block_y() { return blockIdx.y; }
inline int64_t block_z() { return blockIdx.z; }
inline float shuffle_xor(float value, int lane_mask) { return emulation::shuffle_xor(value, lane_mask); }
inline float float_of_bits(uint32_t bits) { return emulation::bits_to_float(bits); }
inline uint32_t pack_bf16(float low, float high) {
    return emulation::float_to_bf16(low) | uint32_t(emulation::float_to_bf16(high)) << 16;
}
inline float4 load_streaming(const float4* from) { return *from; }
inline void store_streaming(float4* to, float4 value) { *to = value; }
inline void schedule_barrier() {}
inline float slow_result(float y) {
    ++emulation::Scheduler::get().work.slow_results;
    return y;
}
inline float exp2_approximate(float x) { return slow_result(std::exp2(x)); }
inline float log2_approximate(float x) { return slow_result(std::log2(x)); }
inline float reciprocal_approximate(float x) { return slow_result(1.0f / x); }

#endif

__device__ __forceinline__ float low_bf16(uint32_t packed) { return float_of_bits(packed << 16); }
__device__ __forceinline__ float high_bf16(uint32_t packed) { return float_of_bits(packed & 0xffff0000u); }
__device__ __forceinline__ float bf16_value(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }
__device__ __forceinline__ float round_to_bf16(float x) { return low_bf16(pack_bf16(x, 0.0f)); }

// Sum and maximum over the four lanes that hold one row of a C fragment.
__device__ __forceinline__ float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

// Runs kernel(arguments) on `grid` blocks. Returns CUDA's error for the launch itself; a kernel's own comes later.
template <class Arguments>
cudaError_t launch(void (*kernel)(const Arguments), dim3 grid, int num_threads, int shared_bytes, cudaStream_t stream,
                   const Arguments& arguments) {
#ifdef __CUDACC__
    if (shared_bytes > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, num_threads, shared_bytes, stream>>>(arguments);
    return cudaGetLastError();
#else
    (void)stream;
    return emulation::launch(kernel, grid, num_threads, shared_bytes, arguments);
#endif
}

}  // namespace hedgehog
