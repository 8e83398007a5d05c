// Vectors of one register for CPU kernels: load and store of every element type, fused multiply-add, sums.
//
// Written with the vector extensions of GCC and Clang, so the same code serves SSE2, AVX2, AVX-512 and other CPUs.
// Intrinsics are used for instructions that the extensions cannot express. Included by *_cpu.cpp only (isa.h).
// Narrowing rounds to nearest, ties to even, and keeps NaN.
#pragma once

#include <cstddef>
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
typedef int32_t I32Vec __attribute__((vector_size(kRegisterBytes)));
typedef float F32Half __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint16_t U16Half __attribute__((vector_size(kRegisterBytes / 2)));  // the same number of lanes as F32Vec

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

// Stores past the caches, for memory that is not read soon: this avoids reading the cache line first. p is aligned to
// the size of V. Call stream_fence() before another thread may read.
template <class V>
MIR_INLINE void stream_bits(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  store_bits(p, v);
}
MIR_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

MIR_INLINE U32Vec select(U32Vec where, U32Vec yes, U32Vec no) { return (yes & where) | (no & ~where); }

// Converts the two halves of v to double precision, and back.
struct F64Pair {
  F64Vec low, high;
};
MIR_INLINE F64Pair widen(F32Vec v) {
#if defined(__AVX512F__)
  return {(F64Vec)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (F64Vec)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(F64Vec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (F64Vec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
  F32Half halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  return {__builtin_convertvector(halves[0], F64Vec), __builtin_convertvector(halves[1], F64Vec)};
#endif
}
MIR_INLINE F32Vec narrow(F64Pair v) {
  const F32Half halves[2] = {__builtin_convertvector(v.low, F32Half), __builtin_convertvector(v.high, F32Half)};
  return load_bits<F32Vec>(halves);
}

// Converts 16-bit lanes to 32-bit lanes and, for values that fit in 16 bits, back.
MIR_INLINE U32Vec widen(U16Half v) {
#if defined(__AVX512F__)
  return (U32Vec)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (U32Vec)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U32Vec);
#endif
}
MIR_INLINE U16Half narrow(U32Vec v) {
#if defined(__AVX512F__)
  return (U16Half)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  return (U16Half)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, U16Half);
#endif
}

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
  // Via double, where the product is exact. Rounding the sum twice differs from rounding once in about 1 of 2^29 cases.
  const F64Pair wa = widen(a), wb = widen(b), wc = widen(c);
  return narrow(F64Pair{wa.low * wb.low + wc.low, wa.high * wb.high + wc.high});
#endif
}

// a * b + c for sums, where an additional rounding does no harm: fused if the CPU supports it, else two instructions.
template <class V>
MIR_INLINE V multiply_add(V a, V b, V c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Elements of type T as a vector of the type used for arithmetic. pack() returns what a store writes, round() the value
// that a load would then return, and pack_rounded() packs values that are already rounded.
template <class T>
struct Simd;

template <>
struct Simd<double> {
  using Vec = F64Vec;
  static MIR_INLINE Vec load(const double* p) { return load_bits<Vec>(p); }
  static MIR_INLINE Vec pack(Vec v) { return v; }
  static MIR_INLINE Vec round(Vec v) { return v; }
  static MIR_INLINE Vec pack_rounded(Vec v) { return v; }
};

template <>
struct Simd<float> {
  using Vec = F32Vec;
  static MIR_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }
  static MIR_INLINE Vec pack(Vec v) { return v; }
  static MIR_INLINE Vec round(Vec v) { return v; }
  static MIR_INLINE Vec pack_rounded(Vec v) { return v; }
};

template <>
struct Simd<BF16> {
  using Vec = F32Vec;
  static MIR_INLINE Vec load(const BF16* p) { return (Vec)(widen(load_bits<U16Half>(p)) << 16); }
  static MIR_INLINE U16Half pack(Vec v) { return narrow(rounded(v) >> 16); }
  static MIR_INLINE Vec round(Vec v) { return (Vec)(rounded(v) & 0xffff0000u); }
  static MIR_INLINE U16Half pack_rounded(Vec v) { return narrow((U32Vec)v >> 16); }

 private:
  // Only the upper 16 bits are correct. NaN is truncated, not rounded, because rounding may carry into the sign. It
  // stays NaN because arithmetic returns quiet NaN, whose uppermost fraction bit is set.
  static MIR_INLINE U32Vec rounded(Vec v) {
    const U32Vec bits = (U32Vec)v;
    return bits + ((0x7fffu + ((bits >> 16) & 1u)) & (U32Vec)(v == v));
  }
};

template <>
struct Simd<F16> {
  using Vec = F32Vec;
  static MIR_INLINE Vec load(const F16* p) { return from_bits(load_bits<U16Half>(p)); }
  static MIR_INLINE U16Half pack(Vec v) { return to_bits(v); }
  static MIR_INLINE Vec round(Vec v) { return from_bits(to_bits(v)); }
  static MIR_INLINE U16Half pack_rounded(Vec v) { return to_bits(v); }

