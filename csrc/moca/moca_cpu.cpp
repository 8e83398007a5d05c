// MoCa on the CPU: one pass over the data per direction, at memory speed. Compiled once per instruction set (isa.h).
#include "moca.h"

#include "../common/parallel.h"
#include "../common/simd.h"
#include "column_sums.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Work is divided into pieces of about this many bytes of x.
constexpr int64_t kPieceBytes = int64_t{1} << 16;

template <class T, bool kStream>
void forward_row(const MocaForward& p, const T* x, T* out) {
  using A = typename AccumulateIn<T>::type;
  const A* scale = static_cast<const A*>(p.scale);
  const A* shift = static_cast<const A*>(p.shift);
  for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
    store_to<kStream>(out + c, fma(load(x + c, lanes), load(scale + c, lanes), load(shift + c, lanes)), lanes);
  });
}

template <class T, bool kStream>
void forward_rows(const MocaForward& p, int threads) {
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  const int64_t piece = kPieceBytes / row_bytes + 1;
  parallel_for((p.rows + piece - 1) / piece, threads, p.rows * row_bytes, [&](int64_t i) {
    const int64_t end = (i + 1) * piece < p.rows ? (i + 1) * piece : p.rows;
    for (int64_t r = i * piece; r < end; ++r) {
      const T* from = static_cast<const T*>(p.x) + r * p.x_stride;
      T* to = static_cast<T*>(p.out) + r * p.out_stride;
      if (p.mask[r]) {
        forward_row<T, kStream>(p, from, to);
      } else if (to != from) {
        copy_bytes<kStream>(to, from, row_bytes);
      }
    }
    if (kStream) stream_fence();
  });
}

template <class T>
void forward(const MocaForward& p, int threads) {
  const int64_t element = sizeof(T);
  const bool stream = p.out != p.x && worth_streaming(p.out, p.out_stride * element, p.rows * p.cols * element);
  return stream ? forward_rows<T, true>(p, threads) : forward_rows<T, false>(p, threads);
}

// For a row inside the mask, computes dx and adds to the two column sums in `partial`. Several rows at once would
// access the partial sums less often, but streaming lines of several rows alternately takes four times as long.
template <class T, bool kStream>
void backward_row(const MocaBackward& p, int64_t r, typename AccumulateIn<T>::type* partial) {
  using A = typename AccumulateIn<T>::type;
  const T* grad = static_cast<const T*>(p.grad) + r * p.grad_stride;
  const T* x = static_cast<const T*>(p.x) + (p.x_rows == nullptr ? r : p.x_rows[r]) * p.x_stride;
  const A* scale = static_cast<const A*>(p.scale);
  T* dx = static_cast<T*>(p.dx) + r * p.dx_stride;
  A* dscale = partial;
  A* dshift = partial + p.cols;
  for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
    const auto g = load(grad + c, lanes);
    store(dscale + c, multiply_add(g, load(x + c, lanes), load(dscale + c, lanes)), lanes);
    store(dshift + c, load(dshift + c, lanes) + g, lanes);
    store_to<kStream>(dx + c, g * load(scale + c, lanes), lanes);
  });
}

template <class T, bool kStream>
void backward_chunks(const MocaBackward& p, int threads) {
  using A = typename AccumulateIn<T>::type;
  const int64_t chunk = moca_chunk_rows(p.rows), chunks = moca_partial_rows(p.rows);
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  A* partials = static_cast<A*>(p.partial);
  parallel_for(chunks, threads, 3 * p.rows * row_bytes, [&](int64_t i) {
    A* partial = partials + i * 2 * p.cols;
    for (int64_t c = 0; c < 2 * p.cols; ++c) partial[c] = 0;
    const int64_t end = (i + 1) * chunk < p.rows ? (i + 1) * chunk : p.rows;
    for (int64_t r = i * chunk; r < end; ++r) {
      if (p.mask[r]) {
        backward_row<T, kStream>(p, r, partial);
      } else {
        const T* from = static_cast<const T*>(p.grad) + r * p.grad_stride;
        T* to = static_cast<T*>(p.dx) + r * p.dx_stride;
        if (to != from) copy_bytes<kStream>(to, from, row_bytes);
      }
    }
    if (kStream) stream_fence();
  });
  A* const sums[] = {static_cast<A*>(p.dscale), static_cast<A*>(p.dshift)};
  add_partial_rows<2>(partials, chunks, p.cols, sums, threads);
}

template <class T>
void backward(const MocaBackward& p, int threads) {
  const int64_t element = sizeof(T);
  const bool stream = p.dx != p.grad && worth_streaming(p.dx, p.dx_stride * element, p.rows * p.cols * element);
  return stream ? backward_chunks<T, true>(p, threads) : backward_chunks<T, false>(p, threads);
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
