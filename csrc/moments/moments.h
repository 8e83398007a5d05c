// Streaming moments: what of them is native.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace mir {

// out[r] = sqrt(sum_c x[r][c]^2), squared and added in double, so no finite 16- or 32-bit input overflows on the way.
struct TokenNorms {
  const void* x;  // (rows, cols), rows `x_stride` elements apart
  int64_t x_stride;
  float* out;  // (rows,)
  int64_t rows, cols;
  DType dtype;
};

struct MomentsCpu {
  void (*token_norms)(const TokenNorms&, int threads);
};
MIR_DECLARE_PER_ISA(const MomentsCpu moments_cpu)

// second += sum_r weights[r] vectors[r] vectors[r]^T + sum_t (x_t - shift)(x_t - shift)^T, sums = sum_t (x_t - shift).
// Differences, products and their sums over the rows are float, products of bfloat16 rows are of integers where the CPU
// can (integers.h); what is added to `second` and `sums` is double.
struct SecondMoment {
  const void* x;  // (rows, cols), rows `x_stride` elements apart; float32, bfloat16 or float16
  int64_t x_stride;
  float* shift;           // (cols,) near the data; what was taken is written back
  const double* vectors;  // (2, cols)
  const double* weights;  // (2,)
  // Lower triangle in panels of `panel` rows, one after the other: panel q is a row-major matrix of its rows and the
  // columns up to its last row. Entries right of the diagonal are left alone.
  double* second;
  int64_t panel;
  double* sums;   // (cols,)
  float* packed;  // workspace: as many as second_moment_workspace() tells
  int64_t rows, cols;
  DType dtype;
};

struct SecondMomentCpu {
  void (*add)(const SecondMoment&, int threads);
  int64_t (*workspace)(int64_t rows, int64_t cols);
};
MIR_DECLARE_PER_ISA(const SecondMomentCpu second_moment_cpu)

}  // namespace mir
