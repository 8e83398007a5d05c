// Products of packed columns over one triangle of macro-tiles, in float or in 16-bit integers. Included by
// second_moment_cpu.cpp only (isa.h).
//
// Columns are packed as `depth` 32-bit words each: the float of a row, or the two integers of a pair of rows.
#pragma once

#include "../common/parallel.h"
#include "../common/simd.h"
#include "moments.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Micro-tile: kTall rows and kBlock columns fill the registers except for one row of vectors and one broadcast.
constexpr int kVectors = 3;
constexpr int kTall = kRegisterBytes == 64 ? 8 : 4;
constexpr int kBlock = kVectors * kLanes<float>;
// Macro-tile: a multiple of kBlock for every register width.
constexpr int kTile = 96;
static_assert(kTile % kBlock == 0 && kBlock % kTall == 0, "micro-tiles fill macro-tiles");

MIR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MIR_INLINE int64_t groups_of(int64_t cols) { return (cols + kTile - 1) / kTile; }

// Calls f(column, left, block) for each vector of columns of a group: it begins at column `block` of the group, and
// `left` real columns remain from there on.
template <class F>
MIR_INLINE void for_vectors(int64_t cols, int64_t group, const F& f) {
  for (int block = 0; block < kTile; block += kLanes<float>) {
    const int64_t column = group * kTile + block;
    f(column, cols - column, block);
  }
}

// The vector of columns at x, filled with zeros if fewer are left.
template <class T>
MIR_INLINE F32Vec columns(const T* x, int64_t left) {
  return left >= kLanes<float> ? load(x, Whole{}) : left > 0 ? load(x, First{left}) : F32Vec{};
}

MIR_INLINE void add_to(double* sums, F32Vec sum, int64_t left) {
  for (int64_t c = 0; c < kLanes<float> && c < left; ++c) sums[c] += static_cast<double>(sum[c]);
}

// Two 16-bit integers of consecutive rows, the earlier in the lower half.
struct Pair {
  uint32_t bits;
};

// The number of words summed before the sum is added to the tile, how a product of words is added to the sum, and the
// value of the sum.
template <class Word>
struct Words;

template <>
struct Words<float> {
  using Vec = F32Vec;
  using Sum = F32Vec;
  static constexpr int64_t kRun = 128;  // two panels and the tile take 135 KB
  static MIR_INLINE Vec all(float word) { return word - F32Vec{}; }  // a broadcast: x - 0 is x for every x
  static MIR_INLINE Sum add_product(Vec a, Vec b, Sum sum) { return multiply_add(a, b, sum); }
  static MIR_INLINE F32Vec value(Sum sum, const float*, const float*) { return sum; }
};

