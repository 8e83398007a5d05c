// MoCa on CUDA: one launch for forward, two for backward (rows, then the sum of the partial rows).
//
// A block owns a chunk of rows and a strip of columns. A thread owns one vector of columns, 16 bytes of elements, and
// loops over rows of the chunk, so that scale, shift and the column sums stay in registers. All threads of a warp are
// in one row: rows outside the mask cause no divergence, and in place not even a load. Offsets are 64-bit.
#include "moca.h"

#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "../common/vector.cuh"

namespace mir {
namespace {

constexpr int kThreads = 256;     // maximum per block
constexpr int kUnroll = 4;        // rows in flight per thread
constexpr int kForwardRows = 32;  // chunk of the forward kernel; backward uses moca_chunk_rows()

std::invalid_argument too_many(const char* name, int64_t most, int64_t got) {
  return std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(most) +
                               " for these strides and addresses, got " + std::to_string(got));
}

// block: threads across the columns, 32 to 128, and down the rows, at least 2. grid: chunks of rows, strips of columns.
struct Shape {
  dim3 block, grid;
};
Shape shape_for(int64_t rows, int64_t chunk, int64_t cols, int64_t vector) {
  constexpr int64_t kMostChunks = 2147483647, kMostStrips = 65535;  // blocks of a grid, on every architecture
  const int64_t vectors = cols / vector, strips = (vectors + 127) / 128, chunks = (rows + chunk - 1) / chunk;
  if (chunks > kMostChunks) throw too_many("rows", kMostChunks * chunk, rows);
  if (strips > kMostStrips) throw too_many("cols", kMostStrips * 128 * vector, cols);
  const int64_t across = ((vectors + strips - 1) / strips + 31) / 32 * 32;
  const auto size = [](int64_t n) { return static_cast<unsigned>(n); };
  return {dim3(size(across), size(kThreads / across)), dim3(size(chunks), size((vectors + across - 1) / across))};
}

template <class T, class A, int kSize>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* x, int64_t x_stride, const A* __restrict__ scale, const A* __restrict__ shift,
                   const uint8_t* __restrict__ mask, T* out, int64_t out_stride, int64_t rows, int64_t vectors,
                   bool in_place) {
  using Data = Vector<T, kSize>;
  using Column = Vector<A, kSize>;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (column >= vectors) return;
  const Column s = reinterpret_cast<const Column*>(scale)[column];
  const Column t = reinterpret_cast<const Column*>(shift)[column];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kForwardRows;
  const int64_t end = min(first + kForwardRows, rows);
  for (int64_t row = first + threadIdx.y; row < end; row += kUnroll * blockDim.y) {
    bool inside[kUnroll], live[kUnroll];
    Data data[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t r = row + u * blockDim.y;
      inside[u] = r < end && mask[r] != 0;
      live[u] = r < end && (inside[u] || !in_place);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (live[u]) data[u] = *(reinterpret_cast<const Data*>(x + (row + u * blockDim.y) * x_stride) + column);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (inside[u]) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          data[u].at[i] = narrow<T>(multiply_add(widen(data[u].at[i]), s.at[i], t.at[i]));
        }
      }
      if (live[u]) *(reinterpret_cast<Data*>(out + (row + u * blockDim.y) * out_stride) + column) = data[u];
    }
  }
}

// kGathered: row r of x is at x_rows[r]. The index needs the registers of two rows in flight, so there are two fewer,
// and up to 128 registers.
template <class T, class A, int kSize, bool kGathered>
__global__ void __launch_bounds__(kThreads, kGathered ? 2 : 0)
    backward_kernel(const T* grad, int64_t grad_stride, const T* __restrict__ x, int64_t x_stride,
                    const int64_t* __restrict__ x_rows, const A* __restrict__ scale,
                    const uint8_t* __restrict__ mask, T* dx, int64_t dx_stride, A* __restrict__ partial, int64_t rows,
                    int64_t chunk, int64_t vectors, bool in_place) {
  constexpr int kRows = kGathered ? kUnroll / 2 : kUnroll;
  using Data = Vector<T, kSize>;
  using Column = Vector<A, kSize>;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const bool here = column < vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = min(first + chunk, rows);
  Column dscale, dshift;
#pragma unroll
  for (int i = 0; i < kSize; ++i) dscale.at[i] = dshift.at[i] = 0;
  if (here) {
    const Column s = reinterpret_cast<const Column*>(scale)[column];
    for (int64_t row = first + threadIdx.y; row < end; row += kRows * blockDim.y) {
      bool inside[kRows], live[kRows];
      Data g[kRows], v[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t r = row + u * blockDim.y;
        inside[u] = r < end && mask[r] != 0;
        live[u] = r < end && (inside[u] || !in_place);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t r = row + u * blockDim.y;
        if (live[u]) g[u] = *(reinterpret_cast<const Data*>(grad + r * grad_stride) + column);
        if (inside[u]) {
          const int64_t x_row = kGathered ? x_rows[r] : r;
          v[u] = *(reinterpret_cast<const Data*>(x + x_row * x_stride) + column);
        }
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (inside[u]) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A gradient = widen(g[u].at[i]);
            dscale.at[i] = multiply_add(gradient, widen(v[u].at[i]), dscale.at[i]);
            dshift.at[i] += gradient;
            g[u].at[i] = narrow<T>(gradient * s.at[i]);
          }
        }
        if (live[u]) *(reinterpret_cast<Data*>(dx + (row + u * blockDim.y) * dx_stride) + column) = g[u];
      }
    }
  }

  // Adds the block's rows of threads in order and writes its partial row: (chunk, sum, column).
  __shared__ Column sums[2][kThreads];
  const int lane = threadIdx.y * blockDim.x + threadIdx.x;
  sums[0][lane] = dscale;
  sums[1][lane] = dshift;
  __syncthreads();
  const int sum = threadIdx.y;
  if (sum >= 2 || !here) return;
  Column total = sums[sum][threadIdx.x];
  for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) total.at[i] += sums[sum][y * blockDim.x + threadIdx.x].at[i];
  }
  reinterpret_cast<Column*>(partial)[(static_cast<int64_t>(blockIdx.x) * 2 + sum) * vectors + column] = total;
}

