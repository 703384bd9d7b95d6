// One vector of float32 lanes per instruction set: loads (widening bf16 and int8), stores (rounding to bf16), arithmetic.
//
// Everything here has internal linkage; see kernels.h for why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

using bf16 = std::uint16_t;
using int8 = std::int8_t;

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
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Vec load(const int8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// Two vectors' worth of bf16, the even and the odd ones: half the work of widening them in order.
inline void load_even_odd(const bf16* p, Vec* even, Vec* odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
// 2 kLanes elements in order, as load_even_odd would give them.
inline void split_even_odd(const float* p, Vec* even, Vec* odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Vec low = load(p), high = load(p + kLanes);
  *even = _mm512_permutex2var_ps(low, first, high);
  *odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
}
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// The first `count` lanes; the others are zero, and nothing behind them is read or written.
inline __mmask16 first_lanes(std::int64_t count) { return count >= kLanes ? 0xffff : (1u << count) - 1; }
inline Vec load_first(const float* p, std::int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Vec load_first(const bf16* p, std::int64_t count) {
  const __m256i part = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
}
inline Vec load_first(const int8* p, std::int64_t count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)));
}
inline void store_first(float* p, Vec v, std::int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
// The sums of eight vectors. Each adds up in the same order as in sum(): halves, quarters, and so on.
inline void sums_of(const Vec (&v)[8], float* out) {
  const auto halves = [](Vec a, Vec b) { return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
  const auto quarters = [](Vec a, Vec b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  const Vec a = quarters(halves(v[0], v[1]), halves(v[2], v[3])), b = quarters(halves(v[4], v[5]), halves(v[6], v[7]));
  const Vec pairs = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const Vec whole = add(pairs, _mm512_permute_ps(pairs, 0xb1));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12, 2, 6, 10, 14);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, whole)));
}
#if defined(__AVX512BF16__)
// 32 elements, and their products with 32 others, two of which add up in each lane.
using Bf16Vec = __m512bh;
inline Bf16Vec load_bf16(const bf16* p) { return (Bf16Vec)_mm512_loadu_si512(p); }
inline Vec dot(Bf16Vec a, Bf16Vec b, Vec sums) { return _mm512_dpbf16_ps(sums, a, b); }
inline void store_bf16(bf16* p, Vec low, Vec high) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }
#endif

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Vec load(const int8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline void load_even_odd(const bf16* p, Vec* even, Vec* odd) {
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)p);
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
inline void split_even_odd(const float* p, Vec* even, Vec* odd) {
  for (int i = 0; i < kLanes; ++i) {
    (*even)[i] = p[2 * i];
    (*odd)[i] = p[2 * i + 1];
  }
}
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else

// Four independent lanes: enough for the compiler to use SSE or NEON, and to shorten the rounding chain.
constexpr int kLanes = 4;
struct Vec {
  float lane[kLanes];
};
template <typename F>
inline Vec lanes(F f) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = f(i);
  return v;
}
inline Vec all(float x) { return {{x, x, x, x}}; }
inline Vec zero() { return all(0); }
template <typename T>
inline Vec load(const T* p) {
  return lanes([&](int i) { return to_float(p[i]); });
}
inline Vec load(const int8* p) {
  return lanes([&](int i) { return static_cast<float>(p[i]); });
}
inline void load_even_odd(const bf16* p, Vec* even, Vec* odd) {
  *even = lanes([&](int i) { return to_float(p[2 * i]); });
  *odd = lanes([&](int i) { return to_float(p[2 * i + 1]); });
}
inline void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return lanes([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec add(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec max(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec round(Vec a) {
  return lanes([&](int i) { return __builtin_rintf(a.lane[i]); });
}
inline Vec times_power_of_two(Vec a, Vec n) {
  return lanes([&](int i) {
    const std::int32_t bits = (static_cast<std::int32_t>(n.lane[i]) + 127) * (1 << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return a.lane[i] * power;
  });
}
inline void split_even_odd(const float* p, Vec* even, Vec* odd) {
  *even = lanes([&](int i) { return p[2 * i]; });
  *odd = lanes([&](int i) { return p[2 * i + 1]; });
}
inline float sum(Vec v) { return (v.lane[0] + v.lane[1]) + (v.lane[2] + v.lane[3]); }
inline float largest(Vec v) {
  const float a = v.lane[0] > v.lane[1] ? v.lane[0] : v.lane[1], b = v.lane[2] > v.lane[3] ? v.lane[2] : v.lane[3];
  return a > b ? a : b;
}

#endif

#if !defined(__AVX512F__)
// The first `count` lanes; the others are zero, and nothing behind them is read or written.
template <typename T>
inline Vec load_first(const T* p, std::int64_t count) {
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
inline void store_first(float* p, Vec v, std::int64_t count) {
  if (count >= kLanes) return store(p, v);
  float part[kLanes];
  store(part, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = part[i];
}
template <int N>
inline void sums_of(const Vec (&v)[N], float* out) {
  for (int i = 0; i < N; ++i) out[i] = sum(v[i]);
}
#endif

// e^x to 2 units in the last place between -87 and 88, where float32 ends; x is clamped to this range. exp(NaN) is
// some number: callers look for NaN elsewhere.
inline Vec exp(Vec x) {
  x = min(max(x, all(-87.0f)), all(88.0f));
  const Vec n = round(mul(x, all(1.44269504f)));
  // The reduced argument, with ln 2 in two parts so that n ln 2 is exact enough; then its Taylor series.
  Vec r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};
  Vec y = all(1.0f / 5040);
  for (int i = 0; i < 7; ++i) y = fma(y, r, all(kTaylor[i]));
  return times_power_of_two(y, n);
}

// x / (1 + e^-x)
inline Vec silu(Vec x) { return div(x, add(all(1.0f), exp(mul(x, all(-1.0f))))); }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// `once`: past the second and third cache where the processor can do so. Weights that a step reads once would push out of
// them what it reads again: 1.05 times the speed at batch 1.
inline void prefetch(const void* p, bool once) { once ? __builtin_prefetch(p, 0, 0) : __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
