// One forward over the model: N tokens that are a step of N sequences, or a piece of a prompt, or both. The twin of
// engines/cuda_step.py: a layer is gemm (QKV), rope_append, decode_attention, gemm (+ residual), gemm (gate and up, SwiGLU)
// and gemm (+ residual); RMSNorm is computed where a gemm prepares its operand.
//
// Every worker of a team runs all of this on its partition; the workers meet where one reads what another has written.
#include "decode_attention.h"
#include "gemm.h"
#include "kernels.h"
#include "realign.h"
#include "rope_append.h"
#include "simd.h"
#include "soft_embedding.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

float* thread_scratch_of(const DecodeStep& step, const Worker& worker) {
  return step.scratch.thread_scratch + worker.index * step.scratch.thread_scratch_stride;
}

// Packs the operand of a gemm from rows that `row(i, to)` writes.
template <typename Row>
Operand prepare(const DecodeStep& step, const Weight& weight, std::int64_t rows, const Worker& worker, Row row) {
  const Scratch& s = step.scratch;
  const std::int64_t cols = weight.cols, stride = padded(cols);
  const Layout layout = layout_for(weight, rows, step.model->dtype);
  float* thread_scratch = thread_scratch_of(step, worker);
  float* line = thread_scratch + kThreadOperandRows * stride;
  if (rows <= kThreadOperandRows && layout != Layout::amx_tiles) {
    const Operand operand{thread_scratch, rows, cols, layout};
    for (std::int64_t i = 0; i < rows; ++i) pack_row(operand, i, row(i, line));
    return operand;
  }
  const Operand operand{s.operand, rows, cols, layout};
  const Range mine = worker.partition(rows);
  if (layout == Layout::amx_tiles) {
    // Rows in memory need no copy.
    const float* first = row(0, nullptr);
    const float* from = first ? first : s.rows;
    const std::int64_t from_stride = first ? row(1, nullptr) - first : stride;
    if (!first) {
      for (std::int64_t i = mine.begin; i < mine.end; ++i) row(i, s.rows + i * stride);
      worker.wait();
    }
    pack_amx_tiles(operand, from, from_stride, worker);
  } else {
    for (std::int64_t i = mine.begin; i < mine.end; ++i) pack_row(operand, i, row(i, line));
  }
  worker.wait();
  return operand;
}

// Rows after a norm; computed on demand, so there is none to point at where `to` is null.
struct NormedRows {
  const DecodeStep& step;
  Vector norm_weight;
  const float* operator()(std::int64_t i, float* to) const {
    if (!to) return nullptr;
    const Model& model = *step.model;
    rmsnorm(step.scratch.x + i * model.hidden_size, norm_weight, model.dtype, model.hidden_size, model.eps, to);
    return to;
  }
};

// Rows of attention, merged from its KV splits.
struct AttentionRows {
  const DecodeStep& step;
  const Layer& layer;
  bool all_tokens, split;
  const float* operator()(std::int64_t i, float* to) const {
    if (!to) return nullptr;
    merge_kv_splits(step, layer, all_tokens, split, i, to);
    return to;
  }
};

// Rows in memory.
struct StoredRows {
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

// x of every token: its embedding, a given embedding, or the hidden state (or logits) mapped back. Also the positions, and the
// cosines and sines of all layers.
void embed_inputs(const DecodeStep& step, const Worker& worker) {
  const Model& model = *step.model;
  const std::int64_t hidden_size = model.hidden_size;
  const Scratch& s = step.scratch;
  const TokenBatch& batch = step.batch;
  const std::int64_t size = model.dtype == DType::f32 ? 4 : 2;
  const float* mapped = step.soft_logits ? s.products : step.hidden;
  if (step.latents && step.aligner) {
    const Weight weight{step.aligner, DType::f32, hidden_size, hidden_size, nullptr};
    const Operand operand = prepare(step, weight, batch.count, worker, StoredRows{step.hidden, hidden_size});
    gemm(weight, operand, Result{s.products, hidden_size, nullptr, model.dtype, false, false}, worker,
         thread_scratch_of(step, worker));
    worker.wait();
    mapped = s.products;
  }
  const Range mine = worker.partition(batch.count);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    float* x = s.x + i * hidden_size;
    if (step.latents) {
      if (step.soft_logits) {
        const float* logits = step.soft_logits + i * model.lm_head.rows;
        float* mean = s.products + i * hidden_size;
        const std::int64_t vocabulary = model.lm_head.rows, top_k = step.soft_top_k;
        model.dtype == DType::f32
            ? soft_embedding(logits, vocabulary, top_k, static_cast<const float*>(model.embedding), hidden_size, mean)
            : soft_embedding(logits, vocabulary, top_k, static_cast<const bf16*>(model.embedding), hidden_size, mean);
      }
      char* latent = static_cast<char*>(step.latents) + i * step.latents_stride * size;
      rescale_row(mapped + i * hidden_size, hidden_size, step.target_norm, model.dtype, latent);
      widen(latent, model.dtype, hidden_size, x);
    } else if (step.token_ids) {
      widen(static_cast<const char*>(model.embedding) + step.token_ids[i] * hidden_size * size, model.dtype, hidden_size,
            x);
    } else {
      widen(step.embeds[i], model.dtype, hidden_size, x);
    }
    step.cache.positions[batch.row[i] * step.cache.positions_stride + batch.slot[i]] = batch.position[i];
    rotary_row(model, batch.position[i], s.rotary + i * model.head_dim);
  }
  worker.wait();
}

