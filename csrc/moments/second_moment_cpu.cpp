// One block's share of the second moment on the CPU, one triangle only. Compiled once per instruction set (isa.h).
//
// The rows are shifted, widened to float and packed into micro-panels of kBlock columns. One triangle of macro-tiles is
// then shared out among the threads: each is summed in float over runs of kRun rows in a buffer that stays in the
// cache, and added to the double triangle once.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "moments.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Micro-tile: kTall rows and kBlock columns fill the registers but for one row of vectors and one broadcast.
constexpr int kVectors = 3;
constexpr int kTall = kRegisterBytes == 64 ? 8 : 4;
constexpr int kBlock = kVectors * kLanes<float>;
// Macro-tile: a multiple of kBlock for every register width. With its two panels of kRun rows it takes 135 KB.
constexpr int kTile = 96;
constexpr int64_t kRun = 128;
static_assert(kTile % kBlock == 0 && kBlock % kTall == 0, "micro-tiles fill macro-tiles");

// Packed rows of columns [group * kTile, + kTile): runs of kRun rows, in each micro-panel by micro-panel, row by row.
int64_t group_size(int64_t rows) { return kTile * ((rows + kRun - 1) / kRun) * kRun; }

template <class T, class Lanes>
MIR_INLINE F32Vec shifted(const T* x, const float* shift, Lanes lanes) {
  return load(x, lanes) - load(shift, lanes);
}

// Packs one group of columns, and adds up its columns: in float over runs of rows, in double over the runs.
template <class T>
void pack(const SecondMoment& p, int64_t group) {
  const T* x = static_cast<const T*>(p.x);
  float* packed = p.packed + group * group_size(p.rows);
  for (int64_t c = group * kTile; c < (group + 1) * kTile && c < p.cols; ++c) p.sums[c] = 0;
  for (int64_t first = 0; first < p.rows; first += kRun) {
    const int64_t rows = p.rows - first < kRun ? p.rows - first : kRun;
    for (int block = 0; block < kTile; block += kLanes<float>) {
      const int64_t column = group * kTile + block, left = p.cols - column;
      float* to = packed + first * kTile + block / kBlock * kBlock * kRun + block % kBlock;
      F32Vec sum = {};
      for (int64_t r = 0; r < rows; ++r, to += kBlock) {
        const T* from = x + (first + r) * p.x_stride + column;
        F32Vec v = {};
        if (left >= kLanes<float>) {
          v = shifted(from, p.shift + column, Whole{});
        } else if (left > 0) {
          v = shifted(from, p.shift + column, First{left});
        }
        sum += v;
        store_bits(to, v);
      }
      for (int64_t c = 0; c < kLanes<float> && c < left; ++c) p.sums[column + c] += static_cast<double>(sum[c]);
    }
  }
}

// tile[m][n] += sum over rows of a[row][m] * b[row][n]; a and b are micro-panels, tile has kTile columns. Meanwhile its
// share of the next panel, kTall floats for each row from `ahead` on, comes closer.
MIR_INLINE void multiply(const float* a, const float* b, int64_t rows, float* tile, const float* ahead) {
  F32Vec sum[kTall][kVectors] = {};
  for (int64_t r = 0; r < rows; ++r, a += kBlock, b += kBlock, ahead += kTall) {
    __builtin_prefetch(ahead);
    F32Vec right[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) right[n] = load_bits<F32Vec>(b + n * kLanes<float>);
#pragma GCC unroll 8
    for (int m = 0; m < kTall; ++m) {
      const F32Vec left = a[m] - F32Vec{};  // a broadcast: x - 0 is x for every x
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[m][n] = multiply_add(left, right[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTall; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) {
      float* to = tile + m * kTile + n * kLanes<float>;
      store_bits(to, load_bits<F32Vec>(to) + sum[m][n]);
    }
  }
}

// The first entry of a row of the packed triangle.
MIR_INLINE double* row_of(const SecondMoment& p, int64_t row) {
  const int64_t panel = row / p.panel, end = (panel + 1) * p.panel;
  return p.second + p.panel * p.panel * (panel * (panel + 1) / 2) +
         (row - panel * p.panel) * (end < p.cols ? end : p.cols);
}

// Adds macro-tile (i, j), i >= j, and the owed outer products to the triangle.
void add_tile(const SecondMoment& p, int64_t i, int64_t j) {
  alignas(64) float tile[kTile * kTile] = {};
  const int64_t size = group_size(p.rows);
  for (int64_t first = 0; first < p.rows; first += kRun) {
    const int64_t rows = p.rows - first < kRun ? p.rows - first : kRun;
    const float* left = p.packed + i * size + first * kTile;
    const float* right = p.packed + j * size + first * kTile;
    // One panel of the left and one of the right lie in the first-level cache for kBlock / kTall micro-tiles.
    for (int m = 0; m < kTile; m += kBlock) {
      for (int n = 0; n < (i == j ? m + kBlock : kTile); n += kBlock) {
        const float *a = left + m * kRun, *b = right + n * kRun;
        for (int strip = 0; strip < kBlock; strip += kTall) {
          multiply(a + strip, b, rows, tile + (m + strip) * kTile + n, b + (kBlock + strip) * kRun);
        }
      }
    }
  }
  const int64_t first_column = j * kTile, last = (i + 1) * kTile < p.cols ? (i + 1) * kTile : p.cols;
  const double *u = p.vectors, *v = p.vectors + p.cols;
  const double *__restrict u_j = u + first_column, *__restrict v_j = v + first_column;
  for (int64_t row = i * kTile; row < last; ++row) {
    // A row of the tile is too short for the hardware to see it coming.
    if (row + 4 < last) {
      for (int64_t c = 0; c < kTile; c += 8) __builtin_prefetch(row_of(p, row + 4) + first_column + c, 1);
    }
    double* __restrict to = row_of(p, row) + first_column;
    const float* __restrict from = tile + (row - i * kTile) * kTile;
    const double a = p.weights[0] * u[row], b = p.weights[1] * v[row];
    const int64_t count = kTile <= row - first_column ? kTile : row + 1 - first_column;
    for (int64_t c = 0; c < count; ++c) to[c] += static_cast<double>(from[c]) + (a * u_j[c] + b * v_j[c]);
  }
}

void second_moment(const SecondMoment& p, int threads) {
  const int64_t groups = (p.cols + kTile - 1) / kTile;
  const int64_t bytes = p.rows * p.cols * static_cast<int64_t>(sizeof(float));
  parallel_for(groups, threads, bytes, [&](int64_t group) {
    switch (p.dtype) {
      case DType::kFloat32: return pack<float>(p, group);
      case DType::kBFloat16: return pack<BF16>(p, group);
      case DType::kFloat16: return pack<F16>(p, group);
      case DType::kFloat64: return;  // refused by the caller
    }
  });
  parallel_for(groups * (groups + 1) / 2, threads, bytes * groups, [&](int64_t index) {
    int64_t i = 0;
    while ((i + 1) * (i + 2) / 2 <= index) ++i;
    add_tile(p, i, index - i * (i + 1) / 2);
  });
}

int64_t workspace(int64_t rows, int64_t cols) { return (cols + kTile - 1) / kTile * group_size(rows); }

}  // namespace

const SecondMomentCpu second_moment_cpu = {second_moment, workspace};

}  // namespace MIR_ISA
}  // namespace mir
