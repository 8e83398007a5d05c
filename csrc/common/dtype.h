// Element types passed from Python to C++, with their codes.
#pragma once

#include <cstdint>

namespace mir {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// 16-bit elements on the CPU: raw bits, converted in simd.h.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// The type of arithmetic and column sums: double for double, otherwise float.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};

}  // namespace mir
