// Element types that cross the language border, by the code numbers that Python passes.
#pragma once

#include <cstdint>

namespace mir {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Sixteen-bit elements on the CPU: bits only, converted in simd.h.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// What arithmetic and column sums are done in: double for double, else float.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};

}  // namespace mir
