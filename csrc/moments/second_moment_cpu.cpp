// Adds one block of rows to the second moment on the CPU, one triangle only. Compiled once per instruction set (isa.h).
//
// The rows are shifted and packed into micro-panels of columns, and one triangle of macro-tiles (triangle.h) is divided
// among the threads. Each tile is summed in float over runs of rows in a buffer that stays in cache, and added to the
// double triangle once. Rows are packed as float, or bfloat16 rows as 16-bit integers if the CPU supports it
// (integers.h).
#include "../common/parallel.h"
#include "../common/simd.h"
#include "integers.h"
#include "moments.h"
#include "triangle.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Packs one group of columns and sums each column: in float over runs of rows, in double over the runs.
template <class T>
void pack(const SecondMoment& p, int64_t group) {
  constexpr int64_t kRun = Words<float>::kRun;
  const T* x = static_cast<const T*>(p.x);
  float* packed = p.packed + group * group_size<float>(p.rows);
  for_vectors(p.cols, group, [&](int64_t column, int64_t left, int block) {
    const F32Vec shift = columns(p.shift + column, left);
    for (int64_t c = 0; c < kLanes<float> && c < left; ++c) p.sums[column + c] = 0;
    for (int64_t first = 0; first < p.rows; first += kRun) {
      const int64_t rows = smaller(p.rows - first, kRun);
      float* to = packed + place<float>(first / kRun, block);
      F32Vec sum = {};
      for (int64_t r = 0; r < rows; ++r, to += kBlock) {
        const F32Vec v = columns(x + (first + r) * p.x_stride + column, left) - shift;
        sum += v;
        store_bits(to, v);
      }
      add_to(p.sums + column, sum, left);
    }
  });
}

void second_moment(const SecondMoment& p, int threads) {
  if (p.dtype == DType::kBFloat16 && second_moment_of_pairs(p, threads)) return;
  parallel_for(groups_of(p.cols), threads, p.rows * p.cols * static_cast<int64_t>(sizeof(float)), [&](int64_t group) {
    switch (p.dtype) {
      case DType::kFloat32: return pack<float>(p, group);
      case DType::kBFloat16: return pack<BF16>(p, group);
      case DType::kFloat16: return pack<F16>(p, group);
      case DType::kFloat64: return;  // rejected by the caller
    }
  });
  add_triangle<float>(p, p.packed, nullptr, p.rows, nullptr, threads);
}

int64_t workspace(int64_t rows, int64_t cols) {
  const int64_t floats = groups_of(cols) * group_size<float>(rows), pairs = pair_words(rows, cols);
  return floats > pairs ? floats : pairs;
}

}  // namespace

const SecondMomentCpu second_moment_cpu = {second_moment, workspace};

}  // namespace MIR_ISA
}  // namespace mir
