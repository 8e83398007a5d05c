// The second moment of bfloat16 rows in 16-bit integers: a CPU multiplies twice as many of them at a time as floats.
// Included by second_moment_cpu.cpp only (isa.h).
//
// A bfloat16 has 8 significant bits. In units of about 2^-12 of its column's root mean square it fits in 16 bits, and
// is exact unless it is less than a few hundredths of the root mean square. Each column has such a unit, a power of
// two, in each run of 64 rows, as small as 32-bit sums allow:
//
//     |sum over a run of v_i v_j| <= |v_i| |v_j| < 2^31    (Cauchy-Schwarz; also for all partial sums)
//
// so a run is summed without rounding. If rounding to the unit leaves more than kLeft of a column's norm, as in columns
// with outliers, the remainder of the column is multiplied as well. If there are many such columns, floats are faster.
#pragma once

#include "triangle.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Rounding a column of n rows changes its covariances by about kLeft / sqrt(n) of sigma_i sigma_j, and the largest
// change is about five times that.
constexpr float kLeft = 2.5e-5f;
// With fewer rows the error is too large and there is little to gain.
constexpr int64_t kFewestRows = 1024;

#if MIR_INTEGER_PRODUCTS
constexpr int64_t kRows = 2 * Words<Pair>::kRun;  // rows per run
constexpr float kLargestNorm = 46300.0f;          // sqrt(2^31), less what rounding can add to the norm of a run
constexpr float kLargestValue = 32767.0f;
constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, stored in the lowest bits

MIR_INLINE int64_t pairs_of(int64_t rows) { return (rows + 1) / 2; }
MIR_INLINE int64_t most_remainders(int64_t cols) { return cols / 8; }

MIR_INLINE F32Vec least(F32Vec a, F32Vec b) { return a < b ? a : b; }
MIR_INLINE F32Vec most(F32Vec a, F32Vec b) { return a > b ? a : b; }
MIR_INLINE F32Vec magnitude(F32Vec v) { return (F32Vec)((U32Vec)v & 0x7fffffffu); }
MIR_INLINE F32Vec root(F32Vec v) {
#if defined(__AVX512F__)
  return (F32Vec)_mm512_sqrt_ps((__m512)v);
#else
  return (F32Vec)_mm256_sqrt_ps((__m256)v);
#endif
}

// The shift of a column is its centre rounded to a sixteenth of the deviation or to a bfloat16, whichever is coarser:
// then x - shift is no finer than x, and nearly centred.
MIR_INLINE F32Vec coarse(F32Vec centre, F32Vec variance) {
  // A power of two near sqrt(variance) / 16, from half the exponent.
  const F32Vec grid = (F32Vec)(((((U32Vec)variance >> 23) >> 1) + (64 - 5)) << 23);
  const F32Vec rounds = (F32Vec)((U32Vec)(variance > 0) & (U32Vec)(grid * kRounds));
  return (Simd<BF16>::round(centre) + rounds) - rounds;
}

// One run of rows of one vector of columns, in float.
struct Run {
  F32Vec row[kRows];
  int64_t rows;
};

// Accumulated rounding errors of two series of rows, added to the next row of the series: repeated values are rounded
// sometimes up and sometimes down, so their errors do not add up in the covariance with a correlated column, such as
// one that marks special tokens. Rows are assigned to the series pseudo-randomly, so that no other pattern correlates.
struct Carry {
  F32Vec of[2];
};
constexpr uint64_t kSeries = 0x9e6c63d0876a9a35u;
constexpr float kCarried = 0.996f;  // part of the error that is carried, below 1 so that integers stay unchanged

MIR_INLINE F32Vec within_half(F32Vec v) { return least(most(v, F32Vec{} - 0.5f), F32Vec{} + 0.5f); }

// Calls f(row, its integer in the lowest 16 bits, its rounding error in units) for the rows of a run; scale = 1 / unit.
template <class F>
MIR_INLINE void round_run(const Run& run, int64_t index, F32Vec unit, F32Vec scale, Carry& carry, const F& f) {
  for (F32Vec& c : carry.of) c = within_half(c * scale);
  for (int64_t r = 0; r < run.rows; ++r) {
    F32Vec& c = carry.of[kSeries >> ((r + 21 * index) % 64) & 1];
    const F32Vec exact = run.row[r] * scale, with_carry = multiply_add(c, F32Vec{} + kCarried, exact);
    const F32Vec shifted = with_carry + kRounds, rounded = shifted - kRounds;
    c = with_carry - rounded;
    f(r, (U32Vec)shifted & 0xffffu, exact - rounded);
  }
  for (F32Vec& c : carry.of) c *= unit;
}

// Sums over the rows of a run: the squared values, and their squared rounding errors.
struct Squares {
  F32Vec all, left;
};

