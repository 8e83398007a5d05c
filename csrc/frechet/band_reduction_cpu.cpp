// Reduces a symmetric matrix to a band by orthogonal transformations on the CPU. Compiled once per instruction set
// (isa.h).
//
// This is the first stage of two-stage eigenvalue solvers (Bischof, Lang and Sun, ACM TOMS 26, 2000). Reflectors of
// length sqrt(2) make a panel of kBand columns upper triangular below the band: Q = I - V S V^T, where S^-1 is the
// upper triangle of V^T V with half its diagonal (Puglisi). The trailing matrix M becomes Q^T M Q = M - V Y^T - Y V^T.
// One sweep over M applies this and multiplies by the next V, so M passes through the caches once per panel, not twice.
#include "frechet.h"
#include "products.h"

namespace mir {
namespace MIR_ISA {
namespace {

constexpr int kBand = 48;  // columns per panel, and diagonals below the main one in the result
constexpr int64_t kPair = 2 * kBand;
static_assert(kBand % kBlock == 0 && kBand % kTall == 0, "micro-tiles fill panels");

class Reduction {
 public:
  Reduction(const BandReduction& p, int threads) : p_(p), shares_(threads > 1 ? threads : 1), n_(rows_of(p.d)) {
    double* memory = p.workspace;
    const auto take = [&](int64_t count) {
      double* taken = memory;
      memory += count;
      return taken;
    };
    for (double*& pair : pairs_) pair = take(n_ * kPair);
    swapped_ = {take(n_ * kPair), kPair};
    sums_ = take(shares_ * n_ * kBand);
    small_ = take(shares_ * kBand * kBand);
    for (double*& square : squares_) square = take(kBand * kBand);
    dots_ = take(shares_ * kBand);
  }

  static int64_t rows_of(int64_t d) { return (d + kBand - 1) / kBand * kBand; }
  static int64_t workspace(int64_t d, int threads) {
    const int64_t n = rows_of(d), shares = threads > 1 ? threads : 1;
    return 3 * n * kPair + shares * (n + kBand + 1) * kBand + 4 * kBand * kBand;
  }

  void run() {
    bool pending = false;  // whether (V, Y) of the previous panel still has to be applied, from row c on
    for (int64_t c = 0; c + kBand < n_; c += kBand) {
      const int64_t r = c + kBand;
      if (pending) update_panel(c);
      panel(c);
      sweep(r, pending);
      finish(r);
      double* const other = pairs_[0];
      pairs_[0] = pairs_[1];
      pairs_[1] = other;
      pending = true;
      if (r + kBand >= n_) update_panel(r);  // the last block is not swept again
    }
    band();
  }

 private:
  // Rows of pairs_ correspond to rows of m, with V on the left and Y on the right. pairs_[0] belongs to the current
  // panel, pairs_[1] to the previous one.
  double* m_at(int64_t row, int64_t column) const { return p_.m + row * p_.stride + column; }
  double* fresh(int64_t row) const { return pairs_[0] + row * kPair; }
  double* old(int64_t row) const { return pairs_[1] + row * kPair; }

  // Calls f(first, last, share) for rows [from, n_) in multiples of kBand; each share always has the same rows.
  template <class F>
  void shares_of_rows(int64_t from, int64_t bytes_a_row, const F& f) {
    const int64_t blocks = (n_ - from) / kBand;
    parallel_for(shares_, shares_, (n_ - from) * bytes_a_row, [&](int64_t s) {
      f(from + blocks * s / shares_ * kBand, from + blocks * (s + 1) / shares_ * kBand, s);
    });
  }

  // m[i, j] -= V_i Y_j^T + Y_i V_j^T of the previous panel, for a block of kBand rows and columns.
  void update(int64_t i, int64_t j) {
    for (int64_t m = 0; m < kBand; m += kTall) {
      for (int64_t n = 0; n < kBand; n += kBlock) {
        multiply<kVectors, -1>({old(i + m), kPair, 1}, swapped_.right(j + n, 0), kPair, m_at(i + m, j + n), p_.stride);
      }
    }
  }

  void update_panel(int64_t c) {
    shares_of_rows(c, kPair * kBand * 8, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t i = first; i < last; i += kBand) update(i, c);
    });
  }

