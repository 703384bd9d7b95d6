// decode_attention: each query over the slots of its own row up to its own, by online softmax in parts of kPartSlots.
#pragma once

#include "kernels.h"

namespace latentmas {
namespace LATENTMAS_ISA {

// Computes the parts that fall to this member, for the wanted entries of `step` (all entries where `all`). With `split`
// every part lies by itself in step.scratch.partials, otherwise they are put together as they come.
void decode_attention(const Step& step, const Layer& layer, bool all, bool split, const Member& me);

// Puts the parts of the i-th of those entries together: [query_heads * head_dim].
void merge_parts(const Step& step, const Layer& layer, bool all, bool split, std::int64_t i, float* out);

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
