// C^T A C with C C^T = B on the CPU, in d^3 operations besides the Cholesky factorisation, and its rounding error.
// Compiled once per instruction set (isa.h).
//
// Let T be the lower triangle of A with half the diagonal, so A = T + T^T. Then C^T A C = Z + Z^T for Z = C^T (T C).
// T C is a product of two lower triangles, and only one triangle of Z + Z^T is computed. LAPACK's sygst (itype 2) does
// the same by columns.
#include "cholesky.h"
#include "frechet.h"
#include "products.h"

namespace mir {
namespace MIR_ISA {
namespace {

// Vectors of random signs, multiplied by m and by C, A and C^T in turn: the differences estimate the rounding error.
constexpr int kProbeVectors = kLanes64 >= 8 ? 1 : kLanes64 >= 4 ? 2 : 3;
constexpr int kProbes = kProbeVectors * kLanes64;

// The k with x / 4^k in [1/4, 1); 0 for x <= 0.
MIR_INLINE int half_exponent(double x) {
  if (!(x > 0)) return 0;
  int exponent;
  __builtin_frexp(x, &exponent);
  return exponent > 0 ? (exponent + 1) / 2 : -(-exponent / 2);
}

// One pair of matrices, padded beyond d by an identity in B and by zeros in A.
class Form {
 public:
  Form(const StandardForm& p, int64_t index, double* memory, int threads)
      : p_(p), n_(p.rows), threads_(threads), a_(p.a + index * p.d * p.d), b_(p.b + index * p.d * p.d),
        m_(p.m + index * p.rows * p.stride), rounding_(p.rounding + index), exponent_(p.exponent + index) {
    const auto take = [&](int64_t count) {
      double* taken = memory;
      memory += count;
      return taken;
    };
    upper_ = {take(n_ * n_), n_};
    product_ = {take(n_ * n_), n_};
    column_ = take(tiles_of(n_) * kTile * kTile);
    inverse_ = take(n_);
    scale_ = take(n_);
    for (double*& probe : probes_) probe = take(n_ * kProbes);
    // m holds C and then T before it receives the result.
    lower_ = {m_, n_};
  }

  static int64_t workspace(int64_t n) {
    return 2 * n * n + tiles_of(n) * kTile * kTile + 2 * n + 4 * n * kProbes;
  }

  void run() {
    equilibrate();
    if (!cholesky()) {
      *rounding_ = __builtin_inf();
      return;
    }
    signs();
    rows(1, [&](Range r) { multiply_probes(lower_, r, {0, r.to}, probes_[0], probes_[1]); });  // C g
    pack_lower();
    multiply_lower();
    rows(1, [&](Range r) {  // A C g = (T + T^T) C g
      multiply_probes(lower_, r, {0, r.to}, probes_[1], probes_[2]);
      for (int64_t k = r.from; k < n_; k += kBlock) {
        for (int64_t m = r.from; m < r.to; m += kTall) {
          multiply<kProbeVectors, 1>({lower_.place(k, m), kBlock, 1}, {probes_[1] + k * kProbes, kProbes}, kBlock,
                                     probes_[2] + m * kProbes, kProbes);
        }
      }
    });
    rows(1, [&](Range r) { multiply_probes(upper_, r, {r.from, n_}, probes_[2], probes_[3]); });  // C^T A C g
    multiply_upper();
    rows(1, [&](Range r) {  // minus m g
      for (int64_t m = r.from; m < r.to; m += kTall) {
        multiply<kProbeVectors, -1>({m_ + m * p_.stride, p_.stride, 1}, {probes_[0], kProbes}, n_,
                                    probes_[3] + m * kProbes, kProbes);
      }
    });
    double sum = 0;
    for (int64_t i = 0; i < n_ * kProbes; ++i) sum += probes_[3][i] * probes_[3][i];
    *rounding_ = __builtin_sqrt(sum / kProbes);
  }

