// MoCa on the CPU: one pass over the data each way, at memory speed. Compiled once per instruction set (isa.h).
#include "moca.h"

#include "../common/parallel.h"
#include "../common/simd.h"
#include "column_sums.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Work is handed out in pieces of about this many bytes of x.
constexpr int64_t kPieceBytes = int64_t{1} << 16;

template <class T>
void forward(const MocaForward& p, int threads) {
  using A = typename AccumulateIn<T>::type;
  const T* x = static_cast<const T*>(p.x);
  const A* scale = static_cast<const A*>(p.scale);
  const A* shift = static_cast<const A*>(p.shift);
  T* out = static_cast<T*>(p.out);
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  const int64_t piece = kPieceBytes / row_bytes + 1;
  parallel_for((p.rows + piece - 1) / piece, threads, p.rows * row_bytes, [&](int64_t i) {
    const int64_t end = (i + 1) * piece < p.rows ? (i + 1) * piece : p.rows;
    for (int64_t r = i * piece; r < end; ++r) {
      const T* from = x + r * p.x_stride;
      T* to = out + r * p.out_stride;
      if (p.mask[r]) {
        for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
          store(to + c, fma(load(from + c, lanes), load(scale + c, lanes), load(shift + c, lanes)), lanes);
        });
      } else if (to != from) {
        __builtin_memcpy(to, from, row_bytes);
      }
    }
  });
}

// Rows `rows[0..N)`, all inside the mask: dx, and their part of the two column sums added to `partial`.
template <class T, int N>
void backward_rows(const MocaBackward& p, const int64_t* rows, typename AccumulateIn<T>::type* partial) {
  using A = typename AccumulateIn<T>::type;
  const A* scale = static_cast<const A*>(p.scale);
  const T* grad[N];
  const T* x[N];
  T* dx[N];
  for (int n = 0; n < N; ++n) {
    grad[n] = static_cast<const T*>(p.grad) + rows[n] * p.grad_stride;
    x[n] = static_cast<const T*>(p.x) + rows[n] * p.x_stride;
    dx[n] = static_cast<T*>(p.dx) + rows[n] * p.dx_stride;
  }
  for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
    const auto s = load(scale + c, lanes);
    typename Simd<T>::Vec dscale = {}, dshift = {};
    for (int n = 0; n < N; ++n) {
      const auto g = load(grad[n] + c, lanes);
      dscale = multiply_add(g, load(x[n] + c, lanes), dscale);
      dshift += g;
      store(dx[n] + c, g * s, lanes);
    }
    store(partial + c, load(partial + c, lanes) + dscale, lanes);
    store(partial + p.cols + c, load(partial + p.cols + c, lanes) + dshift, lanes);
  });
}

template <class T>
void backward(const MocaBackward& p, int threads) {
  using A = typename AccumulateIn<T>::type;
  constexpr int kTogether = 4;  // rows per pass over the partial sums: a quarter of their traffic, and short runs
  const int64_t chunk = moca_chunk_rows(p.rows), chunks = moca_partial_rows(p.rows);
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  A* partials = static_cast<A*>(p.partial);
  parallel_for(chunks, threads, 3 * p.rows * row_bytes, [&](int64_t i) {
    A* partial = partials + i * 2 * p.cols;
    for (int64_t c = 0; c < 2 * p.cols; ++c) partial[c] = 0;
    int64_t inside[kTogether];
    int count = 0;
    const int64_t end = (i + 1) * chunk < p.rows ? (i + 1) * chunk : p.rows;
    for (int64_t r = i * chunk; r < end; ++r) {
      if (p.mask[r]) {
        inside[count++] = r;
        if (count == kTogether) {
          backward_rows<T, kTogether>(p, inside, partial);
          count = 0;
        }
      } else {
        const T* from = static_cast<const T*>(p.grad) + r * p.grad_stride;
        T* to = static_cast<T*>(p.dx) + r * p.dx_stride;
        if (to != from) __builtin_memcpy(to, from, row_bytes);
      }
    }
    for (int n = 0; n < count; ++n) backward_rows<T, 1>(p, inside + n, partial);
  });
  A* const sums[] = {static_cast<A*>(p.dscale), static_cast<A*>(p.dshift)};
  add_partial_rows<2>(partials, chunks, p.cols, sums, threads);
}

void forward_any(const MocaForward& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32: return forward<float>(p, threads);
    case DType::kBFloat16: return forward<BF16>(p, threads);
    case DType::kFloat16: return forward<F16>(p, threads);
    case DType::kFloat64: return forward<double>(p, threads);
  }
}

void backward_any(const MocaBackward& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32: return backward<float>(p, threads);
    case DType::kBFloat16: return backward<BF16>(p, threads);
    case DType::kFloat16: return backward<F16>(p, threads);
    case DType::kFloat64: return backward<double>(p, threads);
  }
}

}  // namespace

const MocaCpu moca_cpu = {forward_any, backward_any};

}  // namespace MIR_ISA
}  // namespace mir
