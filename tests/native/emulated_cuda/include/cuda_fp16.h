// Replaces CUDA's half: conversions from and to float, rounding to nearest even, every NaN becomes 0x7fff.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31;
  const uint32_t fraction = v.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = fraction ? 0x7fffffff : sign | 0x7f800000;
  } else if (exponent == 0) {  // a multiple of 2^-24, which is exact in float
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  } else {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  }
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline __half __float2half_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t out;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) {  // 65520, halfway from the largest half to the next power of two
    out = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14, the smallest normal half
    out = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // units of 2^-24, which is the last place of 0.5 + k 2^-24, so the addition rounds correctly
    float scaled, half = 0.5f;
    std::memcpy(&scaled, &magnitude, sizeof(scaled));
    scaled += half;
    std::memcpy(&out, &scaled, sizeof(out));
    out -= 0x3f000000;
  }
  return {static_cast<uint16_t>(sign | out)};
}
