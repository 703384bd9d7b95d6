// One forward over a decoder: N rows that are a step of N sequences, or a piece of a prompt, or both. The twin of
// engines/step.py: a layer is product (QKV), rope_append, decode_attention, product (+ residual), product (gate and up,
// SwiGLU) and product (+ residual); RMSNorm is computed where a product prepares its operand.
//
// Every member of a team runs all of this and does its share; they meet where one reads what another has written.
#include "decode_attention.h"
#include "kernels.h"
#include "mix.h"
#include "product.h"
#include "realign.h"
#include "rope_append.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

float* own_of(const Step& step, const Member& me) { return step.scratch.own + me.index * step.scratch.own_stride; }

// Makes the input of a product out of rows that `row(i, to)` writes.
template <typename Row>
Operand prepare(const Step& step, const Weight& weight, std::int64_t rows, const Member& me, Row row) {
  const Scratch& s = step.scratch;
  const std::int64_t cols = weight.cols, stride = padded(cols);
  const Layout layout = layout_for(weight, rows, step.decoder->dtype);
  float* own = own_of(step, me);
  float* line = own + kOwnOperandRows * stride;
  if (rows <= kOwnOperandRows && layout != Layout::tiles) {
    const Operand operand{own, rows, cols, layout};
    for (std::int64_t i = 0; i < rows; ++i) pack_row(operand, i, row(i, line));
    return operand;
  }
  const Operand operand{s.operand, rows, cols, layout};
  const Range mine = me.share(rows);
  if (layout == Layout::tiles) {
    // Rows that are there already need no copy.
    const float* first = row(0, nullptr);
    const float* from = first ? first : s.rows;
    const std::int64_t from_stride = first ? row(1, nullptr) - first : stride;
    if (!first) {
      for (std::int64_t i = mine.begin; i < mine.end; ++i) row(i, s.rows + i * stride);
      me.wait();
    }
    pack_tiles(operand, from, from_stride, me);
  } else {
    for (std::int64_t i = mine.begin; i < mine.end; ++i) pack_row(operand, i, row(i, line));
  }
  me.wait();
  return operand;
}

// Rows after a norm. With no place to write to there are none yet.
struct Normed {
  const Step& step;
  Vector gain;
  const float* operator()(std::int64_t i, float* to) const {
    if (!to) return nullptr;
    const Decoder& d = *step.decoder;
    rmsnorm(step.scratch.x + i * d.width, gain, d.dtype, d.width, d.eps, to);
    return to;
  }
};

// Rows of attention, from its parts.
struct Attended {
  const Step& step;
  const Layer& layer;
  bool all, split;
  const float* operator()(std::int64_t i, float* to) const {
    if (!to) return nullptr;
    merge_parts(step, layer, all, split, i, to);
    return to;
  }
};

// Rows that lie in memory.
struct Lying {
  const float* data;
  std::int64_t stride;
  const float* operator()(std::int64_t i, float*) const { return data + i * stride; }
};

template <typename T>
void widen(const void* from, std::int64_t n, float* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(from)[i]);
}

void widen(const void* from, DType dtype, std::int64_t n, float* to) {
  dtype == DType::f32 ? widen<float>(from, n, to) : widen<bf16>(from, n, to);
}

// x of every entry: a token's embedding, a given one, or the hidden state (or logits) mapped back. Also the positions, and the cosines
// and sines of all layers.
void begin(const Step& step, const Member& me) {
  const Decoder& d = *step.decoder;
  const Scratch& s = step.scratch;
  const Entries& e = step.entries;
  const std::int64_t size = d.dtype == DType::f32 ? 4 : 2;
  const float* mapped = step.seeds ? s.products : step.hidden;
  if (step.latents && step.aligner) {
    const Weight weight{step.aligner, DType::f32, d.width, d.width, nullptr};
    const Operand operand = prepare(step, weight, e.count, me, Lying{step.hidden, d.width});
    product(weight, operand, Result{s.products, d.width, nullptr, d.dtype, false, false}, me, own_of(step, me));
    me.wait();
    mapped = s.products;
  }
  const Range mine = me.share(e.count);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    float* x = s.x + i * d.width;
    if (step.latents) {
      if (step.seeds) {
        const float* logits = step.seeds + i * d.lm_head.rows;
        float* mean = s.products + i * d.width;
        d.dtype == DType::f32
            ? mix(logits, d.lm_head.rows, step.likely, static_cast<const float*>(d.embedding), d.width, mean)
            : mix(logits, d.lm_head.rows, step.likely, static_cast<const bf16*>(d.embedding), d.width, mean);
      }
      char* latent = static_cast<char*>(step.latents) + i * step.latents_stride * size;
      rescale_row(mapped + i * d.width, d.width, step.target_norm, d.dtype, latent);
      widen(latent, d.dtype, d.width, x);
    } else if (step.tokens) {
      widen(static_cast<const char*>(d.embedding) + step.tokens[i] * d.width * size, d.dtype, d.width, x);
    } else {
      widen(step.embeds[i], d.dtype, d.width, x);
    }
    step.memory.positions[e.row[i] * step.memory.positions_stride + e.slot[i]] = e.position[i];
    rotary_row(d, e.position[i], s.rotary + i * d.head_dim);
  }
  me.wait();
}

