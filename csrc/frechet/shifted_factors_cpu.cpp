// Cholesky factors of a symmetric matrix plus shifts on the CPU: their pivots, and norms that bound their rounding
// error. Compiled once per instruction set (isa.h).
#include "cholesky.h"
#include "frechet.h"
#include "products.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Upper bound on the number of roundings of a term in any entry of L L^T, T C or C^T A C: those of a sum in registers
// of kRun products or of a tile's; one per addition of such a sum (twice the runs of a depth in Z + Z^T); and those of
// operations within a tile: divisions, a root, a strip, a shift.
int64_t roundings(int64_t d) { return larger(kRun, kTile) + 2 * ((d + kRun - 1) / kRun + kTile / kRun + 2 * kTall + 12); }

int64_t workspace(int64_t d) {
  const int64_t n = whole_blocks(d), tiles = tiles_of(n);
  return n * n + tiles * (kTile * kTile + n) + 2 * n;
}

void factor(const ShiftedFactors& p, int64_t index, int threads) {
  const int64_t n = whole_blocks(p.d), tiles = tiles_of(n);
  const double shift = p.shifts[index];
  double *pivots = p.pivots + index * p.d, *norms = p.norms + index * kFactorNorms;
  double* column = p.workspace + n * n;
  double* columns_of_tiles = column + tiles * kTile * kTile;  // sums of |L| down the columns, per tile of rows
  double* across = columns_of_tiles + tiles * n;              // sums of |L| along the rows
  double* squares = across + n;                               // sums of L^2 along the rows
  __builtin_memset(columns_of_tiles, 0, (tiles + 2) * n * sizeof(double));
  for (int t = 0; t < kFactorNorms; ++t) norms[t] = __builtin_nan("");

  const auto entries = [&](Range rows, Range columns, double* to) {
    for (int64_t r = rows.from; r < rows.to; ++r, to += kTile) {
      const int64_t known = r < p.d ? smaller(columns.to, p.d) - columns.from : 0;
      __builtin_memcpy(to, p.m + r * p.stride + columns.from, known * sizeof(double));
      for (int64_t c = known; c < columns.to - columns.from; ++c) to[c] = 0;
      if (r >= columns.from && r < columns.to) to[r - columns.from] = r < p.d ? to[r - columns.from] + shift : 1;
    }
  };
  const auto done = [&](Range rows, Range columns, const double* x) {
    double* down = columns_of_tiles + columns.from / kTile * n;
    const int64_t known = smaller(columns.to, p.d) - columns.from;
    for (int64_t r = rows.from; r < smaller(rows.to, p.d); ++r, x += kTile) {
      for (int64_t c = 0; c < known; ++c) {
        const double size = x[c] < 0 ? -x[c] : x[c];
        across[columns.from + c] += size;
        squares[columns.from + c] += size * size;
        down[r] += size;
      }
      if (r >= columns.from && r < columns.to) pivots[r] = x[r - columns.from];
    }
  };
  if (!Cholesky{{p.workspace, n}, column, n, threads, 0.0}.run(entries, done)) return;
  double all = 0, longest_row = 0, longest_column = 0;
  for (int64_t i = 0; i < p.d; ++i) {
    double down = 0;
    for (int64_t t = 0; t < tiles; ++t) down += columns_of_tiles[t * n + i];
    all += squares[i];
    longest_row = across[i] > longest_row ? across[i] : longest_row;
    longest_column = down > longest_column ? down : longest_column;
  }
  norms[0] = __builtin_sqrt(all);
  norms[1] = __builtin_sqrt(longest_row * longest_column);
}

void run(const ShiftedFactors& p, int threads) {
  for (int64_t i = 0; i < p.count; ++i) factor(p, i, threads);
}

}  // namespace

const ShiftedFactorsCpu shifted_factors_cpu = {run, workspace, roundings};

}  // namespace MIR_ISA
}  // namespace mir