// Moves the output rows of x together.
void gather_output_rows(const DecodeStep& step, const Worker& worker) {
  const std::int64_t width = step.model->hidden_size;
  const Range mine = worker.partition(width, 16);
  for (std::int64_t i = 0; i < step.batch.output_count; ++i)
    std::memmove(step.scratch.x + i * width + mine.begin, step.scratch.x + step.batch.output_rows[i] * width + mine.begin,
                 (mine.end - mine.begin) * sizeof(float));
}

void run_layers(const DecodeStep& step, const Worker& worker) {
  const Model& model = *step.model;
  const std::int64_t hidden_size = model.hidden_size;
  const Scratch& s = step.scratch;
  const bool split = splits_attention(step.batch.count, model.kv_heads, worker.count);
  const std::int64_t qkv_width = (model.query_heads + 2 * model.kv_heads) * model.head_dim;
  float* thread_scratch = thread_scratch_of(step, worker);
  for (std::int64_t index = 0; index < model.layer_count; ++index) {
    const Layer& layer = model.layers[index];
    // The last layer needs all keys and values, but the rest of it only for the tokens whose state is asked for.
    const bool all_tokens = index + 1 < model.layer_count || step.batch.output_count == step.batch.count;
    const std::int64_t rows = all_tokens ? step.batch.count : step.batch.output_count;

    Operand operand = prepare(step, layer.qkv, step.batch.count, worker, NormedRows{step, layer.input_norm});
    gemm(layer.qkv, operand, Result{s.qkv, qkv_width, layer.qkv_bias, model.dtype, false, false}, worker, thread_scratch);
    worker.wait();
    rope_append(step, layer, worker);
    if (!all_tokens) gather_output_rows(step, worker);
    worker.wait();
    if (rows == 0) return;
    decode_attention(step, layer, all_tokens, split, worker);
    worker.wait();
    operand = prepare(step, layer.output, rows, worker, AttentionRows{step, layer, all_tokens, split});
    gemm(layer.output, operand, Result{s.x, hidden_size, layer.output_bias, model.dtype, true, false}, worker,
         thread_scratch);
    worker.wait();
    operand = prepare(step, layer.gate_up, rows, worker, NormedRows{step, layer.mlp_norm});
    gemm(layer.gate_up, operand,
         Result{s.activated, model.intermediate_size, layer.gate_up_bias, model.dtype, false, true}, worker, thread_scratch);
    worker.wait();
    operand = prepare(step, layer.down, rows, worker, StoredRows{s.activated, model.intermediate_size});
    gemm(layer.down, operand, Result{s.x, hidden_size, layer.down_bias, model.dtype, true, false}, worker, thread_scratch);
    worker.wait();
  }
}

// States after the final norm, and logits where they are asked for.
void final_norm_and_logits(const DecodeStep& step, const Worker& worker) {
  const Model& model = *step.model;
  const std::int64_t hidden_size = model.hidden_size;
  const std::int64_t rows = step.batch.output_count;
  const NormedRows normed{step, model.final_norm};
  const Range mine = worker.partition(rows);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) normed(i, step.hidden + i * hidden_size);
  if (step.logits && rows) {
    const Operand operand = prepare(step, model.lm_head, rows, worker, normed);
    gemm(model.lm_head, operand, Result{step.logits, model.lm_head.rows, model.lm_head_bias, model.dtype, false, false},
         worker, thread_scratch_of(step, worker));
  }
  worker.wait();
}

void run(const DecodeStep& step, const Worker& worker) {
  embed_inputs(step, worker);
  run_layers(step, worker);
  final_norm_and_logits(step, worker);
}

}  // namespace

#if defined(LATENTMAS_AMX)
constexpr std::int64_t kPrefillTokens = 256;
#else
constexpr std::int64_t kPrefillTokens = 128;
#endif

extern const Kernels kernels;
const Kernels kernels = {realign, run, kPrefillTokens};

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
