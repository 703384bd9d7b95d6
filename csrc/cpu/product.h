// product: Y = X W^T for the few rows of X that a step has, or the many of a prefill, W being read once.
//
// X is prepared as an operand first, in the layout that the kernel reads: see operand_of().
#pragma once

#include "kernels.h"

namespace latentmas {
namespace LATENTMAS_ISA {

enum class Layout {
  rows,    // float32 rows, padded with zeros to kPad
  pairs,   // the same, but of every two vectors' worth first the even elements, then the odd: as bf16 weights are widened
  tiles,   // bf16 tiles of 32 elements x 16 rows, pairs of elements interleaved: as the tile registers take them
};

struct Operand {
  float* data;
  std::int64_t rows, cols;
  Layout layout;
};

// What becomes of Y [rows, weight.rows]. pair: the weight holds two matrices, and Y = silu(X W1^T) * (X W2^T) is half as
// wide. bias is in the model's dtype.
struct Result {
  float* data;
  std::int64_t stride;
  Vector bias;
  DType bias_dtype;
  bool add;   // Y is added to what is there
  bool pair;
};

Layout layout_for(const Weight& weight, std::int64_t rows);
// Floats that an operand takes in any layout.
inline std::int64_t operand_floats(std::int64_t rows, std::int64_t cols) { return (rows + 15) / 16 * 16 * padded(cols); }
// Writes row r of an operand in one of the layouts of float32 rows.
void pack_row(const Operand& operand, std::int64_t r, const float* x);
// Writes this member's part of an operand in tiles from rows of `stride` floats. Members meet afterwards.
void pack_tiles(const Operand& operand, const float* x, std::int64_t stride, const Member& me);
// Computes this member's part of Y.
void product(const Weight& weight, const Operand& x, const Result& y, const Member& me);
// Asks the caches for the start of this member's part of the weight, while it has something else to do.
void prefetch_weight(const Weight& weight, bool pair, const Member& me);

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