 private:
  // Calls f for every tile of rows; `weight` scales the estimated work, which decides whether threads are used.
  template <class F>
  void rows(int64_t weight, const F& f) {
    parallel_for(tiles_of(n_), threads_, n_ * n_ * weight, [&](int64_t i) { f(tile(i, n_)); });
  }

  // Calls f for every pair i >= j of tiles.
  template <class F>
  void pairs(const F& f) {
    const int64_t tiles = tiles_of(n_);
    parallel_for(tiles * (tiles + 1) / 2, threads_, n_ * n_ * n_, [&](int64_t index) {
      int64_t i = 0;
      while ((i + 1) * (i + 2) / 2 <= index) ++i;
      f(tile(i, n_), tile(index - i * (i + 1) / 2, n_));
    });
  }

  // Scales B by inverse[i] inverse[j], so that its diagonal is in [1/4, 1). C is the factor of this matrix with its
  // rows multiplied by scale. All scales are powers of two.
  void equilibrate() {
    double largest_a = 0, largest_b = 0;
    for (int64_t i = 0; i < p_.d; ++i) {
      const double a = a_[i * (p_.d + 1)], b = b_[i * (p_.d + 1)];
      largest_a = a > largest_a ? a : largest_a;
      largest_b = b > largest_b ? b : largest_b;
    }
    const int exponent = half_exponent(largest_b), half = half_exponent(largest_a);
    for (int64_t i = 0; i < n_; ++i) {
      const double b = i < p_.d ? b_[i * (p_.d + 1)] : 0;
      const int each = half_exponent(b);
      inverse_[i] = b > 0 ? __builtin_ldexp(1.0, -each) : 0;
      scale_[i] = b > 0 ? __builtin_ldexp(1.0, each - exponent - half) : 0;
    }
    *exponent_ = exponent + half;
  }

  // Writes the factor of the equilibrated B to lower_ and its scaled transpose, C^T, to upper_.
  bool cholesky() {
    const Cholesky factor = {lower_, column_, n_, threads_, 16 * static_cast<double>(p_.d) * 0x1p-53};
    return factor.run([&](Range rows, Range columns, double* to) { equilibrated(rows, columns, to); },
                      [&](Range rows, Range columns, const double* x) {
                        const double* scale = scale_ + columns.from;
                        pack(rows.to - rows.from, columns.to - columns.from, upper_, rows.from, columns.from,
                             [=](int64_t m, int64_t k) { return x[m * kTile + k] * scale[k]; });
                      });
  }

  void equilibrated(Range rows, Range columns, double* to) const {
    const int64_t wide = columns.to - columns.from, known = smaller(columns.to, p_.d) - columns.from;
    const double* scale = inverse_ + columns.from;
    for (int64_t r = rows.from; r < rows.to; ++r, to += kTile) {
      const double* from = b_ + r * p_.d + columns.from;
      const double own = inverse_[r];
      const int64_t count = r < p_.d ? known : 0;
      for (int64_t c = 0; c < count; ++c) to[c] = from[c] * own * scale[c];
      for (int64_t c = count; c < wide; ++c) to[c] = 0;
      if (own == 0 && r >= columns.from && r < columns.to) to[r - columns.from] = 1;
    }
  }

  void signs() {
    uint64_t state = 0x9e3779b97f4a7c15;
    for (int64_t i = 0; i < n_ * kProbes; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's multiplier for 64 bits
      probes_[0][i] = state >> 63 ? 1 : -1;
    }
    for (int64_t i = p_.d * kProbes; i < n_ * kProbes; ++i) probes_[0][i] = 0;
    for (int t = 1; t < 4; ++t) __builtin_memset(probes_[t], 0, n_ * kProbes * sizeof(double));
  }

