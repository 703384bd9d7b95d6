// The table of CPU kernels. Every instruction set compiles the same sources into a namespace of its own and fills one
// table; callers go through active().
#pragma once

#include <cstddef>
#include <cstdint>

namespace latentmas {

enum class DType : int { f32 = 0, bf16 = 1 };

// A row-major matrix that somebody else owns. row_stride counts elements; the elements of a row are contiguous.
struct ConstMatrix {
  const void* data;
  DType dtype;
  std::int64_t rows, cols, row_stride;
};
struct Matrix {
  void* data;
  DType dtype;
  std::int64_t rows, cols, row_stride;
};

struct Kernels {
  // out[b] = y * target_norm / max(|y|, min_norm) with y = weight @ hidden[b], or hidden[b] where weight is null.
  // weight is float32 [out.cols, hidden.cols] with contiguous rows. scratch holds realign_scratch() floats.
  void (*realign)(ConstMatrix hidden, const float* weight, std::int64_t weight_row_stride, float target_norm,
                  float* scratch, Matrix out);
};

// Floats of scratch that realign() needs: the inputs and the products, both in float32.
inline std::int64_t realign_scratch(std::int64_t rows, std::int64_t cols_in, std::int64_t cols_out) {
  return rows * (cols_in + cols_out);
}

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

// Names of the instruction sets that this processor can run, best first, separated by spaces.
const char* available_isas();
// The one in use: the best, or the one that LATENTMAS_ISA names. Throws std::runtime_error where that cannot run here.
const char* active_isa();
const Kernels& active();

}  // namespace latentmas
