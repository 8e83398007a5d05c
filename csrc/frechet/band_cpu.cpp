// Traces of inverses of shifted band matrices on the CPU. Compiled once per instruction set (isa.h).
//
// Factors T + s I = L D L^T with one shift s per lane, and differentiates every entry with respect to s. The logarithm
// of the determinant is the sum of log d_j, so its derivative, the trace of the inverse, is the sum of d_j' / d_j.
#include "frechet.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace mir {
namespace MIR_ISA {
namespace {

constexpr int kWide = kLanes<double>;
constexpr int kRows = kRegisterBytes == 64 ? 8 : 4;  // two accumulators per row stay in registers

// A ring buffer of the last width + 1 columns of L and L', `length` vectors each, with zeros beyond `width`; the
// current column; row j of L D, negated; the pivots of the columns in the ring.
struct Ring {
  int64_t slots, length;
  double *lower, *lower_ds, *column, *column_ds, *row, *row_ds, *pivot, *pivot_ds;

  explicit MIR_INLINE Ring(int64_t width) : slots(width + 1), length(width + 1 + kRows) {}
  MIR_INLINE int64_t doubles() const { return (2 * slots * length + 2 * length + 4 * slots) * kWide; }
  MIR_INLINE void place(double* memory) {
    lower = memory;
    lower_ds = lower + slots * length * kWide;
    column = lower_ds + slots * length * kWide;
    column_ds = column + length * kWide;
    row = column_ds + length * kWide;
    row_ds = row + slots * kWide;
    pivot = row_ds + slots * kWide;
    pivot_ds = pivot + slots * kWide;
  }
};

MIR_INLINE F64Vec at(const double* p, int64_t vector) { return load_bits<F64Vec>(p + vector * kWide); }
MIR_INLINE void put(double* p, int64_t vector, F64Vec v) { store_bits(p + vector * kWide, v); }

// Entries [r0, r0 + kRows) of the column from pivot j down, computed from the columns [from, j) of the ring.
MIR_INLINE void column_entries(const BandInverseTraces& p, const Ring& ring, F64Vec shift, int64_t j, int64_t r0,
                               int64_t first) {
  F64Vec sum[kRows] = {}, sum_ds[kRows] = {};
  for (int t = 0; t < kRows && r0 + t <= p.width; ++t) sum[t] += p.band[j * (p.width + 1) + r0 + t];
  if (r0 == 0) {
    sum[0] += shift;
    sum_ds[0] += 1;
  }
  const int64_t from = j + r0 - p.width > first ? j + r0 - p.width : first;
  int64_t slot = from % ring.slots;
  for (int64_t k = from; k < j; ++k) {
    const double* l = ring.lower + (slot * ring.length + j + r0 - k) * kWide;
    const double* l_ds = ring.lower_ds + (slot * ring.length + j + r0 - k) * kWide;
    const F64Vec u = at(ring.row, k - first), u_ds = at(ring.row_ds, k - first);
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      const F64Vec entry = at(l, t);
      sum[t] = multiply_add(entry, u, sum[t]);
      sum_ds[t] = multiply_add(at(l_ds, t), u, multiply_add(entry, u_ds, sum_ds[t]));
    }
    if (++slot == ring.slots) slot = 0;
  }
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t) {
    put(ring.column, r0 + t, sum[t]);
    put(ring.column_ds, r0 + t, sum_ds[t]);
  }
}

void inverse_traces(const BandInverseTraces& p, Ring ring, int64_t group) {
  ring.place(p.workspace + group * ring.doubles());
  __builtin_memset(ring.lower, 0, ring.doubles() * sizeof(double));
  const int64_t left = p.count - group * kWide;
  F64Vec shift = {};
  __builtin_memcpy(&shift, p.shifts + group * kWide, (left < kWide ? left : kWide) * sizeof(double));
  F64Vec trace = {};
  bool positive[kWide];
  for (bool& lane : positive) lane = true;
  for (int64_t j = 0; j < p.rows; ++j) {
    const int64_t first = j > p.width ? j - p.width : 0;
    for (int64_t k = first; k < j; ++k) {
      const int64_t slot = k % ring.slots;
      const F64Vec l = at(ring.lower, slot * ring.length + j - k), d = at(ring.pivot, slot);
      const F64Vec l_ds = at(ring.lower_ds, slot * ring.length + j - k), d_ds = at(ring.pivot_ds, slot);
      put(ring.row, k - first, -(l * d));
      put(ring.row_ds, k - first, -(l_ds * d + l * d_ds));
    }
    for (int64_t r0 = 0; r0 <= p.width; r0 += kRows) column_entries(p, ring, shift, j, r0, first);
    const F64Vec d = at(ring.column, 0), d_ds = at(ring.column_ds, 0), inverse = 1 / d;
    for (int lane = 0; lane < kWide; ++lane) positive[lane] = positive[lane] && d[lane] > 0;
    trace += d_ds * inverse;
    const int64_t slot = j % ring.slots;
    put(ring.pivot, slot, d);
    put(ring.pivot_ds, slot, d_ds);
    for (int64_t r = 1; r <= p.width; ++r) {
      const F64Vec l = at(ring.column, r) * inverse;
      put(ring.lower, slot * ring.length + r, l);
      put(ring.lower_ds, slot * ring.length + r, (at(ring.column_ds, r) - l * d_ds) * inverse);
    }
  }
  for (int lane = 0; lane < kWide && lane < left; ++lane) {
    p.traces[group * kWide + lane] = positive[lane] ? trace[lane] : __builtin_nan("");
  }
}

int64_t workspace(int64_t width, int64_t count) { return (count + kWide - 1) / kWide * Ring(width).doubles(); }

void run(const BandInverseTraces& p, int threads) {
  const int64_t groups = (p.count + kWide - 1) / kWide;
  parallel_for(groups, threads, p.rows * p.width * p.width * 8, [&](int64_t group) {
    inverse_traces(p, Ring(p.width), group);
  });
}

}  // namespace

const BandInverseTracesCpu band_inverse_traces_cpu = {run, workspace};

}  // namespace MIR_ISA
}  // namespace mir
