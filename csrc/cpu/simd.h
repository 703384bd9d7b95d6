// One vector of float32 lanes per instruction set: loads (widening bf16), stores (rounding to bf16), FMA and sums.
//
// Everything here and in the kernels has internal linkage, and the kernels use nothing from the standard library's
// templates: an inline function that one translation unit compiled with AVX-512 could otherwise be the copy that the
// linker keeps for all of them, and an older processor would stop at an illegal instruction.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

using bf16 = std::uint16_t;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void from_float(float x, float* to) { *to = x; }
// Round to nearest even, as torch does; a NaN stays a NaN (adding the rounding bias could turn it into an infinity).
inline void from_float(float x, bf16* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *to = (x != x) ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#else

// Four independent lanes: enough for the compiler to use SSE or NEON, and to shorten the rounding chain.
constexpr int kLanes = 4;
struct Vec {
  float lane[kLanes];
};
inline Vec zero() { return {{0, 0, 0, 0}}; }
inline Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline float sum(Vec v) { return (v.lane[0] + v.lane[1]) + (v.lane[2] + v.lane[3]); }

#endif

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
