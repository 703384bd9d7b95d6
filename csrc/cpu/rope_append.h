// rope_append: head norms and RoPE of a new position, between its QKV and attention, and its keys and values in the KV cache.
#pragma once

#include "rmsnorm.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// Cosines and then sines of one position, scaled: [head_dim].
inline void rotary_row(const Model& model, std::int64_t position, float* out) {
  const std::int64_t half = model.head_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * model.inv_freq[i];
    out[i] = __builtin_cosf(angle) * model.attention_scaling;
    out[half + i] = __builtin_sinf(angle) * model.attention_scaling;
  }
}

// (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), in place.
inline void rotate(float* x, const float* rotary, std::int64_t head_dim) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    x[i] = low * rotary[i] - high * rotary[half + i];
    x[half + i] = high * rotary[i] + low * rotary[half + i];
  }
}

template <typename T>
inline void narrow(const float* from, std::int64_t n, void* to, std::int64_t at) {
  for (std::int64_t i = 0; i < n; ++i) from_float(from[i], static_cast<T*>(to) + at + i);
}

// This worker's heads of all tokens: queries are rotated in place, keys and values go to the KV cache.
inline void rope_append(const DecodeStep& step, const Layer& layer, const Worker& worker) {
  const Model& model = *step.model;
  const KVCache& cache = step.cache;
  const std::int64_t heads = model.query_heads + 2 * model.kv_heads;
  const Range mine = worker.partition(step.batch.count * heads);
  for (std::int64_t unit = mine.begin; unit < mine.end; ++unit) {
    const std::int64_t token = unit / heads, head = unit % heads;
    float* x = step.scratch.qkv + unit * model.head_dim;
    const bool is_query = head < model.query_heads, is_value = head >= model.query_heads + model.kv_heads;
    if (!is_value) {
      const Vector norm_weight = is_query ? layer.query_norm : layer.key_norm;
      if (norm_weight) rmsnorm(x, norm_weight, model.dtype, model.head_dim, model.eps, x);
      rotate(x, step.scratch.rotary + token * model.head_dim, model.head_dim);
    }
    if (is_query) continue;
    const std::int64_t kv_head = (head - model.query_heads) % model.kv_heads;
    const std::int64_t at = layer.slot * cache.layer_stride + step.batch.row[token] * cache.row_stride +
                            kv_head * cache.head_stride + step.batch.slot[token] * model.head_dim;
    void* store = is_value ? cache.values : cache.keys;
    model.dtype == DType::f32 ? narrow<float>(x, model.head_dim, store, at) : narrow<bf16>(x, model.head_dim, store, at);
  }
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
