// Kernels for the trace of the square root of a product of covariances: parameters and kernel tables.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace mir {

// m = C^T A C 4^-exponent with C C^T = B, for `count` pairs of symmetric matrices (d, d), and its rounding error.
struct StandardForm {
  const double *a, *b;  // (count, d, d)
  double* m;            // (count, rows, stride): symmetric, zero beyond d
  double* rounding;     // (count,): an estimate of |m - C^T A C|_F, infinite if B is singular up to rounding
  double* exponent;     // (count,)
  double* workspace;    // of workspace() doubles
  int64_t count, d, rows, stride;  // stride >= rows >= d, rows a multiple of `block`
};

struct StandardFormCpu {
  void (*run)(const StandardForm&, int threads);
  int64_t (*workspace)(const StandardForm&, int threads);
  int64_t block;
};
MIR_DECLARE_PER_ISA(const StandardFormCpu standard_form_cpu)

// The Cholesky factors L of m + shifts[p] I: their diagonals, |L|_F and a bound on the spectral norm of |L|. The norms
// are NaN if m + shifts[p] I is not positive definite up to rounding.
struct ShiftedFactors {
  const double* m;       // (d, stride): symmetric; only its upper triangle is read
  const double* shifts;  // (count,)
  double* pivots;        // (count, d)
  double* norms;         // (count, kFactorNorms)
  double* workspace;     // of workspace() doubles
  int64_t count, d, stride;
};
constexpr int kFactorNorms = 2;

struct ShiftedFactorsCpu {
  void (*run)(const ShiftedFactors&, int threads);
  int64_t (*workspace)(int64_t d);
  int64_t (*roundings)(int64_t d);  // bound on the roundings of any term of an entry, here and in StandardFormCpu
};
MIR_DECLARE_PER_ISA(const ShiftedFactorsCpu shifted_factors_cpu)

// band[j][r] = T[j + r][j] for a band matrix T with the eigenvalues of m, zero beyond the last row.
struct BandReduction {
  double* m;          // (rows, stride): symmetric, zero beyond d; overwritten
  double* band;       // (d, width + 1)
  double* workspace;  // of workspace() doubles
  int64_t d, stride;  // stride >= rows, which is d rounded up to a multiple of `width`
};

struct BandReductionCpu {
  void (*run)(const BandReduction&, int threads);
  int64_t (*workspace)(int64_t d, int threads);
  int64_t width;
};
MIR_DECLARE_PER_ISA(const BandReductionCpu band_reduction_cpu)

// traces[p] = Tr((T + shifts[p] I)^-1) for a symmetric band matrix T, NaN if a pivot is not positive.
struct BandInverseTraces {
  const double* band;    // (rows, width + 1): band[j][r] = T[j + r][j], zero beyond the last row
  const double* shifts;  // (count,)
  double* traces;        // (count,)
  double* workspace;     // of workspace() doubles
  int64_t rows, width, count;
};

struct BandInverseTracesCpu {
  void (*run)(const BandInverseTraces&, int threads);
  int64_t (*workspace)(int64_t width, int64_t count);
};
MIR_DECLARE_PER_ISA(const BandInverseTracesCpu band_inverse_traces_cpu)

}  // namespace mir
