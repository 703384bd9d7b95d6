#pragma once

#include "kernels.h"

namespace latentmas {
namespace LATENTMAS_ISA {

void realign(ConstMatrix hidden, const float* weight, float target_norm, float* scratch, Matrix out);

// One row of the rescale: out = y * target_norm / max(|y|, min_norm), in the given dtype.
void rescale_row(const float* y, std::int64_t n, float target_norm, DType dtype, void* out);

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
