// rope_append: what a new position needs between its QKV and attention, and its place in the memory.
#pragma once

#include "rmsnorm.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// Cosines and then sines of one position, scaled: [head_dim].
inline void rotary_row(const Decoder& d, std::int64_t position, float* out) {
  const std::int64_t half = d.head_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * d.inv_freq[i];
    out[i] = __builtin_cosf(angle) * d.attention_scaling;
    out[half + i] = __builtin_sinf(angle) * d.attention_scaling;
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

// This member's heads of all entries: queries are rotated where they are, keys and values go to the memory.
inline void rope_append(const Step& step, const Layer& layer, const Member& me) {
  const Decoder& d = *step.decoder;
  const Memory& m = step.memory;
  const std::int64_t heads = d.query_heads + 2 * d.kv_heads;
  const Range mine = me.share(step.entries.count * heads);
  for (std::int64_t unit = mine.begin; unit < mine.end; ++unit) {
    const std::int64_t e = unit / heads, head = unit % heads;
    float* x = step.scratch.qkv + unit * d.head_dim;
    const bool is_query = head < d.query_heads, is_value = head >= d.query_heads + d.kv_heads;
    if (!is_value) {
      const Vector gain = is_query ? layer.query_gain : layer.key_gain;
      if (gain) rmsnorm(x, gain, d.dtype, d.head_dim, d.eps, x);
      rotate(x, step.scratch.rotary + e * d.head_dim, d.head_dim);
    }
    if (is_query) continue;
    const std::int64_t kv_head = (head - d.query_heads) % d.kv_heads;
    const std::int64_t at = layer.slot * m.layer_stride + step.entries.row[e] * m.row_stride + kv_head * m.head_stride +
                            step.entries.slot[e] * d.head_dim;
    void* store = is_value ? m.values : m.keys;
    d.dtype == DType::f32 ? narrow<float>(x, d.head_dim, store, at) : narrow<bf16>(x, d.head_dim, store, at);
  }
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
