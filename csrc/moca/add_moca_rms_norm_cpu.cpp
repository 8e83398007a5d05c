// Residual add, MoCa and RMSNorm in one pass over each row on the CPU. Compiled once per instruction set (isa.h).
#include "moca.h"

#include "../common/parallel.h"
#include "../common/simd.h"
#include "column_sums.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Row r of a matrix of T with row stride `stride` in elements.
template <class T>
const T* row(const void* base, int64_t r, int64_t stride) {
  return static_cast<const T*>(base) + r * stride;
}
template <class T>
T* row(void* base, int64_t r, int64_t stride) {
  return static_cast<T*>(base) + r * stride;
}

template <class T, bool kStream>
void forward_row(const AddRmsForward& p, int64_t r) {
  using A = typename AccumulateIn<T>::type;
  using Vec = typename Simd<T>::Vec;
  const T* x = row<T>(p.x, r, p.x_stride);
  const T* residual = row<T>(p.residual, r, p.residual_stride);
  const A* scale = static_cast<const A*>(p.scale);
  const A* shift = static_cast<const A*>(p.shift);
  const A* weight = static_cast<const A*>(p.weight);
  T* out = row<T>(p.out, r, p.out_stride);
  T* h = row<T>(p.h, r, p.h_stride);
  const bool inside = p.mask[r] != 0;

  // Lanes beyond the row are zero and add nothing.
  const double squares = sum_of_products<T>(p.cols, [&](int64_t c, auto lanes, Vec& a, Vec& b) {
    Vec v = Simd<T>::round(load(x + c, lanes) + load(residual + c, lanes));
    if (inside) v = Simd<T>::round(fma(v, load(scale + c, lanes), load(shift + c, lanes)));
    store_rounded(h + c, v, lanes);
    a = b = v;
  });
  const A rstd = static_cast<A>(1 / __builtin_sqrt(squares / static_cast<double>(p.cols) + p.eps));
  static_cast<A*>(p.rstd)[r] = rstd;
  const Vec all_rstd = broadcast<Vec>(rstd);
  const int64_t next = r + 1 < p.rows ? r + 1 : r;
  const T* next_x = row<T>(p.x, next, p.x_stride);
  const T* next_residual = row<T>(p.residual, next, p.residual_stride);
  for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
    prefetch_line(next_x, c);
    prefetch_line(next_residual, c);
    store_to<kStream>(out + c, load(weight + c, lanes) * Simd<T>::round(load(h + c, lanes) * all_rstd), lanes);
  });
}

template <class T, bool kStream>
void forward_rows(const AddRmsForward& p, int threads) {
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  const int64_t piece = (int64_t{1} << 16) / row_bytes + 1;
  parallel_for((p.rows + piece - 1) / piece, threads, p.rows * row_bytes, [&](int64_t i) {
    const int64_t end = (i + 1) * piece < p.rows ? (i + 1) * piece : p.rows;
    for (int64_t r = i * piece; r < end; ++r) forward_row<T, kStream>(p, r);
    if (kStream) stream_fence();
  });
}

template <class T>
void forward(const AddRmsForward& p, int threads) {
  const int64_t element = sizeof(T);
  const bool stream = worth_streaming(p.out, p.out_stride * element, p.rows * p.cols * element);
  return stream ? forward_rows<T, true>(p, threads) : forward_rows<T, false>(p, threads);
}

