// Kernels with planted errors and correct variants, to detect a device that checks nothing.
#include "planted.h"

#include "../../../csrc/common/cuda_check.h"
#include "../../../csrc/common/vector.cuh"

namespace mir {
namespace {

// Each thread reads shared memory that another thread wrote, with or without a barrier in between.
__global__ void previous_kernel(const float* a, float* out, bool barrier) {
  __shared__ float shared[64];
  shared[threadIdx.x] = a[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[max(static_cast<int>(threadIdx.x) - 1, 0)];
}

// Each thread overwrites shared memory that another thread reads, with or without a barrier in between.
__global__ void shift_kernel(const float* a, float* out, bool barrier) {
  __shared__ float shared[64];
  shared[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  const float next = shared[(threadIdx.x + 1) % blockDim.x];
  if (barrier) __syncthreads();
  shared[threadIdx.x] = 2 * next;
  out[threadIdx.x] = shared[threadIdx.x];
}

// Block b writes out[b * distance]; with distance 0 all blocks write the same element.
__global__ void blocks_kernel(const float* a, float* out, int distance) {
  if (threadIdx.x == 0) out[blockIdx.x * distance] = a[blockIdx.x];
}

// Block b reads the element that block b - 1 writes, or the one that it writes itself.
__global__ void chain_kernel(float* out, int from) {
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = 1;
  if (static_cast<int>(blockIdx.x) >= from) out[blockIdx.x] += out[blockIdx.x - from];
}

// Threads `distance` apart write the same element between two barriers.
__global__ void threads_kernel(const float* a, float* out, int distance) { out[threadIdx.x % distance] = a[threadIdx.x]; }

__global__ void copy_kernel(const float* a, float* out, int64_t from, int64_t to) {
  out[to + threadIdx.x] = a[from + threadIdx.x];
}

__global__ void vectors_kernel(const float* a, float* out, int64_t from) {
  reinterpret_cast<Vector<float, 4>*>(out)[threadIdx.x] =
      reinterpret_cast<const Vector<float, 4>*>(a + from)[threadIdx.x];
}

// Reads shared memory after only the block's first `written` threads have written to it.
__global__ void unwritten_kernel(float* out, unsigned written) {
  __shared__ float shared[64];
  if (threadIdx.x < written) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

// The first `gone` threads return before the barrier of the others.
__global__ void divergent_kernel(const float* a, float* out, unsigned gone) {
  out[threadIdx.x] = a[threadIdx.x];
  if (threadIdx.x < gone) return;
  __syncthreads();
}

__global__ void large_kernel(float* out, int elements) {
  __shared__ double shared[7000];
  for (int i = threadIdx.x; i < elements; i += blockDim.x) shared[i] = i;
  out[threadIdx.x] = static_cast<float>(shared[threadIdx.x]);
}

}  // namespace

void planted(const std::string& name, const float* a, float* out, int64_t n, dim3 grid, dim3 block) {
  const auto run = [&](auto kernel, auto... arguments) {
    launch("planted", kernel, grid, block, nullptr, arguments...);
  };
  if (name == "previous") return run(previous_kernel, a, out, n != 0);
  if (name == "shift") return run(shift_kernel, a, out, n != 0);
  if (name == "blocks") return run(blocks_kernel, a, out, n);
  if (name == "chain") return run(chain_kernel, out, n);
  if (name == "threads") return run(threads_kernel, a, out, n);
  if (name == "read") return run(copy_kernel, a, out, n, 0);
  if (name == "write") return run(copy_kernel, a, out, 0, n);
  if (name == "vectors") return run(vectors_kernel, a, out, n);
  if (name == "unwritten") return run(unwritten_kernel, out, n);
  if (name == "divergent") return run(divergent_kernel, a, out, n);
  if (name == "large") return run(large_kernel, out, n);
  throw std::invalid_argument("name: expected a planted kernel, got " + name);
}

}  // namespace mir
