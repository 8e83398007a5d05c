// Checks of symmetric matrices, and their symmetric part.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace mir {

// Flags of a batch of matrices; several may be set.
enum Symmetric : int64_t {
  kNotMirrored = 1,        // an entry differs from its mirror image
  kNotFinite = 2,
  kAsymmetric = 4,         // an asymmetry above `allowed` of the largest entry
  kNegativeVariance = 8,   // a diagonal entry below -`allowed` of the largest entry
  kZeroVariance = 16,      // a diagonal entry <= 0 whose row has an entry above `allowed` of the largest entry
};

struct Symmetry {
  const void* x;      // (count, d, d) of `dtype`, float32 or float64
  double* workspace;  // (count, kSymmetryNumbers * symmetry_tiles(d))
  int64_t count, d;
  double allowed;
  DType dtype;
};

// out = (x + x^T) / 2 in float64, without overflow.
struct Symmetrize {
  const void* x;
  double* out;
  int64_t count, d;
  DType dtype;
};

constexpr int64_t kSymmetryNumbers = 3, kSymmetryTile = 64;
inline int64_t symmetry_tiles(int64_t d) { return (d + kSymmetryTile - 1) / kSymmetryTile; }

struct SymmetryCpu {
  int64_t (*check)(const Symmetry&, int threads);
  void (*symmetrize)(const Symmetrize&, int threads);
};
MIR_DECLARE_PER_ISA(const SymmetryCpu symmetry_cpu)

}  // namespace mir
