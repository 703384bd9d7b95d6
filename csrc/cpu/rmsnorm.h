// rmsnorm: out = x / sqrt(mean(x^2) + eps) * norm_weight, in float32 throughout.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

inline float squared_norm(const float* x, std::int64_t n) {
  Vec total = zero();
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    total = fma(v, v, total);
  }
  float squares = sum(total);
  for (; i < n; ++i) squares += x[i] * x[i];
  return squares;
}

template <typename T>
inline void rmsnorm(const float* x, const T* norm_weight, std::int64_t n, float eps, float* out) {
  const float scale = 1.0f / __builtin_sqrtf(squared_norm(x, n) / static_cast<float>(n) + eps);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, mul(mul(load(x + i), all(scale)), load(norm_weight + i)));
  for (; i < n; ++i) out[i] = x[i] * scale * to_float(norm_weight[i]);
}

inline void rmsnorm(const float* x, Vector norm_weight, DType dtype, std::int64_t n, float eps, float* out) {
  if (dtype == DType::f32)
    rmsnorm(x, static_cast<const float*>(norm_weight), n, eps, out);
  else
    rmsnorm(x, static_cast<const bf16*>(norm_weight), n, eps, out);
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
