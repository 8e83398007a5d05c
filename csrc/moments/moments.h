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

}  // namespace mir
