// decode_attention: each query over the slots of its row up to its own, by online softmax in KV splits of kKVSplitSlots.
#pragma once

#include "kernels.h"

namespace latentmas {
namespace LATENTMAS_ISA {

// Computes this worker's part of attention, for the output rows of `step` (all tokens where `all_tokens`). With `split`
// every KV split is stored in step.scratch.kv_splits, otherwise they are merged as they come.
void decode_attention(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, const Worker& worker);

// Merges the KV splits of the i-th of those tokens: [query_heads * head_dim].
void merge_kv_splits(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, std::int64_t i, float* out);

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