// The wanted entries' rows of x move together.
void gather_wanted(const Step& step, const Member& me) {
  const std::int64_t width = step.decoder->width;
  const Range mine = me.share(width, 16);
  for (std::int64_t i = 0; i < step.entries.wanted_count; ++i)
    std::memmove(step.scratch.x + i * width + mine.begin, step.scratch.x + step.entries.wanted[i] * width + mine.begin,
                 (mine.end - mine.begin) * sizeof(float));
}

void layers(const Step& step, const Member& me) {
  const Decoder& d = *step.decoder;
  const Scratch& s = step.scratch;
  const bool split = splits_attention(step.entries.count, d.kv_heads, me.count);
  const std::int64_t qkv_width = (d.query_heads + 2 * d.kv_heads) * d.head_dim;
  float* own = own_of(step, me);
  for (std::int64_t index = 0; index < d.layer_count; ++index) {
    const Layer& layer = d.layers[index];
    // The last layer needs all keys and values, but the rest of it only for the entries whose state is asked for.
    const bool all = index + 1 < d.layer_count || step.entries.wanted_count == step.entries.count;
    const std::int64_t rows = all ? step.entries.count : step.entries.wanted_count;

    Operand operand = prepare(step, layer.qkv, step.entries.count, me, Normed{step, layer.input_gain});
    product(layer.qkv, operand, Result{s.qkv, qkv_width, layer.qkv_bias, d.dtype, false, false}, me, own);
    me.wait();
    rope_append(step, layer, me);
    if (!all) gather_wanted(step, me);
    me.wait();
    if (rows == 0) return;
    decode_attention(step, layer, all, split, me);
    me.wait();
    operand = prepare(step, layer.output, rows, me, Attended{step, layer, all, split});
    product(layer.output, operand, Result{s.x, d.width, layer.output_bias, d.dtype, true, false}, me, own);
    me.wait();
    operand = prepare(step, layer.gate_up, rows, me, Normed{step, layer.mlp_gain});
    product(layer.gate_up, operand, Result{s.activated, d.intermediate, layer.gate_up_bias, d.dtype, false, true}, me, own);
    me.wait();
    operand = prepare(step, layer.down, rows, me, Lying{s.activated, d.intermediate});
    product(layer.down, operand, Result{s.x, d.width, layer.down_bias, d.dtype, true, false}, me, own);
    me.wait();
  }
}

// States after the final norm, and logits where they are asked for.
void finish(const Step& step, const Member& me) {
  const Decoder& d = *step.decoder;
  const std::int64_t rows = step.entries.wanted_count;
  const Normed normed{step, d.final_gain};
  const Range mine = me.share(rows);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) normed(i, step.hidden + i * d.width);
  if (step.logits && rows) {
    const Operand operand = prepare(step, d.lm_head, rows, me, normed);
    product(d.lm_head, operand, Result{step.logits, d.lm_head.rows, d.lm_head_bias, d.dtype, false, false}, me,
            own_of(step, me));
  }
  me.wait();
}

void run(const Step& step, const Member& me) {
  begin(step, me);
  layers(step, me);
  finish(step, me);
}

}  // namespace

#if defined(LATENTMAS_TILES)
constexpr std::int64_t kPrefillEntries = 256;
#else
constexpr std::int64_t kPrefillEntries = 128;
#endif

extern const Kernels kernels;
const Kernels kernels = {realign, run, kPrefillEntries};

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