// Packs a run and writes its unit: the power of two for which neither the norm nor a value is too large.
MIR_INLINE Squares quantize(const Run& run, int64_t index, Carry& carry, Pair* to, float* unit_to) {
  F32Vec all[2] = {}, largest[2] = {}, left[2] = {};
  for (int64_t r = 0; r < run.rows; ++r) {
    all[r % 2] = multiply_add(run.row[r], run.row[r], all[r % 2]);
    largest[r % 2] = most(largest[r % 2], magnitude(run.row[r]));
  }
  const F32Vec norm = root(all[0] + all[1]);
  F32Vec scale = least(kLargestNorm / norm, kLargestValue / most(largest[0], largest[1]));
  scale = (F32Vec)((U32Vec)least(scale, F32Vec{} + 0x1p100f) & 0x7f800000u);
  const F32Vec unit = 1.0f / scale + (norm - norm);  // NaN if the run contains Inf or NaN, which cannot be packed
  store_bits(unit_to, unit);
  U32Vec low = {};
  round_run(run, index, unit, scale, carry, [&](int64_t r, U32Vec integer, F32Vec rest) {
    left[r % 2] = multiply_add(rest, rest, left[r % 2]);
    if (r % 2 == 0) {
      low = integer;
    } else {
      store_bits(to + r / 2 * kBlock, low | (integer << 16));
    }
  });
  return {all[0] + all[1], (left[0] + left[1]) * unit * unit};
}

// The workspace: pairs of all columns and of the remainders, the units of both, the products of the remainders, whether
// each column has a remainder, the owners, and the first remainder of each group.
struct PairWorkspace {
  Pair *packed, *packed_remainders;
  float *units, *units_of_remainders;
  Remainders left_out;
  uint32_t* inexact;
  int64_t words;

  PairWorkspace(float* base, int64_t rows, int64_t cols) {
    const int64_t depth = pairs_of(rows), groups = groups_of(cols), more = groups_of(most_remainders(cols));
    const int64_t size = group_size<Pair>(depth), runs = runs_of<Pair>(depth) * kTile;
    packed = reinterpret_cast<Pair*>(base);
    packed_remainders = packed + groups * size;
    units = reinterpret_cast<float*>(packed_remainders + more * size);
    units_of_remainders = units + groups * runs;
    left_out.count = 0;
    left_out.stride = groups * kTile;
    left_out.products = units_of_remainders + more * runs;
    inexact = reinterpret_cast<uint32_t*>(left_out.products + more * kTile * left_out.stride);
    left_out.owner = reinterpret_cast<int32_t*>(inexact + groups * kTile);
    left_out.first = left_out.owner + most_remainders(cols);
    words = reinterpret_cast<float*>(left_out.first + groups + 1) - base;
  }
};

// Packs the vector of columns that begins at `column`, with `left` real columns and zeros after them, and sums each.
void pack_pairs(const SecondMoment& p, const PairWorkspace& work, int64_t column, int64_t left, Pair* to, float* unit) {
  const BF16* x = static_cast<const BF16*>(p.x) + column;
  F32Vec shift = columns(p.shift + column, left), all = {}, lost = {};
  Carry carry = {};
  for (int64_t c = 0; c < kLanes<float> && c < left; ++c) p.sums[column + c] = 0;
  Run run;
  for (int64_t first = 0; first < p.rows; first += kRows, to += kTile * Words<Pair>::kRun, unit += kTile) {
    run.rows = smaller(p.rows - first, kRows);
    for (int64_t r = 0; r < run.rows; ++r) run.row[r] = columns(x + (first + r) * p.x_stride, left);
    if (first == 0) {
      F32Vec squares = {};
      for (int64_t r = 0; r < run.rows; ++r) {
        squares = multiply_add(run.row[r] - shift, run.row[r] - shift, squares);
      }
      shift = coarse(shift, squares / static_cast<float>(run.rows));
      if (left > 0) store(p.shift + column, shift, First{smaller(left, kLanes<float>)});
    }
    F32Vec sum = {};
    for (int64_t r = 0; r < run.rows; ++r) sum += run.row[r] -= shift;
    add_to(p.sums + column, sum, left);
    if (run.rows % 2 != 0) run.row[run.rows++] = F32Vec{};
    const Squares squares = quantize(run, first / kRows, carry, to, unit);
    all += squares.all;
    lost += squares.left;
  }
  store_bits(work.inexact + column, (U32Vec)(lost > kLeft * kLeft * all));
}

// Lists the columns with remainders; returns false if there are too many.
bool list_remainders(const SecondMoment& p, PairWorkspace& work) {
  Remainders& out = work.left_out;
  for (int64_t c = 0; c < p.cols; ++c) {
    if (c % kTile == 0) out.first[c / kTile] = static_cast<int32_t>(out.count);
    if (work.inexact[c] == 0) continue;
    if (out.count == most_remainders(p.cols)) return false;
    out.owner[out.count++] = static_cast<int32_t>(c);
  }
  out.first[groups_of(p.cols)] = static_cast<int32_t>(out.count);
  return true;
}