  // y[rows] += left[rows][depth] x[depth]. For C g, left is the factor without its scale, so y is multiplied by it.
  void multiply_probes(const Packed& left, Range rows, Range depth, const double* x, double* y) {
    for (int64_t m = rows.from; m < rows.to; m += kTall) {
      multiply<kProbeVectors, 1>(left.left(m, depth.from), {x + depth.from * kProbes, kProbes}, depth.to - depth.from,
                                 y + m * kProbes, kProbes);
    }
    if (y != probes_[1]) return;
    for (int64_t i = rows.from * kProbes; i < rows.to * kProbes; ++i) y[i] *= scale_[i / kProbes];
  }

  // Packs T, with zeros beyond d and whole tiles on the diagonal.
  void pack_lower() {
    rows(1, [&](Range r) {
      pack(r.to - r.from, r.to, lower_, r.from, 0, [&](int64_t m, int64_t k) {
        const int64_t i = r.from + m;
        const double entry = i >= p_.d || k > i ? 0 : a_[i * p_.d + k];
        return k == i ? entry / 2 : entry;
      });
    });
  }

  // Writes (T C)^T to product_.
  void multiply_lower() {
    pairs([&](Range i, Range j) {
      alignas(64) double to[kTile * kTile] = {};
      add_product<1>(lower_, i, upper_, j, to, kTile, [](int64_t m, int64_t n) { return Range{n, m + kBlock}; });
      pack(j.to - j.from, i.to - i.from, product_, j.from, i.from,
           [&](int64_t m, int64_t k) { return to[k * kTile + m]; });
    });
  }

  // Writes Z + Z^T for Z = C^T (T C) to m.
  void multiply_upper() {
    pairs([&](Range i, Range j) {
      alignas(64) double to[kTile * kTile] = {};
      const bool diagonal = i.from == j.from;
      const auto depth = [&](int64_t m, int64_t n) { return Range{larger(m, n), diagonal && n > m ? 0 : n_}; };
      add_product<1>(upper_, i, product_, j, to, kTile, depth);
      add_product<1>(product_, i, upper_, j, to, kTile, depth);
      for (int64_t r = i.from; r < i.to; ++r) {
        const int64_t count = diagonal ? r + 1 - j.from : j.to - j.from;
        __builtin_memcpy(m_ + r * p_.stride + j.from, to + (r - i.from) * kTile, count * sizeof(double));
      }
      for (int64_t c = j.from; c < j.to; ++c) {
        double* row = m_ + c * p_.stride;
        for (int64_t r = diagonal ? c + 1 : i.from; r < i.to; ++r) row[r] = to[(r - i.from) * kTile + c - j.from];
      }
    });
  }

  const StandardForm& p_;
  int64_t n_;
  int threads_;
  const double *a_, *b_;
  double *m_, *rounding_, *exponent_;
  Packed lower_, upper_, product_;
  double *column_, *inverse_, *scale_, *probes_[4];
};

// Small matrices are divided among the threads; a large one is divided by tiles. Up to kAlone rows, one thread computes
// the tiles faster than several threads would start.
constexpr int64_t kAlone = 128;
int64_t at_a_time(const StandardForm& p, int threads) {
  return p.rows <= 4 * kTile ? larger(1, smaller(threads, p.count)) : 1;
}

int64_t workspace(const StandardForm& p, int threads) { return at_a_time(p, threads) * Form::workspace(p.rows); }

void run(const StandardForm& p, int threads) {
  const int64_t shares = at_a_time(p, threads), each = Form::workspace(p.rows);
  parallel_for(shares, static_cast<int>(shares), p.count * p.d * p.d * 64, [&](int64_t share) {
    for (int64_t i = share; i < p.count; i += shares) {
      Form(p, i, p.workspace + share * each, shares > 1 || p.rows <= kAlone ? 1 : threads).run();
    }
  });
}

}  // namespace

const StandardFormCpu standard_form_cpu = {run, workspace, kBlock};

}  // namespace MIR_ISA
}  // namespace mir
