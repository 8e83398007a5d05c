// Replaces the CUDA runtime when a C++ compiler builds a .cu file to run its kernels on the CPU.
//
// It contains only the parts that csrc/ uses; other code does not compile. A launch runs its blocks sequentially, and
// the threads of a block as fibers that switch at __syncthreads(): see ../device.h. __shared__ variables become
// statics, which all blocks use in turn; memory.cpp forgets their contents between blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#if !defined(__restrict__)
#define __restrict__ __restrict
#endif

using std::max;
using std::min;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
void __syncthreads();

namespace emulated {

// The indices of the running thread.
struct Place {
  uint3 thread{}, block{};
  dim3 threads, blocks;
};
extern Place place;

// run(code) runs a thread of a kernel.
struct Thread {
  const void* code;
  void (*run)(const void* code);
};
cudaError_t launch(const cudaLaunchConfig_t& config, const void* frame, const Thread& thread);

}  // namespace emulated

inline constexpr const uint3& threadIdx = emulated::place.thread;
inline constexpr const uint3& blockIdx = emulated::place.block;
inline constexpr const dim3& blockDim = emulated::place.threads;
inline constexpr const dim3& gridDim = emulated::place.blocks;

// The arguments are converted to the kernel's parameters once, and each thread copies them from the stack below
// `frame`. These reads do not count as memory accesses of the kernel.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const void* frame = __builtin_frame_address(0);
  return [&](Parameters... converted) {
    const auto thread = [&] { kernel(converted...); };
    const auto run = [](const void* code) { (*static_cast<const decltype(thread)*>(code))(); };
    return emulated::launch(*config, frame, {&thread, run});
  }(std::forward<Arguments>(arguments)...);
}
