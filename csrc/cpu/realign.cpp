// realign: the hidden state of one step becomes the input embedding of the next (LatentMAS, section 3.1).
//
//   y = W_a h                (skipped where W_a is the identity)
//   e = y * target_norm / max(|y|, min_norm)
//
// Inputs are widened to float32 once; products, norms and the rescale are float32, the cast comes last. W_a is read once
// for all rows of the batch: every weight row is multiplied with up to kRowBlock hidden rows while it is in registers.
#include "kernels.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

constexpr float kMinNorm = 1e-12f;  // a zero vector stays zero instead of becoming NaN
constexpr int kRowBlock = 4;
// Below this many multiply-adds the parallel region costs more than it saves.
constexpr std::int64_t kParallelWork = 1 << 16;

template <typename T>
void widen(const ConstMatrix& from, float* to) {
  for (std::int64_t b = 0; b < from.rows; ++b) {
    const T* row = static_cast<const T*>(from.data) + b * from.row_stride;
    for (std::int64_t i = 0; i < from.cols; ++i) to[b * from.cols + i] = to_float(row[i]);
  }
}

// y[r * y_stride] = weight . x[r] for R rows of x. Two accumulators per row hide the latency of the FMA.
template <int R>
void dot_rows(const float* weight, const float* x, std::int64_t n, float* y, std::int64_t y_stride) {
  Vec even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = zero();
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec w0 = load(weight + i), w1 = load(weight + i + kLanes);
    for (int r = 0; r < R; ++r) {
      even[r] = fma(w0, load(x + r * n + i), even[r]);
      odd[r] = fma(w1, load(x + r * n + i + kLanes), odd[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float total = sum(even[r]) + sum(odd[r]);
    for (std::int64_t j = i; j < n; ++j) total += weight[j] * x[r * n + j];
    y[r * y_stride] = total;
  }
}

float squared_norm(const float* x, std::int64_t n) {
  float total;
  dot_rows<1>(x, x, n, &total, 1);
  return total;
}

template <typename T>
void rescale(const float* y, float target_norm, const Matrix& out) {
  for (std::int64_t b = 0; b < out.rows; ++b, y += out.cols) {
    const float norm = __builtin_sqrtf(squared_norm(y, out.cols));
    // Written so that a NaN norm is kept: the caller looks for it.
    const float scale = target_norm / (norm < kMinNorm ? kMinNorm : norm);
    T* row = static_cast<T*>(out.data) + b * out.row_stride;
    for (std::int64_t i = 0; i < out.cols; ++i) from_float(y[i] * scale, row + i);
  }
}

void realign(ConstMatrix hidden, const float* weight, std::int64_t weight_row_stride, float target_norm, float* scratch,
             Matrix out) {
  float* x = scratch;
  hidden.dtype == DType::f32 ? widen<float>(hidden, x) : widen<bf16>(hidden, x);

  const float* y = x;
  if (weight) {
    const std::int64_t rows = hidden.rows, n = hidden.cols, m = out.cols;
    float* product = scratch + rows * n;
#pragma omp parallel for schedule(static) if (rows * n * m > kParallelWork)
    for (std::int64_t o = 0; o < m; ++o) {
      const float* w = weight + o * weight_row_stride;
      std::int64_t b = 0;
      for (; b + kRowBlock <= rows; b += kRowBlock) dot_rows<kRowBlock>(w, x + b * n, n, product + b * m + o, m);
      for (; b < rows; ++b) dot_rows<1>(w, x + b * n, n, product + b * m + o, m);
    }
    y = product;
  }
  out.dtype == DType::f32 ? rescale<float>(y, target_norm, out) : rescale<bf16>(y, target_norm, out);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {realign};

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
