// Host side of the emulation: streams and errors by name only; a launch runs to its end before it returns.
#pragma once

#include <mutex>

#include "instructions.h"

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

namespace emulation {

inline std::string& last_failure() {
    static std::string message;
    return message;
}

inline std::mutex& one_at_a_time() {
    static std::mutex mutex;
    return mutex;
}

// What a launch is told, for whoever wants to run the same by other means.
struct SeenLaunch {
    const void* kernel;
    uint32_t grid[3];
    int32_t num_threads;
    int64_t shared_bytes;
    const void* arguments;
    int64_t argument_bytes;
};

// Called before a launch with ended = 0, and after it with 1.
using LaunchObserver = void (*)(const SeenLaunch* launch, int32_t ended);

inline LaunchObserver& launch_observer() {
    static LaunchObserver observer = nullptr;
    return observer;
}

template <class Kernel, class Arguments>
cudaError_t launch(Kernel kernel, dim3 grid, int num_threads, size_t shared_bytes, const Arguments& arguments) {
    std::lock_guard<std::mutex> lock(one_at_a_time());
    const SeenLaunch seen{reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, num_threads,
                          static_cast<int64_t>(shared_bytes),    &arguments,               sizeof arguments};
    if (launch_observer()) launch_observer()(&seen, 0);
    try {
        Scheduler::get().launch(grid, num_threads, shared_bytes, [&] { kernel(arguments); });
    } catch (const std::exception& error) {
        last_failure() = error.what();
        return cudaErrorLaunchFailure;
    }
    if (launch_observer()) launch_observer()(&seen, 1);
    return cudaSuccess;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure) return emulation::last_failure().c_str();
    return error == cudaSuccess ? "no error" : "invalid argument";
}
