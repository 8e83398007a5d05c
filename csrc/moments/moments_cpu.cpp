// Token norms on the CPU. Compiled once per instruction set (isa.h).
#include "moments.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Sum of squares in double precision.
struct Squares {
  F64Pair sum = {};
  MIR_INLINE void add(F32Vec v) {
    const F64Pair w = widen(v);
    sum.low = multiply_add(w.low, w.low, sum.low);
    sum.high = multiply_add(w.high, w.high, sum.high);
  }
  MIR_INLINE void add(F64Vec v) { sum.low = multiply_add(v, v, sum.low); }
};

template <class T>
void token_norms(const TokenNorms& p, int threads) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  const int64_t piece = (int64_t{1} << 16) / row_bytes + 1;
  parallel_for((p.rows + piece - 1) / piece, threads, p.rows * row_bytes, [&](int64_t i) {
    const int64_t end = (i + 1) * piece < p.rows ? (i + 1) * piece : p.rows;
    for (int64_t r = i * piece; r < end; ++r) {
      Squares squares;
      for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
        squares.add(load(x + r * p.x_stride + c, lanes));
      });
      p.out[r] = static_cast<float>(__builtin_sqrt(total(squares.sum.low + squares.sum.high)));
    }
  });
}

void token_norms_any(const TokenNorms& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32: return token_norms<float>(p, threads);
    case DType::kBFloat16: return token_norms<BF16>(p, threads);
    case DType::kFloat16: return token_norms<F16>(p, threads);
    case DType::kFloat64: return token_norms<double>(p, threads);
  }
}

}  // namespace

const MomentsCpu moments_cpu = {token_norms_any};

}  // namespace MIR_ISA
}  // namespace mir
