// realign: the hidden state of one step becomes the input embedding of the next (LatentMAS, section 3.1).
//
//   y = W_a h                (skipped where W_a is the identity)
//   e = y * target_norm / max(|y|, min_norm)
//
// Inputs are widened to float32 once; products, norms and the rescale are float32, the cast comes last.
#include "realign.h"

#include "gemm.h"
#include "rmsnorm.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// Below this many multiply-adds waking the other threads costs more than they save.
constexpr std::int64_t kParallelWork = 1 << 18;

template <typename T>
void widen(const T* from, std::int64_t n, float* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <typename T>
void rescale(const float* y, std::int64_t n, float target_norm, T* out) {
  const float norm = __builtin_sqrtf(squared_norm(y, n));
  // Written so that a NaN norm is kept: the caller looks for it.
  const float scale = target_norm / (norm < kMinNorm ? kMinNorm : norm);
  for (std::int64_t i = 0; i < n; ++i) from_float(y[i] * scale, out + i);
}

struct Arguments {
  Weight weight;
  Operand operand;
  Result result;
};

}  // namespace

void rescale_row(const float* y, std::int64_t n, float target_norm, DType dtype, void* out) {
  if (dtype == DType::f32)
    rescale(y, n, target_norm, static_cast<float*>(out));
  else
    rescale(y, n, target_norm, static_cast<bf16*>(out));
}

void realign(ConstMatrix hidden, const float* weight, float target_norm, float* scratch, Matrix out) {
  const std::int64_t rows = hidden.rows, stride = padded(hidden.cols);
  for (std::int64_t b = 0; b < rows; ++b) {
    float* x = scratch + b * stride;
    if (hidden.dtype == DType::f32)
      widen(static_cast<const float*>(hidden.data) + b * hidden.row_stride, hidden.cols, x);
    else
      widen(static_cast<const bf16*>(hidden.data) + b * hidden.row_stride, hidden.cols, x);
    std::memset(x + hidden.cols, 0, (stride - hidden.cols) * sizeof(float));
  }
  const float* y = scratch;
  std::int64_t y_stride = stride;
  if (weight) {
    float* products = scratch + rows * stride;
    y = products;
    y_stride = out.cols;
    const Arguments arguments{{weight, DType::f32, out.cols, hidden.cols, nullptr},
                              {scratch, rows, hidden.cols, Layout::rows},
                              {products, out.cols, nullptr, DType::f32, false, false}};
    const Job job = [](const void* given, const Worker& worker) {
      const Arguments& a = *static_cast<const Arguments*>(given);
      gemm(a.weight, a.operand, a.result, worker, nullptr);  // float32 needs no space
    };
    if (rows * hidden.cols * out.cols > kParallelWork)
      parallel_run(job, &arguments, team_size());
    else
      job(&arguments, Worker{0, 1, nullptr, nullptr});
  }
  const std::int64_t size = out.dtype == DType::f32 ? 4 : 2;
  for (std::int64_t b = 0; b < rows; ++b)
    rescale_row(y + b * y_stride, out.cols, target_norm, out.dtype,
                static_cast<char*>(out.data) + b * out.row_stride * size);
}

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
