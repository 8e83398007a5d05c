// Left-looking Cholesky factorisation of one matrix by tiles. Included by *_cpu.cpp only (isa.h).
#pragma once

#include "products.h"

namespace mir {
namespace MIR_ISA {
namespace {

MIR_INLINE Range tile(int64_t i, int64_t n) { return {i * kTile, smaller((i + 1) * kTile, n)}; }

struct Cholesky {
  Packed lower;    // receives L
  double* column;  // kTile^2 entries per tile of rows
  int64_t n;       // a multiple of kBlock
  int threads;
  double least;    // pivots must be larger than this

  // Returns whether all pivots were large enough. entries(rows, columns, to) writes entries of the matrix to to[r][c],
  // with row stride kTile. done(rows, columns, x) receives x[r][c] = L^T[r][c], in any order for the same `rows`.
  template <class Entries, class Done>
  bool run(const Entries& entries, const Done& done) const {
    for (int64_t j = 0; j < tiles_of(n); ++j) {
      const Range rows = tile(j, n);
      const auto each = [&](const auto& f) {
        parallel_for(tiles_of(n) - j, threads, n * n, [&](int64_t i) {
          f(i, tile(j + i, n), column + (j + i) * kTile * kTile);
        });
      };
      each([&](int64_t, Range columns, double* to) {
        entries(rows, columns, to);
        add_product<-1>(lower, rows, lower, columns, to, kTile, [=](int64_t, int64_t) { return Range{0, rows.from}; });
      });
      const double* diagonal = column + j * kTile * kTile;
      if (!factor(column + j * kTile * kTile, rows.to - rows.from)) return false;
      each([&](int64_t i, Range columns, double* x) {
        const int64_t tall = rows.to - rows.from, wide = columns.to - columns.from;
        if (i > 0) solve(diagonal, tall, x, wide);
        pack(wide, tall, lower, columns.from, rows.from, [=](int64_t m, int64_t k) { return x[k * kTile + m]; });
        done(rows, columns, x);
      });
    }
    return true;
  }

  // Factors a symmetric tile, given by its upper triangle, as U^T U in place, with zeros below U.
  bool factor(double* s, int64_t size) const {
    for (int64_t r = 0; r < size; r += kTall) {
      const int64_t from = r / kBlock * kBlock;
      for (int64_t c = from; c < size; c += kBlock) {
        multiply<kVectors, -1>({s + r, 1, kTile}, {s + c, kTile}, r, s + r * kTile + c, kTile);
      }
      for (int64_t k = r; k < r + kTall; ++k) {
        double* row = s + k * kTile;
        if (!(row[k] > least)) return false;
        const double root = __builtin_sqrt(row[k]);
        for (int64_t c = from; c < size; ++c) row[c] /= root;
        for (int64_t i = k + 1; i < r + kTall; ++i) {
          double* to = s + i * kTile;
          const double entry = row[i];
          for (int64_t c = from; c < size; ++c) to[c] -= entry * row[c];
        }
      }
    }
    for (int64_t r = 1; r < size; ++r) __builtin_memset(s + r * kTile, 0, r * sizeof(double));
    return true;
  }

  // Solves U^T y = x in place, x (size, wide).
  static void solve(const double* u, int64_t size, double* x, int64_t wide) {
    for (int64_t c = 0; c < wide; c += kBlock) {
      for (int64_t r = 0; r < size; r += kTall) {
        double* to = x + r * kTile + c;
        multiply<kVectors, -1>({u + r, 1, kTile}, {x + c, kTile}, r, to, kTile);
        for (int64_t k = 0; k < kTall; ++k) {
          const double* entries = u + (r + k) * kTile + r;
          for (int64_t t = 0; t < kBlock; ++t) to[k * kTile + t] /= entries[k];
          for (int64_t i = k + 1; i < kTall; ++i) {
            for (int64_t t = 0; t < kBlock; ++t) to[i * kTile + t] -= entries[i] * to[k * kTile + t];
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