// Adds partial rows (chunks, 2, cols) to dscale and dshift. 32 columns per block. Each of 8 threads per column sums
// every eighth partial row in double, and these sums are added in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const A* __restrict__ partial, int64_t chunks, int64_t cols, A* __restrict__ dscale,
                       A* __restrict__ dshift) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  double total = 0;
  if (column < 2 * cols) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += 8) total += partial[chunk * 2 * cols + column];
  }
  __shared__ double parts[8][33];
  parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= 2 * cols) return;
  for (int y = 1; y < 8; ++y) total += parts[y][threadIdx.x];
  (column < cols ? dscale[column] : dshift[column - cols]) = static_cast<A>(total);
}

template <class T, int kSize>
void launch_forward(const MocaForward& p, cudaStream_t stream) {
  using A = typename AccumulateIn<T>::type;
  const int64_t vectors = p.cols / kSize;
  const Shape shape = shape_for(p.rows, kForwardRows, p.cols, kSize);
  launch("moca forward", forward_kernel<T, A, kSize>, shape.grid, shape.block, stream, static_cast<const T*>(p.x),
         p.x_stride, static_cast<const A*>(p.scale), static_cast<const A*>(p.shift), p.mask, static_cast<T*>(p.out),
         p.out_stride, p.rows, vectors, p.out == p.x);
}

template <class T, int kSize>
void launch_backward(const MocaBackward& p, cudaStream_t stream) {
  using A = typename AccumulateIn<T>::type;
  const int64_t vectors = p.cols / kSize, chunk = moca_chunk_rows(p.rows);
  const Shape shape = shape_for(p.rows, chunk, p.cols, kSize);
  const auto kernel = p.x_rows == nullptr ? backward_kernel<T, A, kSize, false> : backward_kernel<T, A, kSize, true>;
  launch("moca backward", kernel, shape.grid, shape.block, stream, static_cast<const T*>(p.grad), p.grad_stride,
         static_cast<const T*>(p.x), p.x_stride, p.x_rows, static_cast<const A*>(p.scale), p.mask,
         static_cast<T*>(p.dx), p.dx_stride, static_cast<A*>(p.partial), p.rows, chunk, vectors, p.dx == p.grad);
}

// 16 bytes per thread if strides, columns and addresses allow, else one element per thread.
template <class T>
void forward(const MocaForward& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool whole = p.cols % kVector == 0 && p.x_stride % kVector == 0 && p.out_stride % kVector == 0 &&
                     aligned_to(p.x, 16) && aligned_to(p.out, 16) && aligned_to(p.scale, 32) && aligned_to(p.shift, 32);
  return whole ? launch_forward<T, kVector>(p, stream) : launch_forward<T, 1>(p, stream);
}

template <class T>
void backward(const MocaBackward& p, cudaStream_t stream) {
  using A = typename AccumulateIn<T>::type;
  constexpr int kVector = 16 / sizeof(T);
  const bool whole = p.cols % kVector == 0 && p.x_stride % kVector == 0 && p.grad_stride % kVector == 0 &&
                     p.dx_stride % kVector == 0 && aligned_to(p.x, 16) && aligned_to(p.grad, 16) &&
                     aligned_to(p.dx, 16) && aligned_to(p.scale, 32) && aligned_to(p.partial, 32);
  if (p.rows > 0) whole ? launch_backward<T, kVector>(p, stream) : launch_backward<T, 1>(p, stream);
  const auto blocks = static_cast<unsigned>((2 * p.cols + 31) / 32);
  launch("moca backward, column sums", column_sums_kernel<A>, dim3(blocks), dim3(32, 8), stream,
         static_cast<const A*>(p.partial), moca_partial_rows(p.rows), p.cols, static_cast<A*>(p.dscale),
         static_cast<A*>(p.dshift));
}

}  // namespace

void moca_forward_cuda(const MocaForward& p, int device, void* stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat32: return forward<float>(p, on);
    case DType::kBFloat16: return forward<__nv_bfloat16>(p, on);
    case DType::kFloat16: return forward<__half>(p, on);
    case DType::kFloat64: return forward<double>(p, on);
  }
}

void moca_backward_cuda(const MocaBackward& p, int device, void* stream) {
  if (p.cols == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat32: return backward<float>(p, on);
    case DType::kBFloat16: return backward<__nv_bfloat16>(p, on);
    case DType::kFloat16: return backward<__half>(p, on);
    case DType::kFloat64: return backward<double>(p, on);
  }
}

}  // namespace mir
