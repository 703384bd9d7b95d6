// decode_attention: each query over the slots of its thread_scratch row up to its thread_scratch, by online softmax in KV splits of
// kKVSplitSlots.
#pragma once

#include "kernels.h"

namespace latentmas {
namespace LATENTMAS_ISA {

// Computes the parts that fall to this member, for the wanted entries of `step` (all entries where `all`). With `split`
// every part lies by itself in step.scratch.kv_splits, otherwise they are put together as they come.
void decode_attention(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, const Worker& worker);

// Merges the KV splits of the i-th of those tokens: [query_heads * head_dim].
void merge_kv_splits(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, std::int64_t i, float* out);

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