// Packs one vector of remainders, starting with the one at `begin`.
void pack_remainders(const SecondMoment& p, const PairWorkspace& work, int64_t begin, Pair* to, float* unit) {
  const int64_t count = smaller(work.left_out.count - begin, kLanes<float>);
  const int32_t* owner = work.left_out.owner + begin;
  const auto gather = [&](auto&& entry) {
    F32Vec v = {};
    for (int64_t k = 0; k < count; ++k) v[k] = entry(owner[k]);
    return v;
  };
  const F32Vec shift = gather([&](int64_t c) { return p.shift[c]; });
  const int64_t runs = runs_of<Pair>(pairs_of(p.rows));
  Run run, rest;
  Carry carry = {}, carry_of_rest = {};
  for (int64_t i = 0; i < runs; ++i, to += kTile * Words<Pair>::kRun, unit += kTile) {
    const F32Vec in_units = gather([&](int64_t c) { return work.units[(c / kTile * runs + i) * kTile + c % kTile]; });
    run.rows = smaller(p.rows - i * kRows, kRows);
    for (int64_t r = 0; r < run.rows; ++r) {
      const BF16* row = static_cast<const BF16*>(p.x) + (i * kRows + r) * p.x_stride;
      BF16 lanes[kLanes<float>] = {};
      for (int64_t k = 0; k < count; ++k) lanes[k] = row[owner[k]];
      run.row[r] = Simd<BF16>::load(lanes) - shift;
    }
    const U32Vec real = (U32Vec)(in_units != 0);  // lanes without an owner have unit 0
    round_run(run, i, in_units, 1.0f / in_units, carry, [&](int64_t r, U32Vec, F32Vec left) {
      rest.row[r] = (F32Vec)(real & (U32Vec)(left * in_units));
    });
    rest.rows = run.rows;
    if (rest.rows % 2 != 0) rest.row[rest.rows++] = F32Vec{};
    quantize(rest, i, carry_of_rest, to, unit);
  }
}

// Products of remainders and columns in macro-tile (i, j).
void multiply_remainders(const PairWorkspace& work, int64_t depth, int64_t i, int64_t j) {
  alignas(64) float tile[kTile * kTile] = {};
  const int64_t size = group_size<Pair>(depth), runs = runs_of<Pair>(depth) * kTile;
  const int64_t tall = smaller(work.left_out.count - i * kTile, kTile);
  add_product(Panel<Pair>{work.packed_remainders + i * size, work.units_of_remainders + i * runs},
              Panel<Pair>{work.packed + j * size, work.units + j * runs}, depth, static_cast<int>(tall), kTile, false,
              tile);
  for (int64_t m = 0; m < tall; ++m) {
    float* to = work.left_out.products + (i * kTile + m) * work.left_out.stride + j * kTile;
    __builtin_memcpy(to, tile + m * kTile, kTile * sizeof(float));
  }
}

// Returns false if there are too few rows, or if too many columns have remainders; then at most the sums and the shift
// have been written.
bool second_moment_of_pairs(const SecondMoment& p, int threads) {
  if (p.rows < kFewestRows) return false;
  PairWorkspace work(p.packed, p.rows, p.cols);
  const int64_t depth = pairs_of(p.rows), groups = groups_of(p.cols), size = group_size<Pair>(depth);
  const int64_t runs = runs_of<Pair>(depth) * kTile, bytes = p.rows * p.cols * static_cast<int64_t>(sizeof(BF16));
  parallel_for(groups, threads, bytes, [&](int64_t group) {
    for_vectors(p.cols, group, [&](int64_t column, int64_t left, int block) {
      pack_pairs(p, work, column, left, work.packed + group * size + place<Pair>(0, block),
                 work.units + group * runs + block);
    });
  });
  if (!list_remainders(p, work)) return false;
  const int64_t more = groups_of(work.left_out.count);
  parallel_for(more, threads, bytes, [&](int64_t group) {
    for_vectors(work.left_out.count, group, [&](int64_t begin, int64_t, int block) {
      pack_remainders(p, work, begin, work.packed_remainders + group * size + place<Pair>(0, block),
                      work.units_of_remainders + group * runs + block);
    });
  });
  parallel_for(more * groups, threads, bytes, [&](int64_t t) {
    multiply_remainders(work, depth, t / groups, t % groups);
  });
  add_triangle(p, work.packed, work.units, depth, &work.left_out, threads);
  return true;
}

int64_t pair_words(int64_t rows, int64_t cols) { return PairWorkspace(nullptr, rows, cols).words; }
#else
bool second_moment_of_pairs(const SecondMoment&, int) { return false; }
int64_t pair_words(int64_t, int64_t) { return 0; }
#endif

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