  // Factors the panel of columns [c, c + kBand) below the band: writes its reflectors to fresh and R to m.
  void panel(int64_t c) {
    const int64_t r = c + kBand;
    shares_of_rows(r, kBand * 8, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t i = first; i < last; ++i) __builtin_memcpy(fresh(i), m_at(i, c), kBand * sizeof(double));
    });
    double reflect[kBand];  // multiples of the last reflector to subtract from each column
    double v_scale = 0;  // scales it to length sqrt(2)
    for (int64_t j = 0; j <= kBand; ++j) {
      // Applies reflector j - 1, and computes the dot products of column j with the other columns below row r + j.
      // Several threads are faster from a thousand rows on.
      shares_of_rows(r, 256, [&](int64_t first, int64_t last, int64_t share) {
        alignas(64) double sums[kBand] = {};
        for (int64_t i = larger(first, r + j - 1); i < last; ++i) {
          double* row = fresh(i);
          if (j > 0) {
            const double v = row[j - 1];
            const int64_t from = j / kLanes64 * kLanes64;
            for (int64_t t = from; t < kBand; t += kLanes64) {
              const F64Vec w = load_bits<F64Vec>(reflect + t);
              store_bits(row + t, load_bits<F64Vec>(row + t) - v * w);
            }
            row[j - 1] = v * v_scale;
          }
          if (j == kBand || i <= r + j) continue;
          const double x = row[j];
          for (int64_t t = j / kLanes64 * kLanes64; t < kBand; t += kLanes64) {
            store_bits(sums + t, multiply_add(x - F64Vec{}, load_bits<F64Vec>(row + t), load_bits<F64Vec>(sums + t)));
          }
        }
        __builtin_memcpy(dots_ + share * kBand, sums, sizeof sums);
      });
      if (j == kBand) break;
      double dots[kBand] = {};
      for (int64_t s = 0; s < shares_; ++s) {
        for (int64_t t = j; t < kBand; ++t) dots[t] += dots_[s * kBand + t];
      }
      for (int64_t t = 0; t <= j; ++t) *m_at(r + t, c + j) = fresh(r + t)[j];
      for (double& entry : reflect) entry = 0;
      v_scale = 0;
      if (dots[j] == 0) continue;  // the column is zero below its first entry and needs no reflector
      double* pivot_row = fresh(r + j);
      const double alpha = pivot_row[j];
      for (int64_t t = j; t < kBand; ++t) dots[t] += alpha * pivot_row[t];
      const double length = __builtin_sqrt(dots[j]);
      const double beta = alpha > 0 ? -length : length, tau = 1 / (dots[j] - alpha * beta);
      for (int64_t t = j + 1; t < kBand; ++t) reflect[t] = tau * (dots[t] - beta * pivot_row[t]);
      v_scale = __builtin_sqrt(tau);
      *m_at(r + j, c + j) = beta;
      pivot_row[j] = alpha - beta;
    }
    for (int64_t i = 0; i < kBand; ++i) {
      for (int64_t t = i + 1; t < kBand; ++t) fresh(r + i)[t] = 0;
    }
  }

  // Applies the previous panel to m from row r on, below the diagonal and in the blocks on it, and writes m V to the
  // right half of fresh. Every share has separate tiles and a separate sum.
  void sweep(int64_t r, bool pending) {
    const int64_t blocks = (n_ - r) / kBand, tiles = blocks * (blocks + 1) / 2;
    parallel_for(shares_, shares_, tiles * kBand * kBand * 64, [&](int64_t share) {
      double* sums = sums_ + share * n_ * kBand;
      __builtin_memset(sums + r * kBand, 0, (n_ - r) * kBand * sizeof(double));
      const int64_t begin = tiles * share / shares_, end = tiles * (share + 1) / shares_;
      int64_t i = 0;
      while ((i + 1) * (i + 2) / 2 <= begin) ++i;
      int64_t j = begin - i * (i + 1) / 2;
      for (int64_t index = begin; index < end; ++index) {
        const int64_t row = r + i * kBand, column = r + j * kBand;
        if (pending) update(row, column);
        add_tile(row, column, {m_at(row, column), p_.stride, 1}, sums);
        if (i != j) add_tile(column, row, {m_at(row, column), 1, p_.stride}, sums);
        if (++j > i) {
          ++i;
          j = 0;
        }
      }
    });
    shares_of_rows(r, kBand * 16, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t i = first; i < last; ++i) {
        double* to = fresh(i) + kBand;
        __builtin_memset(to, 0, kBand * sizeof(double));
        for (int64_t s = 0; s < shares_; ++s) {
          const double* from = sums_ + (s * n_ + i) * kBand;
          for (int64_t t = 0; t < kBand; ++t) to[t] += from[t];
        }
      }
    });
  }

  void add_tile(int64_t row, int64_t column, Left tile, double* sums) {
    for (int64_t n = 0; n < kBand; n += kBlock) {
      for (int64_t m = 0; m < kBand; m += kTall) {
        multiply<kVectors, 1>({tile.at + m * tile.row, tile.row, tile.depth}, {fresh(column) + n, kPair}, kBand,
                              sums + (row + m) * kBand + n, kBand);
      }
    }
  }

  // out = V^T times the columns of fresh from `columns` on.
  void multiply_transposed(int64_t r, int64_t columns, double* out) {
    shares_of_rows(r, kBand * 64, [&](int64_t first, int64_t last, int64_t share) {
      double* to = small_ + share * kBand * kBand;
      __builtin_memset(to, 0, kBand * kBand * sizeof(double));
      for (int64_t i = first; i < last; i += kRun) {
        const int64_t run = smaller(kRun, last - i);
        for (int64_t n = 0; n < kBand; n += kBlock) {
          for (int64_t m = 0; m < kBand; m += kTall) {
            multiply<kVectors, 1>({fresh(i) + m, 1, kPair}, {fresh(i) + columns + n, kPair}, run, to + m * kBand + n,
                                  kBand);
          }
        }
      }
    });
    __builtin_memset(out, 0, kBand * kBand * sizeof(double));
    for (int64_t s = 0; s < shares_; ++s) {
      for (int64_t t = 0; t < kBand * kBand; ++t) out[t] += small_[s * kBand * kBand + t];
    }
  }

  // Y = Z S - V (S^T V^T Z S) / 2 for Z = m V in the right half of fresh. Also packs (Y, V) for the update.
  void finish(int64_t r) {
    double *gram = squares_[0], *s = squares_[1], *w = squares_[2], *k = squares_[3];
    multiply_transposed(r, 0, gram);
    multiply_transposed(r, kBand, w);
    // S = (I + strictly upper triangle of the Gram matrix)^-1, row by row from the last.
    for (int64_t i = kBand - 1; i >= 0; --i) {
      double* row = s + i * kBand;
      for (int64_t t = 0; t < kBand; ++t) row[t] = t == i;
      for (int64_t p = i + 1; p < kBand; ++p) {
        const double entry = gram[i * kBand + p];
        for (int64_t t = p; t < kBand; ++t) row[t] -= entry * s[p * kBand + t];
      }
    }
    // k = -S^T (V^T Z) S / 2, with gram = (V^T Z) S as an intermediate result.
    square_product(w, kBand, 1, s, gram, 1);
    square_product(s, 1, kBand, gram, k, -0.5);
    shares_of_rows(r, kBand * kBand * 8, [&](int64_t first, int64_t last, int64_t) {
      alignas(64) double y[kBand * kBand];
      for (int64_t i = first; i < last; i += kBand) {
        __builtin_memset(y, 0, sizeof y);
        for (int64_t n = 0; n < kBand; n += kBlock) {
          for (int64_t m = 0; m < kBand; m += kTall) {
            double* to = y + m * kBand + n;
            multiply<kVectors, 1>({fresh(i + m) + kBand, kPair, 1}, {s + n, kBand}, kBand, to, kBand);
            multiply<kVectors, 1>({fresh(i + m), kPair, 1}, {k + n, kBand}, kBand, to, kBand);
          }
        }
        for (int64_t m = 0; m < kBand; ++m) {
          __builtin_memcpy(fresh(i + m) + kBand, y + m * kBand, kBand * sizeof(double));
        }
        pack(kBand, kPair, swapped_, i, 0, [&](int64_t m, int64_t k) { return fresh(i + m)[(k + kBand) % kPair]; });
      }
    });
  }

  // out = scale * left right for kBand x kBand matrices, with left given by its strides.
  static void square_product(const double* left, int64_t row, int64_t step, const double* right, double* out,
                             double scale) {
    for (int64_t i = 0; i < kBand; ++i) {
      double sums[kBand] = {};
      for (int64_t p = 0; p < kBand; ++p) {
        const double entry = left[i * row + p * step];
        for (int64_t t = 0; t < kBand; ++t) sums[t] += entry * right[p * kBand + t];
      }
      for (int64_t t = 0; t < kBand; ++t) out[i * kBand + t] = scale * sums[t];
    }
  }

  // Copies the diagonal and the kBand diagonals below it.
  void band() {
    for (int64_t j = 0; j < p_.d; ++j) {
      for (int64_t r = 0; r <= kBand; ++r) p_.band[j * (kBand + 1) + r] = j + r < p_.d ? *m_at(j + r, j) : 0;
    }
  }

  const BandReduction& p_;
  int64_t shares_, n_;
  double *pairs_[2], *sums_, *small_, *squares_[4], *dots_;
  Packed swapped_;
};

int64_t workspace(int64_t d, int threads) { return Reduction::workspace(d, threads); }

void run(const BandReduction& p, int threads) { Reduction(p, threads).run(); }

}  // namespace

const BandReductionCpu band_reduction_cpu = {run, workspace, kBand};

}  // namespace MIR_ISA
}  // namespace mir
