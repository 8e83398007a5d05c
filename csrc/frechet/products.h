// Products of double matrices on the CPU, for the sizes and symmetries in this folder. Included by *_cpu.cpp only
// (isa.h).
//
// Every product is a sum over depth k of left[m][k] right[n][k]. Right operands, and left ones that are read more than
// once, are packed into micro-panels of kBlock rows, in which the entries of all rows at one depth are contiguous.
#pragma once

#include "../common/parallel.h"
#include "../common/simd.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Micro-tile: kTall rows and kBlock columns fill the registers except for one row of vectors and one broadcast.
constexpr int kLanes64 = kLanes<double>;
constexpr int kVectors = 3;
constexpr int kTall = kRegisterBytes == 64 ? 8 : kRegisterBytes == 32 ? 4 : 3;
constexpr int kBlock = kVectors * kLanes64;
// Macro-tile, a multiple of kBlock for every register width, and the depth at which two micro-panels fit in the
// first-level cache.
constexpr int kTile = 96;
constexpr int64_t kRun = kRegisterBytes == 64 ? 64 : 128;
static_assert(kTile % kBlock == 0 && kBlock % kTall == 0, "micro-tiles fill macro-tiles");

MIR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MIR_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
MIR_INLINE int64_t whole_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
MIR_INLINE int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Entry (m, k) at `at[m * row + k * depth]`.
struct Left {
  const double* at;
  int64_t row, depth;
};
// Entry (k, n) at `at[k * depth + n]`.
struct Right {
  const double* at;
  int64_t depth;
};

// c[m][n] += sign * sum over k of left[m][k] right[k][n], for kTall rows and kWide vectors of columns.
template <int kWide, int kSign>
MIR_INLINE void multiply(Left left, Right right, int64_t depth, double* c, int64_t c_stride) {
  F64Vec sum[kTall][kWide] = {};
  const double *a = left.at, *b = right.at;
  for (int64_t k = 0; k < depth; ++k, a += left.depth, b += right.depth) {
    F64Vec row[kWide];
#pragma GCC unroll 8
    for (int n = 0; n < kWide; ++n) row[n] = load_bits<F64Vec>(b + n * kLanes64);
#pragma GCC unroll 8
    for (int m = 0; m < kTall; ++m) {
      const F64Vec all = a[m * left.row] - F64Vec{};  // a broadcast: x - 0 is x for every x
#pragma GCC unroll 8
      for (int n = 0; n < kWide; ++n) sum[m][n] = multiply_add(all, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTall; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kWide; ++n) {
      double* to = c + m * c_stride + n * kLanes64;
      const F64Vec before = load_bits<F64Vec>(to);
      store_bits(to, kSign > 0 ? before + sum[m][n] : before - sum[m][n]);
    }
  }
}

// A matrix in micro-panels of rows with `depth` entries per row.
struct Packed {
  double* at;
  int64_t depth;
  // The address of row r, a multiple of kTall, at depth k.
  MIR_INLINE double* place(int64_t r, int64_t k) const {
    return at + (r / kBlock * depth + k) * kBlock + r % kBlock;
  }
  MIR_INLINE Left left(int64_t r, int64_t k) const { return {place(r, k), 1, kBlock}; }
  MIR_INLINE Right right(int64_t r, int64_t k) const { return {place(r, k), kBlock}; }
};

struct Range {
  int64_t from, to;
};

// c[m - rows.from][n - columns.from] += sign * sum over k of left[m][k] right[n][k], for whole blocks of rows and
// columns. depth(m, n) is the range of k for the block that begins at row m and column n; an empty range skips it.
template <int kSign, class F>
void add_product(const Packed& left, Range rows, const Packed& right, Range columns, double* c, int64_t c_stride,
                 const F& depth) {
  const Range first = depth(rows.from, columns.from), last = depth(rows.to - kBlock, columns.to - kBlock);
  const Range all = {smaller(first.from, last.from), larger(first.to, last.to)};
  for (int64_t from = all.from; from < all.to; from += kRun) {
    for (int64_t m = rows.from; m < rows.to; m += kBlock) {
      for (int64_t n = columns.from; n < columns.to; n += kBlock) {
        const Range wanted = depth(m, n);
        const int64_t k = larger(from, wanted.from), run = smaller(from + kRun, wanted.to) - k;
        if (run <= 0) continue;
        for (int64_t strip = m; strip < m + kBlock; strip += kTall) {
          double* to = c + (strip - rows.from) * c_stride + (n - columns.from);
          multiply<kVectors, kSign>(left.left(strip, k), right.right(n, k), run, to, c_stride);
        }
      }
    }
  }
}

// Fills rows [r, r + rows) of `to`, in whole blocks, at depth [k, k + depth) with entry(row, step), counted from r
// and k.
template <class F>
MIR_INLINE void pack(int64_t rows, int64_t depth, const Packed& to, int64_t r, int64_t k, const F& entry) {
  for (int64_t m = 0; m < rows; m += kBlock) {
    double* at = to.place(r + m, k);
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t j = 0; j < kBlock; ++j) at[i * kBlock + j] = entry(m + j, i);
    }
  }
}

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
