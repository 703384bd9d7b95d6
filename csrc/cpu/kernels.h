// The border between the code that is compiled once and the kernels, which are compiled once per instruction
// set: plain structs, and a table of functions. Callers go through active().
//
// The kernels use nothing from the standard library's templates: an inline function that one translation unit compiled
// with AVX-512 could otherwise be the copy that the linker keeps for all of them, and an older processor would stop at an
// illegal instruction.
#pragma once

#include <cstddef>
#include <cstdint>

#include "threads.h"

namespace latentmas {

enum class DType : int { f32 = 0, bf16 = 1, i8 = 2 };

// Views of row-major matrices. row_stride counts elements; the elements of a row are contiguous.
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

// The weight of a product, [out, in] with contiguous rows. scales: one per int8 row, w = scale * q; null for the other dtypes.
struct Weight {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0, cols = 0;
  const float* scales = nullptr;
};
// A norm's weight or a bias, in the model's dtype; null where the model has none.
using Vector = const void*;

// One decoder layer; models/packed_weights.py has the same fields.
struct Layer {
  Vector input_norm;
  Weight qkv;
  Vector qkv_bias, query_norm, key_norm;
  Weight output;
  Vector output_bias, mlp_norm;
  Weight gate_up;
  Vector gate_up_bias;
  Weight down;
  Vector down_bias;
  std::int64_t window;  // positions that a query sees, its own included; 0 is all
  std::int64_t slot;    // its place among the layers of the KV cache
};

struct Model {
  DType dtype;  // float32 or bfloat16
  const Layer* layers;
  std::int64_t layer_count, hidden_size, query_heads, kv_heads, head_dim, intermediate_size;
  const void* embedding;  // [embedding_rows, hidden_size]
  std::int64_t embedding_rows;
  Vector final_norm;
  Weight lm_head;  // [vocabulary, hidden_size]
  Vector lm_head_bias;
  float eps, scale, attention_scaling;
  const float* inv_freq;  // [head_dim / 2]
};

// Keys and values of all layers, [layers, B, kv_heads, slots, head_dim] with contiguous slots and equal strides, and the
// positions [B, slots]. The first prefix_len[b] slots of row b, a multiple of kKVSplitSlots, are stored in row
// prefix_row[b]; both are null where no row shares a prefix. Every row has all of its positions.
struct KVCache {
  void *keys, *values;
  std::int64_t layer_stride, row_stride, head_stride;
  std::int64_t* positions;
  std::int64_t positions_stride;
  const std::int64_t *prefix_row = nullptr, *prefix_len = nullptr;
};

// New tokens to run: token i belongs to row `row[i]` of the KV cache and is stored in `slot[i]`. The tokens of one row follow
// each other in rising order. `output_rows` lists the tokens whose final state is asked for, in rising order.
struct TokenBatch {
  std::int64_t count;
  const std::int64_t *row, *slot, *position;
  std::int64_t output_count;
  const std::int64_t* output_rows;
};

// Scratch of a step in floats; Runner::run makes it. thread_scratch holds thread_scratch_stride floats for each thread.
struct Scratch {
  float *x, *rows, *qkv, *activated, *rotary, *kv_splits, *operand, *thread_scratch, *products;
  std::int64_t thread_scratch_stride;
};

// One forward over the model. The input is one of token_ids, embeds and hidden.
struct DecodeStep {
  const Model* model;
  KVCache cache;
  TokenBatch batch;
  Scratch scratch;

  const std::int64_t* token_ids;  // [tokens]
  const void* const* embeds;      // [tokens], addresses of rows in the model's dtype
  // Latent: x = realign(hidden), or realign(soft_embedding(soft_logits)); also written to `latents` in the model's
  // dtype.
  const float* aligner;  // [hidden_size, hidden_size], W_a transposed; null is the identity
  const float* soft_logits;  // soft feedback: logits [tokens, vocabulary]; the soft_top_k largest of them count
  std::int64_t soft_top_k;
  float target_norm;
  void* latents;
  std::int64_t latents_stride;

  float* hidden;  // [output_rows, hidden_size]: read by a latent step, then written with the states after the final norm
  float* logits;  // [output_rows, vocabulary], or null where the lm_head shall not run
};

struct Kernels {
  // out[b] = y * target_norm / max(|y|, min_norm) with y = weight @ hidden[b], or hidden[b] where weight is null.
  // weight is float32 [out.cols, hidden.cols] with contiguous rows. scratch holds realign_scratch() floats.
  void (*realign)(ConstMatrix hidden, const float* weight, float target_norm, float* scratch, Matrix out);
  // Runs on every thread of a team.
  void (*step)(const DecodeStep& step, const Worker& worker);
  // Tokens that a prefill runs in one step.
  std::int64_t prefill_tokens;
};

// Slots of one KV split of attention. Splits are computed by themselves and merged in order, so that a row's result depends
// on neither the batch nor the number of threads.
constexpr std::int64_t kKVSplitSlots = 64;
// Up to so many rows every thread prepares the operand of a product for itself, which spares a barrier.
constexpr std::int64_t kThreadOperandRows = 4;
// Most rows of a weight that a product takes at once.
constexpr std::int64_t kMaxBlockRows = 8;
constexpr std::int64_t kMaxHeadDim = 256;
// Most tokens in the mean of soft feedback.
constexpr std::int64_t kMaxSoftTokens = 16;
// Elements that rows of an operand are padded to, with zeros.
constexpr std::int64_t kPad = 32;
// Smallest divisor of realign's rescale: a zero vector stays zero instead of becoming NaN.
constexpr float kMinNorm = 1e-12f;

LATENTMAS_INLINE std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }
LATENTMAS_INLINE std::int64_t kv_splits_of(std::int64_t slots) { return (slots + kKVSplitSlots - 1) / kKVSplitSlots; }
// Floats of thread scratch that products of so many columns need: operands and a row more, or two blocks of rows in bf16.
LATENTMAS_INLINE std::int64_t thread_scratch_floats(std::int64_t cols) {
  return (kThreadOperandRows + 1 > kMaxBlockRows ? kThreadOperandRows + 1 : kMaxBlockRows) * padded(cols);
}
// Floats of one KV split: the weighted sum of the values, the largest score and the sum of the weights.
LATENTMAS_INLINE std::int64_t kv_split_floats(std::int64_t head_dim) { return padded(head_dim) + 2; }
// Whether attention over so few tokens is split along the slots to keep all threads busy.
LATENTMAS_INLINE bool splits_attention(std::int64_t tokens, std::int64_t kv_heads, int threads) {
  return threads > 1 && tokens * kv_heads < 8 * threads;
}

// Floats of scratch that realign() needs: the inputs and the products, both in float32.
LATENTMAS_INLINE std::int64_t realign_scratch(std::int64_t rows, std::int64_t cols_in, std::int64_t cols_out) {
  return padded(rows) * (padded(cols_in) + padded(cols_out));
}

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }

// Names of the instruction sets that this processor can run, best first, separated by spaces.
const char* available_isas();
// The instruction set in use: the best, or the one that LATENTMAS_ISA names. Throws std::runtime_error where that cannot run
// here.
const char* active_isa();
const Kernels& active();

}  // namespace latentmas
