// Streaming moments: parameters and kernel tables.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace mir {

// out[r] = sqrt(sum_c x[r][c]^2), squared and added in double, so finite 16- and 32-bit inputs cannot overflow.
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
// Differences, products and their sums over the rows are float; if the CPU supports it, bfloat16 rows are multiplied as
// integers (integers.h). They are added to `second` and `sums` in double.
struct SecondMoment {
  const void* x;  // (rows, cols), rows `x_stride` elements apart; float32, bfloat16 or float16
  int64_t x_stride;
  float* shift;           // (cols,) near the data; overwritten with the shift used
  const double* vectors;  // (2, cols)
  const double* weights;  // (2,)
  // Lower triangle in consecutive panels of `panel` rows: panel q is a row-major matrix of its rows and the columns up
  // to its last row. Entries right of the diagonal are not changed.
  double* second;
  int64_t panel;
  double* sums;   // (cols,)
  float* packed;  // workspace of second_moment_workspace() floats
  int64_t rows, cols;
  DType dtype;
};

struct SecondMomentCpu {
  void (*add)(const SecondMoment&, int threads);
  int64_t (*workspace)(int64_t rows, int64_t cols);
};
MIR_DECLARE_PER_ISA(const SecondMomentCpu second_moment_cpu)

}  // namespace mir