// With y = h rstd and dy = grad_out weight:  dh = rstd (dy - y mean(dy y)) + grad_h.
template <class T, bool kStream>
void backward_row(const AddRmsBackward& p, int64_t r, typename AccumulateIn<T>::type* partial) {
  using A = typename AccumulateIn<T>::type;
  using Vec = typename Simd<T>::Vec;
  const T* grad_out = row<T>(p.grad_out, r, p.grad_out_stride);
  const T* grad_h = p.grad_h == nullptr ? nullptr : row<T>(p.grad_h, r, p.grad_h_stride);
  const T* h = row<T>(p.h, r, p.h_stride);
  const T* x = row<T>(p.x, r, p.x_stride);
  const T* residual = row<T>(p.residual, r, p.residual_stride);
  const A* scale = static_cast<const A*>(p.scale);
  const A* weight = static_cast<const A*>(p.weight);
  T* dx = row<T>(p.dx, r, p.dx_stride);
  A* dscale = partial;
  A* dshift = partial + p.cols;
  A* dweight = partial + 2 * p.cols;
  const bool inside = p.mask[r] != 0;

  const double dot = sum_of_products<T>(p.cols, [&](int64_t c, auto lanes, Vec& a, Vec& b) {
    a = load(grad_out + c, lanes) * load(weight + c, lanes);
    b = load(h + c, lanes);
  });
  const double rstd = static_cast<const A*>(p.rstd)[r];
  const Vec all_rstd = broadcast<Vec>(static_cast<A>(rstd));
  const Vec pull = broadcast<Vec>(static_cast<A>(dot / static_cast<double>(p.cols) * rstd * rstd));
  const int64_t next = r + 1 < p.rows ? r + 1 : r;
  const T* next_grad = row<T>(p.grad_out, next, p.grad_out_stride);
  const T* next_h = row<T>(p.h, next, p.h_stride);
  for_columns<T>(p.cols, [&](int64_t c, auto lanes) {
    prefetch_line(next_grad, c);
    prefetch_line(next_h, c);
    const Vec g = load(grad_out + c, lanes), v = load(h + c, lanes);
    Vec dh = all_rstd * (g * load(weight + c, lanes) - v * pull);
    if (grad_h != nullptr) dh += load(grad_h + c, lanes);
    store(dweight + c, multiply_add(g, v * all_rstd, load(dweight + c, lanes)), lanes);
    if (inside) {
      const Vec before = Simd<T>::round(load(x + c, lanes) + load(residual + c, lanes));
      store(dscale + c, multiply_add(dh, before, load(dscale + c, lanes)), lanes);
      store(dshift + c, load(dshift + c, lanes) + dh, lanes);
      dh *= load(scale + c, lanes);
    }
    store_to<kStream>(dx + c, dh, lanes);
  });
}

template <class T, bool kStream>
void backward_rows(const AddRmsBackward& p, int threads) {
  using A = typename AccumulateIn<T>::type;
  const int64_t chunk = moca_chunk_rows(p.rows), chunks = moca_partial_rows(p.rows);
  A* partials = static_cast<A*>(p.partial);
  parallel_for(chunks, threads, p.rows * p.cols * static_cast<int64_t>(sizeof(T)), [&](int64_t i) {
    A* partial = partials + i * 3 * p.cols;
    for (int64_t c = 0; c < 3 * p.cols; ++c) partial[c] = 0;
    const int64_t end = (i + 1) * chunk < p.rows ? (i + 1) * chunk : p.rows;
    for (int64_t r = i * chunk; r < end; ++r) backward_row<T, kStream>(p, r, partial);
    if (kStream) stream_fence();
  });
  A* const sums[] = {static_cast<A*>(p.dscale), static_cast<A*>(p.dshift), static_cast<A*>(p.dweight)};
  add_partial_rows<3>(partials, chunks, p.cols, sums, threads);
}

template <class T>
void backward(const AddRmsBackward& p, int threads) {
  const int64_t element = sizeof(T);
  const bool stream = worth_streaming(p.dx, p.dx_stride * element, p.rows * p.cols * element);
  return stream ? backward_rows<T, true>(p, threads) : backward_rows<T, false>(p, threads);
}

void forward_any(const AddRmsForward& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32: return forward<float>(p, threads);
    case DType::kBFloat16: return forward<BF16>(p, threads);
    case DType::kFloat16: return forward<F16>(p, threads);
    case DType::kFloat64: return forward<double>(p, threads);
  }
}

void backward_any(const AddRmsBackward& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32: return backward<float>(p, threads);
    case DType::kBFloat16: return backward<BF16>(p, threads);
    case DType::kFloat16: return backward<F16>(p, threads);
    case DType::kFloat64: return backward<double>(p, threads);
  }
}

}  // namespace

const AddRmsCpu add_rms_cpu = {forward_any, backward_any};

}  // namespace MIR_ISA
}  // namespace mir
