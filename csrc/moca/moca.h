// MoCa (Eq. 5 of the MIR paper): out = scale * x + shift on rows with a nonzero mask byte, x elsewhere; alone, and
// fused with the preceding residual add and the following RMSNorm.
//
// Rows have `cols` contiguous elements, and strides are in elements. A is float, or double for float64 elements: scale,
// shift, weight, rstd, column sums and partial sums have type A. Pointers of one call do not overlap unless stated.
// Column sums are computed over chunks of rows that depend only on the number of rows. Each chunk writes one partial
// row per sum, and the partial rows are added in order in double: the same bits on every run, for any thread count.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace mir {

struct MocaForward {
  const void* x;  // (rows, cols)
  int64_t x_stride;
  const void* scale;    // (cols,) A
  const void* shift;    // (cols,) A
  const uint8_t* mask;  // (rows,)
  void* out;            // (rows, cols); may be x, and then rows outside the mask are neither read nor written
  int64_t out_stride;
  int64_t rows, cols;
  DType dtype;
};

struct MocaBackward {
  const void* grad;  // (rows, cols), of out
  int64_t grad_stride;
  const void* x;  // (rows, cols), read inside the mask only
  int64_t x_stride;
  const int64_t* x_rows;  // (rows,), the index of row r if x holds only rows inside the mask; else null
  const void* scale;      // (cols,) A
  const uint8_t* mask;    // (rows,)
  void* dx;               // (rows, cols); may be grad, and then rows outside the mask are not changed
  int64_t dx_stride;
  void* partial;  // (moca_partial_rows(rows), 2, cols) A, scratch
  void* dscale;   // (cols,) A
  void* dshift;   // (cols,) A
  int64_t rows, cols;
  DType dtype;
};

// h = moca(x + residual), out = weight * (h * rstd), rstd = 1 / sqrt(mean(h^2) + eps). As in the separate operations
// and in the order of Llama's RMSNorm, these are rounded to the element type: x + residual, h, h * rstd, out.
struct AddRmsForward {
  const void* x;         // (rows, cols)
  const void* residual;  // (rows, cols)
  int64_t x_stride, residual_stride;
  const void* scale;    // (cols,) A
  const void* shift;    // (cols,) A
  const uint8_t* mask;  // (rows,)
  const void* weight;   // (cols,) A
  double eps;
  void* out;  // (rows, cols)
  void* h;    // (rows, cols); may be x or residual
  int64_t out_stride, h_stride;
  void* rstd;  // (rows,) A
  int64_t rows, cols;
  DType dtype;
};

struct AddRmsBackward {
  const void* grad_out;  // (rows, cols)
  const void* grad_h;    // (rows, cols), or null if h has no gradient
  const void* h;         // (rows, cols)
  const void* x;         // (rows, cols), read inside the mask only
  const void* residual;  // (rows, cols), read inside the mask only
  int64_t grad_out_stride, grad_h_stride, h_stride, x_stride, residual_stride;
  const void* scale;    // (cols,) A
  const uint8_t* mask;  // (rows,)
  const void* weight;   // (cols,) A
  const void* rstd;     // (rows,) A
  void* dx;             // (rows, cols), the gradient of both x and residual; may be grad_out or grad_h
  int64_t dx_stride;
  void* partial;  // (moca_partial_rows(rows), 3, cols) A, scratch
  void* dscale;   // (cols,) A
  void* dshift;   // (cols,) A
  void* dweight;  // (cols,) A
  int64_t rows, cols;
  DType dtype;
};

// Rows per partial sum: at most 128 chunks of 16 to 128 rows, and more chunks only for more rows.
constexpr int64_t kMocaMinChunk = 16, kMocaMaxChunk = 128;
static constexpr int64_t moca_chunk_rows(int64_t rows) {
  int64_t chunk = kMocaMinChunk;
  while (chunk < kMocaMaxChunk && chunk * 128 < rows) chunk *= 2;
  return chunk;
}
static constexpr int64_t moca_partial_rows(int64_t rows) {
  return (rows + moca_chunk_rows(rows) - 1) / moca_chunk_rows(rows);
}

struct MocaCpu {
  void (*forward)(const MocaForward&, int threads);
  void (*backward)(const MocaBackward&, int threads);
};
MIR_DECLARE_PER_ISA(const MocaCpu moca_cpu)

struct AddRmsCpu {
  void (*forward)(const AddRmsForward&, int threads);
  void (*backward)(const AddRmsBackward&, int threads);
};
MIR_DECLARE_PER_ISA(const AddRmsCpu add_rms_cpu)

#if defined(MIR_WITH_CUDA)
// `stream` is a cudaStream_t of `device`. These calls only launch and do not wait. They throw std::runtime_error with
// CUDA's message.
void moca_forward_cuda(const MocaForward& p, int device, void* stream);
void moca_backward_cuda(const MocaBackward& p, int device, void* stream);
#endif

}  // namespace mir
