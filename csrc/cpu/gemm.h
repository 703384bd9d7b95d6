// gemm: Y = X W^T for the few rows of X that a step has, or the many of a prefill, W being read once.
//
// X is prepared as an operand first, in the layout that the kernel reads.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {

enum class Layout {
  rows,       // float32 rows, padded with zeros to kPad
  even_odd,   // the same, but of every two vectors' worth first the even elements, then the odd: as bf16 weights are widened
  bf16,       // bf16 rows, padded likewise: as the bf16 dot product takes them
  amx_tiles,  // bf16 tiles of 32 elements x 16 rows, pairs of elements interleaved: as the tile registers take them
};

struct Operand {
  float* data;
  std::int64_t rows, cols;
  Layout layout;
};

// The output Y [rows, weight.rows]. gated: the weight holds two matrices, and Y = silu(X W1^T) * (X W2^T) is half as wide.
// bias is in the model's dtype.
struct Result {
  float* data;
  std::int64_t stride;
  Vector bias;
  DType bias_dtype;
  bool add;  // Y is added to what is there
  bool gated;
};

// Rows of a weight in one unit of a worker's partition.
constexpr std::int64_t kUnit = 16;

// The layout of an operand of so many rows for this weight. A float32 model's operands are never rounded, so that a row gives
// the same in any batch.
Layout layout_for(const Weight& weight, std::int64_t rows, DType model);
// Writes row r of an operand; all layouts but amx_tiles.
void pack_row(const Operand& operand, std::int64_t r, const float* x);
// Writes this worker's part of an operand in tiles from rows of `stride` floats. The workers meet afterwards.
void pack_amx_tiles(const Operand& operand, const float* x, std::int64_t stride, const Worker& worker);
// Computes this worker's part of Y. `space` is the worker's own thread scratch of thread_scratch_floats(x.cols), of which the
// operand may be a part.
void gemm(const Weight& weight, const Operand& x, const Result& y, const Worker& worker, void* space);

namespace {

// `count` elements of the bias from i on, zeros behind them.
inline Vec bias_of(const Result& y, std::int64_t i, std::int64_t count) {
  if (!y.bias) return zero();
  return y.bias_dtype == DType::f32 ? load_first(static_cast<const float*>(y.bias) + i, count)
                                    : load_first(static_cast<const bf16*>(y.bias) + i, count);
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
