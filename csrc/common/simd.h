// Vectors of one register for CPU kernels: load and store of every element type, fused multiply-add, sums.
//
// Written with the vector extensions of GCC and Clang, so one text serves SSE2, AVX2, AVX-512 and other CPUs; the
// intrinsics below are where the extensions have no word for an instruction. Included by *_cpu.cpp only (isa.h).
// Narrowing rounds to nearest, ties to even, and keeps NaN.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace mir {
namespace MIR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#define MIR_INLINE inline __attribute__((always_inline))

typedef float F32Vec __attribute__((vector_size(kRegisterBytes)));
typedef double F64Vec __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t U32Vec __attribute__((vector_size(kRegisterBytes)));
typedef float F32Half __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint16_t U16Half __attribute__((vector_size(kRegisterBytes / 2)));  // as many lanes as F32Vec

template <class V>
MIR_INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
MIR_INLINE void store_bits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

MIR_INLINE U32Vec select(U32Vec where, U32Vec yes, U32Vec no) { return (yes & where) | (no & ~where); }

MIR_INLINE F64Vec widen(F32Half v) { return __builtin_convertvector(v, F64Vec); }

// a * b + c, rounded once.
MIR_INLINE F64Vec fma(F64Vec a, F64Vec b, F64Vec c) {
#if defined(__AVX512F__)
  return (F64Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (F64Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  for (unsigned i = 0; i < sizeof(F64Vec) / sizeof(double); ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#endif
}

MIR_INLINE F32Vec fma(F32Vec a, F32Vec b, F32Vec c) {
#if defined(__AVX512F__)
  return (F32Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  // Through double: the product is exact there; rounding the sum twice differs from once in about 1 of 2^29 cases.
  F32Half ha[2], hb[2], hc[2];
  __builtin_memcpy(ha, &a, sizeof a);
  __builtin_memcpy(hb, &b, sizeof b);
  __builtin_memcpy(hc, &c, sizeof c);
  for (int i = 0; i < 2; ++i) hc[i] = __builtin_convertvector(widen(ha[i]) * widen(hb[i]) + widen(hc[i]), F32Half);
  __builtin_memcpy(&c, hc, sizeof c);
  return c;
#endif
}

// a * b + c for sums, where one rounding more does no harm: fused where the CPU can, else two instructions.
template <class V>
MIR_INLINE V multiply_add(V a, V b, V c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Element type T in memory, as a vector of what it is computed in.
template <class T>
struct Simd;

template <>
struct Simd<double> {
  using Vec = F64Vec;
  static MIR_INLINE Vec load(const double* p) { return load_bits<Vec>(p); }
  static MIR_INLINE void store(double* p, Vec v) { store_bits(p, v); }
  static MIR_INLINE Vec round(Vec v) { return v; }
};

template <>
struct Simd<float> {
  using Vec = F32Vec;
  static MIR_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }
  static MIR_INLINE void store(float* p, Vec v) { store_bits(p, v); }
  static MIR_INLINE Vec round(Vec v) { return v; }
};

template <>
struct Simd<BF16> {
  using Vec = F32Vec;
  static MIR_INLINE Vec load(const BF16* p) {
    return (Vec)(__builtin_convertvector(load_bits<U16Half>(p), U32Vec) << 16);
  }
  static MIR_INLINE void store(BF16* p, Vec v) { store_bits(p, __builtin_convertvector(high_half(v) >> 16, U16Half)); }
  static MIR_INLINE Vec round(Vec v) { return (Vec)(high_half(v) & 0xffff0000u); }

 private:
  static MIR_INLINE U32Vec high_half(Vec v) {
    const U32Vec bits = (U32Vec)v;
    return select((U32Vec)(v != v), bits | 0x400000u, bits + 0x7fffu + ((bits >> 16) & 1u));
  }
};

template <>
struct Simd<F16> {
  using Vec = F32Vec;
  static MIR_INLINE Vec load(const F16* p) { return widen(load_bits<U16Half>(p)); }
  static MIR_INLINE void store(F16* p, Vec v) { store_bits(p, narrow(v)); }
  static MIR_INLINE Vec round(Vec v) { return widen(narrow(v)); }

 private:
#if defined(__AVX512F__)
  static MIR_INLINE Vec widen(U16Half h) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
  static MIR_INLINE U16Half narrow(Vec v) { return (U16Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  static MIR_INLINE Vec widen(U16Half h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
  static MIR_INLINE U16Half narrow(Vec v) { return (U16Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
  // Half and single differ in bias by 112 and in fraction by 13 bits; subnormal halves go through a float addition
  // whose unit in the last place is theirs, 2^-24, so that the adder shifts and rounds.
  static MIR_INLINE Vec widen(U16Half h) {
    const U32Vec bits = __builtin_convertvector(h, U32Vec);
    const U32Vec sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu, shifted = magnitude << 13;
    const Vec smallest_normal = (Vec)(U32Vec{} + (113u << 23));
    const U32Vec subnormal = (U32Vec)((Vec)(shifted + (113u << 23)) - smallest_normal);
    const U32Vec finite = select((U32Vec)(magnitude < 0x400u), subnormal, shifted + (112u << 23));
    return (Vec)(sign | select((U32Vec)(magnitude >= 0x7c00u), shifted + (224u << 23), finite));
  }
  static MIR_INLINE U16Half narrow(Vec v) {
    const U32Vec bits = (U32Vec)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Vec half = Vec{} + 0.5f;
    const U32Vec subnormal = (U32Vec)((Vec)magnitude + half) - (U32Vec)half;
    const U32Vec normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    U32Vec out = select((U32Vec)(magnitude < (113u << 23)), subnormal, normal);
    out = select((U32Vec)(magnitude >= 0x477ff000u), U32Vec{} + 0x7c00u, out);  // rounds to 2^16 or more
    out = select((U32Vec)(magnitude > 0x7f800000u), 0x7e00u | ((magnitude >> 13) & 0x3ffu), out);
    return __builtin_convertvector(sign | out, U16Half);
  }
#endif
};

template <class T>
constexpr int kLanes = sizeof(typename Simd<T>::Vec) / sizeof(typename AccumulateIn<T>::type);

template <class Vec>
MIR_INLINE Vec broadcast(decltype(Vec{}[0] + 0) value) {
  return Vec{} + value;
}

// A whole vector of columns, or the first n lanes of one: lanes beyond n load as zero and are not stored.
struct Whole {};
struct First {
  int64_t n;
};

template <class T>
MIR_INLINE typename Simd<T>::Vec load(const T* p, Whole) {
  return Simd<T>::load(p);
}
template <class T>
MIR_INLINE typename Simd<T>::Vec load(const T* p, First first) {
  T lanes[kLanes<T>] = {};
  __builtin_memcpy(lanes, p, first.n * sizeof(T));
  return Simd<T>::load(lanes);
}
template <class T>
MIR_INLINE void store(T* p, typename Simd<T>::Vec v, Whole) {
  Simd<T>::store(p, v);
}
template <class T>
MIR_INLINE void store(T* p, typename Simd<T>::Vec v, First first) {
  T lanes[kLanes<T>];
  Simd<T>::store(lanes, v);
  __builtin_memcpy(p, lanes, first.n * sizeof(T));
}

// f(column, Whole) for each whole vector of T's arithmetic, then f(column, First) for the rest.
template <class T, class F>
MIR_INLINE void for_columns(int64_t cols, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<T> <= cols; c += kLanes<T>) f(c, Whole{});
  if (c < cols) f(c, First{cols - c});
}

// Sum of products in double precision: neither overflows nor loses digits for any float32 operands.
class Dot {
 public:
  MIR_INLINE void add(F32Vec a, F32Vec b) {
    F32Half ha[2], hb[2];
    __builtin_memcpy(ha, &a, sizeof a);
    __builtin_memcpy(hb, &b, sizeof b);
    for (int i = 0; i < 2; ++i) sum_[i] = multiply_add(widen(ha[i]), widen(hb[i]), sum_[i]);
  }
  MIR_INLINE void add(F64Vec a, F64Vec b) { sum_[0] = multiply_add(a, b, sum_[0]); }
  MIR_INLINE double total() const {
    const F64Vec both = sum_[0] + sum_[1];
    double total = 0;
    for (unsigned i = 0; i < sizeof(F64Vec) / sizeof(double); ++i) total += both[i];
    return total;
  }

 private:
  F64Vec sum_[2] = {};
};

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
