// The trace of the root of a product of covariances: what of it is native.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace mir {

// traces[p] = Tr((T + shifts[p] I)^-1) for a symmetric band matrix T, NaN where a pivot is not positive.
struct BandInverseTraces {
  const double* band;    // (rows, width + 1): band[j][r] = T[j + r][j], zero beyond the last row
  const double* shifts;  // (count,)
  double* traces;        // (count,)
  double* workspace;     // as many as workspace() tells
  int64_t rows, width, count;
};

struct BandInverseTracesCpu {
  void (*run)(const BandInverseTraces&, int threads);
  int64_t (*workspace)(int64_t width, int64_t count);
};
MIR_DECLARE_PER_ISA(const BandInverseTracesCpu band_inverse_traces_cpu)

}  // namespace mir