#if defined(__AVX2__)
#define MIR_INTEGER_PRODUCTS 1
template <>
struct Words<Pair> {
  using Vec = U32Vec;
  using Sum = I32Vec;
  static constexpr int64_t kRun = 32;  // longer runs have coarser integers (integers.h)
  static MIR_INLINE Vec all(Pair word) { return word.bits + U32Vec{}; }
  // Sums wrap around: those of a column with Inf or NaN overflow, and its unit turns them into NaN.
  static MIR_INLINE Sum add_product(Vec a, Vec b, Sum sum) {
#if defined(__AVX512VNNI__)
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return (Sum)((Vec)sum + (Vec)_mm512_madd_epi16((__m512i)a, (__m512i)b));
#else
    return (Sum)((Vec)sum + (Vec)_mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
  }
  static MIR_INLINE F32Vec value(Sum sum, const float* unit_a, const float* units_b) {
    return __builtin_convertvector(sum, F32Vec) * (*unit_a - F32Vec{}) * load_bits<F32Vec>(units_b);
  }
};
#else
#define MIR_INTEGER_PRODUCTS 0
#endif

template <class Word>
MIR_INLINE int64_t runs_of(int64_t depth) {
  return (depth + Words<Word>::kRun - 1) / Words<Word>::kRun;
}

// Words of a group of kTile columns with `depth` words each. They are ordered by run, micro-panel, word.
template <class Word>
MIR_INLINE int64_t group_size(int64_t depth) {
  return kTile * Words<Word>::kRun * runs_of<Word>(depth);
}

// The offset of column `block` of a group, a multiple of the lanes, in a run.
template <class Word>
MIR_INLINE int64_t place(int64_t run, int block) {
  return (run * kTile + block / kBlock * kBlock) * Words<Word>::kRun + block % kBlock;
}

// A group of packed columns and, for integers, the unit of each run and column: `units` is (runs, kTile).
template <class Word>
struct Panel {
  const Word* words;
  const float* units;
};

// tile[m][n] += sum over words of a[word][m] * b[word][n], for kWide vectors of b; a and b are micro-panels, tile has
// kTile columns. Prefetches a share of the next panel: kTall words per word, from `ahead` on.
template <int kWide, class Word>
void multiply(Panel<Word> left, Panel<Word> right, int64_t words, float* tile, const Word* ahead) {
  using W = Words<Word>;
  typename W::Sum sum[kTall][kWide] = {};
  const Word *a = left.words, *b = right.words;
  for (int64_t w = 0; w < words; ++w, a += kBlock, b += kBlock, ahead += kTall) {
    __builtin_prefetch(ahead);
    typename W::Vec row[kWide];
#pragma GCC unroll 8
    for (int n = 0; n < kWide; ++n) row[n] = load_bits<typename W::Vec>(b + n * kLanes<float>);
#pragma GCC unroll 8
    for (int m = 0; m < kTall; ++m) {
      const auto all = W::all(a[m]);
#pragma GCC unroll 8
      for (int n = 0; n < kWide; ++n) sum[m][n] = W::add_product(all, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTall; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kWide; ++n) {
      float* to = tile + m * kTile + n * kLanes<float>;
      const F32Vec more = W::value(sum[m][n], left.units + m, right.units + n * kLanes<float>);
      store_bits(to, load_bits<F32Vec>(to) + more);
    }
  }
}

// tile[m][n] += sum over words of left[word][m] * right[word][n] for m < tall, n < wide and a few entries beyond. If
// `diagonal`, left is right and entries right of the diagonal are not needed.
template <class Word>
void add_product(Panel<Word> left, Panel<Word> right, int64_t depth, int tall, int wide, bool diagonal, float* tile) {
  constexpr int64_t kRun = Words<Word>::kRun;
  for (int64_t run = 0; run < runs_of<Word>(depth); ++run) {
    const int64_t words = smaller(depth - run * kRun, kRun), unit = run * kTile;
    // One panel of the left and one of the right stay in the first-level cache for kBlock / kTall micro-tiles.
    for (int m = 0; m < tall; m += kBlock) {
      for (int n = 0; n < (diagonal ? m + 1 : wide); n += kBlock) {
        const Panel<Word> b = {right.words + place<Word>(run, n), right.units + unit + n};
        for (int strip = 0; strip < kBlock && m + strip < tall; strip += kTall) {
          const Panel<Word> a = {left.words + place<Word>(run, m) + strip, left.units + unit + m + strip};
          const int columns = diagonal && m == n ? strip + kTall : wide - n;
          float* to = tile + (m + strip) * kTile + n;
          const Word* ahead = b.words + (kBlock + strip) * kRun;
          if (columns > 2 * kLanes<float>) {
            multiply<3>(a, b, words, to, ahead);
          } else if (columns > kLanes<float>) {
            multiply<2>(a, b, words, to, ahead);
          } else {
            multiply<1>(a, b, words, to, ahead);
          }
        }
      }
    }
  }
}

// Remainders of x - shift after packing: products[l][c] = sum over rows of the remainder of column owner[l] times
// column c of x - shift. Owners ascend; those of group g have indices first[g] to first[g + 1] - 1.
struct Remainders {
  int64_t count;
  int32_t *owner, *first;
  float* products;
  int64_t stride;
};

// The first entry of a row in the packed triangle.
MIR_INLINE double* row_of(const SecondMoment& p, int64_t row) {
  const int64_t panel = row / p.panel, end = (panel + 1) * p.panel;
  return p.second + p.panel * p.panel * (panel * (panel + 1) / 2) + (row - panel * p.panel) * smaller(end, p.cols);
}

// Adds macro-tile (i, j), i >= j, of the product of left and right, and the deferred outer products to the triangle.
template <class Word>
void add_tile(const SecondMoment& p, Panel<Word> left, Panel<Word> right, int64_t depth, const Remainders* left_out,
              int64_t i, int64_t j) {
  alignas(64) float tile[kTile * kTile] = {};
  const int64_t first_row = i * kTile, first_column = j * kTile;
  const int64_t last = smaller(first_row + kTile, p.cols);
  const int wide = static_cast<int>(smaller(p.cols - first_column, kTile));
  add_product(left, right, depth, static_cast<int>(last - first_row), wide, i == j, tile);
  const double *u = p.vectors, *v = p.vectors + p.cols;
  const double *__restrict u_j = u + first_column, *__restrict v_j = v + first_column;
  for (int64_t row = first_row; row < last; ++row) {
    // A row of the tile is too short for the hardware prefetcher.
    if (row + 4 < last) {
      for (int64_t c = 0; c < kTile; c += 8) __builtin_prefetch(row_of(p, row + 4) + first_column + c, 1);
    }
    double* __restrict to = row_of(p, row) + first_column;
    const float* __restrict from = tile + (row - first_row) * kTile;
    const double a = p.weights[0] * u[row], b = p.weights[1] * v[row];
    const int64_t count = smaller(kTile, row + 1 - first_column);
    for (int64_t c = 0; c < count; ++c) to[c] += static_cast<double>(from[c]) + (a * u_j[c] + b * v_j[c]);
  }
  if (left_out == nullptr) return;
  // If both the row and the column of an entry have remainders, both products are added. A diagonal entry gets its
  // product twice.
  for (int32_t l = left_out->first[i]; l < left_out->first[i + 1]; ++l) {
    const int64_t row = left_out->owner[l], count = smaller(kTile, row + 1 - first_column);
    double* to = row_of(p, row) + first_column;
    const float* from = left_out->products + l * left_out->stride + first_column;
    for (int64_t c = 0; c < count; ++c) to[c] += static_cast<double>(from[c]);
  }
  for (int32_t l = left_out->first[j]; l < left_out->first[j + 1]; ++l) {
    const int64_t column = left_out->owner[l];
    const float* from = left_out->products + l * left_out->stride;
    for (int64_t row = i == j ? column : first_row; row < last; ++row) {
      row_of(p, row)[column] += static_cast<double>(from[row]);
    }
  }
}

// Adds the products of all packed columns, one panel per group, to the triangle. Every thread keeps the same part of
// the triangle: moving it between two cores took a fifth of the time of a block of (1024, 2048).
template <class Word>
void add_triangle(const SecondMoment& p, const Word* packed, const float* units, int64_t depth,
                  const Remainders* left_out, int threads) {
  const int64_t groups = groups_of(p.cols), bytes = depth * p.cols * static_cast<int64_t>(sizeof(Word));
  const auto panel = [&](int64_t group) {
    return Panel<Word>{packed + group * group_size<Word>(depth), units + group * runs_of<Word>(depth) * kTile};
  };
  const int64_t tiles = groups * (groups + 1) / 2, shares = threads > 1 ? threads : 1;
  parallel_for(shares, threads, bytes * groups, [&](int64_t share) {
    for (int64_t index = tiles * share / shares; index < tiles * (share + 1) / shares; ++index) {
      int64_t i = 0;
      while ((i + 1) * (i + 2) / 2 <= index) ++i;
      const int64_t j = index - i * (i + 1) / 2;
      add_tile(p, panel(i), panel(j), depth, left_out, i, j);
    }
  });
}

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
