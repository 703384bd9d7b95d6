// What crosses between the code that is compiled once and the kernels, which are compiled once per instruction set: plain
// structs, and a table of functions. Callers go through active().
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

// Row-major matrices that somebody else owns. row_stride counts elements; the elements of a row are contiguous.
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

// A product's weight, [out, in] with contiguous rows. scales: of int8 rows, w = scale * q; null for the other dtypes.
struct Weight {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0, cols = 0;
  const float* scales = nullptr;
};
// A norm's weight or a bias, in the model's dtype; null where the model has none.
using Vector = const void*;

// One decoder layer, as in weights.py.
struct Layer {
  Vector input_gain;
  Weight qkv;
  Vector qkv_bias, query_gain, key_gain;
  Weight output;
  Vector output_bias, mlp_gain;
  Weight gate_up;
  Vector gate_up_bias;
  Weight down;
  Vector down_bias;
  std::int64_t window;  // positions that a query sees, its own included; 0 is all
  std::int64_t slot;    // its place among the layers of the memory
};

struct Decoder {
  DType dtype;  // of the model: float32 or bfloat16
  const Layer* layers;
  std::int64_t layer_count, width, query_heads, kv_heads, head_dim, intermediate;
  const void* embedding;  // [embedding_rows, width]
  std::int64_t embedding_rows;
  Vector final_gain;
  Weight lm_head;
  Vector lm_head_bias;
  float eps, scale, attention_scaling;
  const float* inv_freq;  // [head_dim / 2]
};

// Keys and values of all layers, [layers, B, kv_heads, slots, head_dim] with contiguous slots and equal strides, and the
// positions [B, slots]. The first prefix_len[b] slots of row b, a multiple of kPartSlots, lie in row prefix_row[b]; both are null
// where no row borrows. Positions are each row's own.
struct Memory {
  void *keys, *values;
  std::int64_t layer_stride, row_stride, head_stride;
  std::int64_t* positions;
  std::int64_t positions_stride;
  const std::int64_t *prefix_row = nullptr, *prefix_len = nullptr;
};

// New positions to run: entry i belongs to row `row[i]` of the memory and is stored in `slot[i]`. Entries of one row follow
// each other in rising order. `wanted` lists the entries whose final state is asked for, rising.
struct Entries {
  std::int64_t count;
  const std::int64_t *row, *slot, *position;
  std::int64_t wanted_count;
  const std::int64_t* wanted;
};

// Scratch of a step in floats; Runner::run makes it. `own` is a piece of own_stride for each thread.
struct Scratch {
  float *x, *rows, *qkv, *activated, *rotary, *partials, *operand, *own, *products;
  std::int64_t own_stride;
};

// One forward over the decoder. What the entries start from is one of tokens, embeds and hidden.
struct Step {
  const Decoder* decoder;
  Memory memory;
  Entries entries;
  Scratch scratch;

  const std::int64_t* tokens;  // [entries]
  const void* const* embeds;   // [entries], addresses of rows in the model's dtype
  // Latent: x = realign(hidden), or realign(mix(seeds)), which is also written to `latents` in the model's dtype.
  const float* aligner;  // [width, width], W_a transposed; null is the identity
  const float* seeds;    // soft feedback: logits [entries, vocabulary]; `likely` of them are mixed
  std::int64_t likely;
  float target_norm;
  void* latents;
  std::int64_t latents_stride;

  float* hidden;  // [wanted, width]: read by a latent step, then written with the states after the final norm
  float* logits;  // [wanted, vocabulary], or null where the lm_head shall not run
};

struct Kernels {
  // out[b] = y * target_norm / max(|y|, min_norm) with y = weight @ hidden[b], or hidden[b] where weight is null.
  // weight is float32 [out.cols, hidden.cols] with contiguous rows. scratch holds realign_scratch() floats.
  void (*realign)(ConstMatrix hidden, const float* weight, float target_norm, float* scratch, Matrix out);
  // Runs on every member of a team.
  void (*step)(const Step& step, const Member& me);
  // Entries of a step that this instruction set likes to run at once in a prefill.
  std::int64_t prefill_entries;
};

// Slots of one part of attention. Parts are computed by themselves and put together in order, so that a row's result
// depends on neither the batch nor the number of threads.
constexpr std::int64_t kPartSlots = 64;
// Up to here every thread makes the input of a product for itself, which spares a barrier.
constexpr std::int64_t kOwnOperandRows = 4;
// Most rows of a weight that a product takes at once.
constexpr std::int64_t kMostBlockRows = 8;
constexpr std::int64_t kMostHeadDim = 256;
// Most tokens whose embeddings soft feedback mixes.
constexpr std::int64_t kMostLikely = 16;
// Elements that rows of an operand are padded to, with zeros.
constexpr std::int64_t kPad = 32;

LATENTMAS_INLINE std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }
LATENTMAS_INLINE std::int64_t parts_of(std::int64_t slots) { return (slots + kPartSlots - 1) / kPartSlots; }
// Floats of a thread's own that products of so many columns need: operands and a row more, or two blocks of rows in bf16.
LATENTMAS_INLINE std::int64_t own_floats(std::int64_t cols) {
  return (kOwnOperandRows + 1 > kMostBlockRows ? kOwnOperandRows + 1 : kMostBlockRows) * padded(cols);
}
// Floats that one part of attention is kept in: the sum, the maximum and their weights' sum.
LATENTMAS_INLINE std::int64_t part_floats(std::int64_t head_dim) { return padded(head_dim) + 2; }
// Whether attention over so few entries is split along the slots to keep all threads busy.
LATENTMAS_INLINE bool splits_attention(std::int64_t entries, std::int64_t kv_heads, int threads) {
  return threads > 1 && entries * kv_heads < 8 * threads;
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
// The one in use: the best, or the one that LATENTMAS_ISA names. Throws std::runtime_error where that cannot run here.
const char* active_isa();
const Kernels& active();

}  // namespace latentmas
