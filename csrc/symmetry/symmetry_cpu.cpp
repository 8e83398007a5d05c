// Checks of symmetric matrices on the CPU in one pass: each pair of mirrored tiles is read once. Compiled once per
// instruction set (isa.h).
#include "symmetry.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace mir {
namespace MIR_ISA {
namespace {

constexpr int64_t kTile = kSymmetryTile;

MIR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f(matrix, i) for every row of tiles of every matrix.
template <class T, class F>
void tile_rows(int64_t count, int64_t d, int threads, const F& f) {
  const int64_t tiles = (d + kTile - 1) / kTile;
  parallel_for(count * tiles, threads, count * d * d * static_cast<int64_t>(sizeof(T)),
               [&](int64_t index) { f(index / tiles, index % tiles); });
}

// Transposes a tile, so that the pair is compared along rows.
template <class T>
MIR_INLINE void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * kTile + r] = from[r * stride + c];
  }
}

template <class Vec>
MIR_INLINE Vec greater(Vec a, Vec b) {
  return a > b ? a : b;
}

struct Found {
  double largest = 0, apart = 0, not_finite = 0;
};

// Largest magnitudes over rows [i0, i1) of tile column j and its mirror image. Sums of 0 * x are NaN if an x is not
// finite.
template <class T>
void compare(const T* x, int64_t d, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Found& found) {
  T mirror[kTile * kTile];
  transpose(x + j0 * d + i0, d, j1 - j0, i1 - i0, mirror);
  using Vec = typename Simd<T>::Vec;
  Vec largest = {}, apart = {}, zero = {};
  for (int64_t i = i0; i < i1; ++i) {
    const T *row = x + i * d + j0, *other = mirror + (i - i0) * kTile;
    for_columns<T>(j1 - j0, [&](int64_t c, auto lanes) {
      const Vec a = load(row + c, lanes), b = load(other + c, lanes);
      const Vec gap = a / 2 - b / 2;  // halved, because the full difference may overflow
      largest = greater(greater(largest, a), greater(-a, greater(b, -b)));
      apart = greater(apart, greater(gap, -gap));
      zero += a * 0 + b * 0;
    });
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    found.largest = found.largest > largest[lane] ? found.largest : static_cast<double>(largest[lane]);
    found.apart = found.apart > apart[lane] ? found.apart : static_cast<double>(apart[lane]);
    found.not_finite += zero[lane] == 0 ? 0 : 1;
  }
}

template <class T>
int64_t check(const Symmetry& p, int threads) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t tiles = symmetry_tiles(p.d), numbers = kSymmetryNumbers * tiles;
  tile_rows<T>(p.count, p.d, threads, [&](int64_t matrix, int64_t i) {
    Found found;
    const int64_t i0 = i * kTile, i1 = smaller(i0 + kTile, p.d);
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
      compare(x + matrix * p.d * p.d, p.d, i0, i1, j0, smaller(j0 + kTile, p.d), found);
    }
    double* to = p.workspace + matrix * numbers + i * kSymmetryNumbers;
    to[0] = found.largest;
    to[1] = found.apart;
    to[2] = found.not_finite;
  });
  int64_t flags = 0;
  for (int64_t matrix = 0; matrix < p.count; ++matrix) {
    const T* a = x + matrix * p.d * p.d;
    double largest = 0, apart = 0, not_finite = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      const double* from = p.workspace + matrix * numbers + i * kSymmetryNumbers;
      largest = from[0] > largest ? from[0] : largest;
      apart = from[1] > apart ? from[1] : apart;
      not_finite += from[2];
    }
    if (not_finite > 0) flags |= kNotFinite;
    if (apart > 0) flags |= kNotMirrored;
    if (apart > p.allowed * largest / 2) flags |= kAsymmetric;
    for (int64_t i = 0; i < p.d; ++i) {
      const T variance = a[i * (p.d + 1)];
      if (variance > 0) continue;
      if (static_cast<double>(variance) < -p.allowed * largest) flags |= kNegativeVariance;
      for (int64_t j = 0; j < p.d; ++j) {
        const double entry = static_cast<double>(a[i * p.d + j]);
        if (entry > p.allowed * largest || -entry > p.allowed * largest) flags |= kZeroVariance;
      }
    }
  }
  return flags;
}

template <class T>
void symmetrize(const Symmetrize& p, int threads) {
  tile_rows<T>(p.count, p.d, threads, [&](int64_t matrix, int64_t i) {
    const T* x = static_cast<const T*>(p.x) + matrix * p.d * p.d;
    double* out = p.out + matrix * p.d * p.d;
    const int64_t i0 = i * kTile, i1 = smaller(i0 + kTile, p.d);
    T mirror[kTile * kTile];
    double mean[kTile * kTile];
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
      const int64_t j1 = smaller(j0 + kTile, p.d);
      transpose(x + j0 * p.d + i0, p.d, j1 - j0, i1 - i0, mirror);
      for (int64_t r = i0; r < i1; ++r) {
        const T *a = x + r * p.d + j0, *b = mirror + (r - i0) * kTile;
        double* to = mean + (r - i0) * kTile;
        for (int64_t c = 0; c < j1 - j0; ++c) to[c] = static_cast<double>(a[c]) / 2 + static_cast<double>(b[c]) / 2;
        __builtin_memcpy(out + r * p.d + j0, to, (j1 - j0) * sizeof(double));
      }
      for (int64_t c = j0; c < j1; ++c) {
        for (int64_t r = i0; r < i1; ++r) out[c * p.d + r] = mean[(r - i0) * kTile + c - j0];
      }
    }
  });
}

int64_t check_any(const Symmetry& p, int threads) {
  return p.dtype == DType::kFloat32 ? check<float>(p, threads) : check<double>(p, threads);
}

void symmetrize_any(const Symmetrize& p, int threads) {
  p.dtype == DType::kFloat32 ? symmetrize<float>(p, threads) : symmetrize<double>(p, threads);
}

}  // namespace

const SymmetryCpu symmetry_cpu = {check_any, symmetrize_any};

}  // namespace MIR_ISA
}  // namespace mir