 private:
#if defined(__AVX512F__)
  static MIR_INLINE Vec from_bits(U16Half h) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
  static MIR_INLINE U16Half to_bits(Vec v) { return (U16Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  static MIR_INLINE Vec from_bits(U16Half h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
  static MIR_INLINE U16Half to_bits(Vec v) { return (U16Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
  // Half and single precision differ in bias by 112 and in fraction by 13 bits. Subnormal halves use a float addition
  // with their unit in the last place, 2^-24, so that the adder shifts and rounds.
  static MIR_INLINE Vec from_bits(U16Half h) {
    const U32Vec bits = widen(h);
    const U32Vec sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu, shifted = magnitude << 13;
    const Vec smallest_normal = (Vec)(U32Vec{} + (113u << 23));
    const U32Vec subnormal = (U32Vec)((Vec)(shifted + (113u << 23)) - smallest_normal);
    const U32Vec finite = select((U32Vec)(magnitude < 0x400u), subnormal, shifted + (112u << 23));
    return (Vec)(sign | select((U32Vec)(magnitude >= 0x7c00u), shifted + (224u << 23), finite));
  }
  static MIR_INLINE U16Half to_bits(Vec v) {
    const U32Vec bits = (U32Vec)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Vec half = Vec{} + 0.5f;
    const U32Vec subnormal = (U32Vec)((Vec)magnitude + half) - (U32Vec)half;
    const U32Vec normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    U32Vec out = select((U32Vec)(magnitude < (113u << 23)), subnormal, normal);
    out = select((U32Vec)(magnitude >= 0x477ff000u), U32Vec{} + 0x7c00u, out);  // rounds to 2^16 or more
    out = select((U32Vec)(magnitude > 0x7f800000u), 0x7e00u | ((magnitude >> 13) & 0x3ffu), out);
    return narrow(sign | out);
  }
#endif
};

template <class T>
constexpr int kLanes = sizeof(typename Simd<T>::Vec) / sizeof(typename AccumulateIn<T>::type);

template <class Vec>
MIR_INLINE Vec broadcast(decltype(Vec{}[0] + 0) value) {
  return Vec{} + value;
}

// A whole vector of columns, or its first n lanes: lanes beyond n load as zero and are not stored.
struct Whole {};
struct First {
  int64_t n;
};
template <class Lanes>
constexpr bool kIsWhole = false;
template <>
constexpr bool kIsWhole<Whole> = true;

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
template <class V>
MIR_INLINE void store_packed(void* p, V packed, size_t, Whole) {
  store_bits(p, packed);
}
template <class V>
MIR_INLINE void store_packed(void* p, V packed, size_t element_bytes, First first) {
  __builtin_memcpy(p, &packed, first.n * element_bytes);
}
template <class T, class Lanes>
MIR_INLINE void store(T* p, typename Simd<T>::Vec v, Lanes lanes) {
  store_packed(p, Simd<T>::pack(v), sizeof(T), lanes);
}
template <class T, class Lanes>
MIR_INLINE void store_rounded(T* p, typename Simd<T>::Vec v, Lanes lanes) {
  store_packed(p, Simd<T>::pack_rounded(v), sizeof(T), lanes);
}
// store(), past the caches if kStream.
template <bool kStream, class T, class Lanes>
MIR_INLINE void store_to(T* p, typename Simd<T>::Vec v, Lanes lanes) {
  if constexpr (kStream && kIsWhole<Lanes>) {
    stream_bits(p, Simd<T>::pack(v));
  } else {
    store(p, v, lanes);
  }
}

// Whether rows at `base` with stride `stride_bytes` can be streamed, and are too many to stay in cache until the next
// operation reads them.
MIR_INLINE bool worth_streaming(const void* base, int64_t stride_bytes, int64_t total_bytes) {
  const bool aligned = (reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(stride_bytes)) % 64 == 0;
  return aligned && total_bytes >= (int64_t{1} << 24);
}

template <bool kStream>
MIR_INLINE void copy_bytes(void* to, const void* from, int64_t bytes) {
  if constexpr (!kStream) {
    __builtin_memcpy(to, from, bytes);
  } else {
    char* t = static_cast<char*>(to);
    const char* f = static_cast<const char*>(from);
    int64_t i = 0;
    for (; i + kRegisterBytes <= bytes; i += kRegisterBytes) stream_bits(t + i, load_bits<U32Vec>(f + i));
    __builtin_memcpy(t + i, f + i, bytes - i);
  }
}

MIR_INLINE F64Vec folded(F64Vec v) { return v; }
MIR_INLINE F64Vec folded(F32Vec v) {
  const F64Pair wide = widen(v);
  return wide.low + wide.high;
}
MIR_INLINE double total(F64Vec v) {
  double total = 0;
  for (unsigned i = 0; i < sizeof v / sizeof(v[0]); ++i) total += v[i];
  return total;
}

// Prefetches the cache line of p[c] if column c begins one: once per line if c increases by vectors. Used for the next
// row, whose first access would otherwise wait for memory. Any p + c is allowed, because nothing is read.
template <class T>
MIR_INLINE void prefetch_line(const T* p, int64_t c) {
  if (c % static_cast<int64_t>(64 / sizeof(T)) == 0) __builtin_prefetch(p + c);
}

// Calls f(column, Whole) for each whole vector, then f(column, First) for the remaining columns.
template <class T, class F>
MIR_INLINE void for_columns(int64_t cols, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<T> <= cols; c += kLanes<T>) f(c, Whole{});
  if (c < cols) f(c, First{cols - c});
}

// Sum over columns of a[c] * b[c], where f(column, lanes, a, b) sets the two vectors. Runs of 512 columns are summed in
// T's arithmetic, so that few rounding errors accumulate, and the runs in double.
template <class T, class F>
MIR_INLINE double sum_of_products(int64_t cols, const F& f) {
  using Vec = typename Simd<T>::Vec;
  constexpr int64_t kRun = 512;
  F64Vec sum = {};
  for (int64_t start = 0; start < cols; start += kRun) {
    Vec run = {};
    for_columns<T>(cols - start < kRun ? cols - start : kRun, [&](int64_t c, auto lanes) {
      Vec a, b;
      f(start + c, lanes, a, b);
      run = multiply_add(a, b, run);
    });
    sum += folded(run);
  }
  return total(sum);
}

}  // namespace
}  // namespace MIR_ISA
}  // namespace mir
