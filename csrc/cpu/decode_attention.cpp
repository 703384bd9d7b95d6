#include "decode_attention.h"

#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// Query heads, and vectors of a head, whose sums are in registers at once.
constexpr int kHeads = 4, kChunk = kLanes == 16 ? 4 : 2;
constexpr float kMasked = -3.4e38f;  // below every score

// One KV split, or several merged: padded(head_dim) weighted sums, the largest score, and the sum of the weights.
struct KVSplit {
  float* sums;
  std::int64_t width;  // padded(head_dim)
  float& max() const { return sums[width]; }
  float& sum() const { return sums[width + 1]; }
};

// Keys and values to prefetch, one slot at a time; null where the processor's cache has them already.
template <typename T>
struct Next {
  const T *values, *keys;
};
template <typename T>
inline void prefetch_slot(const T* slot, std::int64_t head_dim) {
  for (std::int64_t i = 0; slot && i < head_dim; i += 64 / sizeof(T)) prefetch(slot + i);
}

template <typename T, int H>
void scores_of(const float* queries, std::int64_t head_dim, const T* keys, std::int64_t slots, float scale,
               float scores[kHeads][kKVSplitSlots], const T* values) {
  for (std::int64_t s = 0; s < slots; ++s, keys += head_dim) {
    if (values) prefetch_slot(values + s * head_dim, head_dim);
    Vec sums[H];
    for (int h = 0; h < H; ++h) sums[h] = zero();
    std::int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
      const Vec key = load(keys + i);
      for (int h = 0; h < H; ++h) sums[h] = fma(key, load(queries + h * head_dim + i), sums[h]);
    }
    if (i < head_dim) {
      const Vec key = load_first(keys + i, head_dim - i);
      for (int h = 0; h < H; ++h)
        sums[h] = fma(key, load_first(queries + h * head_dim + i, head_dim - i), sums[h]);
    }
    for (int h = 0; h < H; ++h) scores[h][s] = sum(sums[h]) * scale;
  }
}

// sums[h][chunk] = sum over slots of weight * value; reads C whole vectors, or one that ends after `rest` elements.
template <typename T, int H, int C>
void weighted_sum(const float weights[kHeads][kKVSplitSlots], const T* values, std::int64_t head_dim, std::int64_t slots,
                  std::int64_t rest, float* out, std::int64_t out_stride) {
  Vec sums[H][C];
  for (int h = 0; h < H; ++h)
    for (int c = 0; c < C; ++c) sums[h][c] = zero();
  for (std::int64_t s = 0; s < slots; ++s, values += head_dim)
    for (int c = 0; c < C; ++c) {
      const Vec value = rest ? load_first(values + c * kLanes, rest) : load(values + c * kLanes);
      for (int h = 0; h < H; ++h) sums[h][c] = fma(all(weights[h][s]), value, sums[h][c]);
    }
  for (int h = 0; h < H; ++h)
    for (int c = 0; c < C; ++c) store(out + h * out_stride + c * kLanes, sums[h][c]);
}

template <typename T, int H>
void compute_split(const float* queries, std::int64_t head_dim, const T* keys, const T* values, std::int64_t slots, float scale,
                   const KVSplit& first, std::int64_t stride, const Next<T>& next) {
  alignas(64) float scores[kHeads][kKVSplitSlots];
  scores_of<T, H>(queries, head_dim, keys, slots, scale, scores, next.values);
  for (std::int64_t s = 0; next.keys && s < kKVSplitSlots; ++s) prefetch_slot(next.keys + s * head_dim, head_dim);
  for (int h = 0; h < H; ++h) {
    for (std::int64_t s = slots; s < (slots + kLanes - 1) / kLanes * kLanes; ++s) scores[h][s] = kMasked;
    Vec maxima = all(kMasked), weight_sum = zero();
    for (std::int64_t s = 0; s < slots; s += kLanes) maxima = max(maxima, load(scores[h] + s));
    const float shift = largest(maxima);
    for (std::int64_t s = 0; s < slots; s += kLanes) {
      const Vec weight = exp(add(load(scores[h] + s), all(-shift)));
      store(scores[h] + s, weight);
      if (s + kLanes <= slots) weight_sum = add(weight_sum, weight);
    }
    float total = sum(weight_sum);
    for (std::int64_t s = slots / kLanes * kLanes; s < slots; ++s) total += scores[h][s];
    const KVSplit split{first.sums + h * stride, first.width};
    split.max() = shift;
    split.sum() = total;
  }
  std::int64_t i = 0;
  for (; i + kChunk * kLanes <= head_dim; i += kChunk * kLanes)
    weighted_sum<T, H, kChunk>(scores, values + i, head_dim, slots, 0, first.sums + i, stride);
  for (; i + kLanes <= head_dim; i += kLanes)
    weighted_sum<T, H, 1>(scores, values + i, head_dim, slots, 0, first.sums + i, stride);
  if (i < head_dim)
    weighted_sum<T, H, 1>(scores, values + i, head_dim, slots, head_dim - i, first.sums + i, stride);
}

template <typename T>
void compute_split(const float* queries, std::int64_t heads, std::int64_t head_dim, const T* keys, const T* values,
                   std::int64_t slots, float scale, const KVSplit& first, std::int64_t stride, const Next<T>& next) {
  static_assert(kHeads == 4, "a case for each number of heads");
  if (heads == 4) return compute_split<T, 4>(queries, head_dim, keys, values, slots, scale, first, stride, next);
  if (heads == 3) return compute_split<T, 3>(queries, head_dim, keys, values, slots, scale, first, stride, next);
  if (heads == 2) return compute_split<T, 2>(queries, head_dim, keys, values, slots, scale, first, stride, next);
  compute_split<T, 1>(queries, head_dim, keys, values, slots, scale, first, stride, next);
}

// Merges `split` into `into`.
void merge(const KVSplit& into, const KVSplit& split) {
  const float max = into.max() > split.max() ? into.max() : split.max();
  const float keep = __builtin_expf(into.max() - max), take = __builtin_expf(split.max() - max);
  for (std::int64_t i = 0; i < into.width; i += kLanes)
    store(into.sums + i, fma(load(into.sums + i), all(keep), mul(load(split.sums + i), all(take))));
  into.sum() = into.sum() * keep + split.sum() * take;
  into.max() = max;
}

// The slots that a token sees: its own and those before it, within the window. Positions rise along a row.
Range seen_by(const DecodeStep& step, const Layer& layer, std::int64_t token) {
  const TokenBatch& batch = step.batch;
  std::int64_t low = 0, high = batch.slot[token];
  if (layer.window) {
    const std::int64_t* positions = step.cache.positions + batch.row[token] * step.cache.positions_stride;
    const std::int64_t oldest = batch.position[token] - layer.window + 1;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (positions[middle] < oldest)
        low = middle + 1;
      else
        high = middle;
    }
  }
  return {low, batch.slot[token] + 1};
}

inline std::int64_t token_of(const DecodeStep& step, bool all, std::int64_t i) { return all ? i : step.batch.output_rows[i]; }

// KV splits that each token has room for.
std::int64_t max_splits(const DecodeStep& step, bool split) {
  std::int64_t most = 1;
  for (std::int64_t token = 0; split && token < step.batch.count; ++token) {
    const std::int64_t splits = kv_splits_of(step.batch.slot[token] + 1);
    if (splits > most) most = splits;
  }
  return most;
}

template <typename T>
void attend(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, const Worker& worker) {
  const Model& model = *step.model;
  const KVCache& cache = step.cache;
  const std::int64_t count = all_tokens ? step.batch.count : step.batch.output_count;
  const std::int64_t group = model.query_heads / model.kv_heads, floats = kv_split_floats(model.head_dim);
  const std::int64_t width = padded(model.head_dim), most = max_splits(step, split);
  const std::int64_t heads = model.query_heads + 2 * model.kv_heads;
  float scratch[kHeads * (kMaxHeadDim + 2)];
  std::int64_t task = 0;
  // Heads outside: the keys and values of one stay in the cache while the tokens of a prompt pass over them.
  for (std::int64_t kv = 0; kv < model.kv_heads; ++kv)
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t token = token_of(step, all_tokens, i), row = step.batch.row[token];
      const Range seen = seen_by(step, layer, token);
      const std::int64_t at = layer.slot * cache.layer_stride + row * cache.row_stride + kv * cache.head_stride;
      const T* keys = static_cast<const T*>(cache.keys) + at;
      const T* values = static_cast<const T*>(cache.values) + at;
      // A KV split is either whole in the shared prefix or whole in the row's own slots.
      const std::int64_t prefix_len = cache.prefix_len ? cache.prefix_len[row] : 0;
      const std::int64_t prefix_offset = prefix_len ? (cache.prefix_row[row] - row) * cache.row_stride : 0;
      const auto offset_of = [&](std::int64_t slot) {
        return (slot < prefix_len ? prefix_offset : 0) + slot * model.head_dim;
      };
      const float* queries = step.scratch.qkv + (token * heads + kv * group) * model.head_dim;
      float* store_at = step.scratch.kv_splits + (i * model.query_heads + kv * group) * most * floats;
      if (!split && task++ % worker.count != worker.index) continue;
      const bool cold = i == 0 || step.batch.row[token_of(step, all_tokens, i - 1)] != row;
      const std::int64_t stride_slots = split ? worker.count * kKVSplitSlots : kKVSplitSlots;
      for (std::int64_t begin = seen.begin; begin < seen.end;) {
        const std::int64_t index = begin / kKVSplitSlots, stop = (index + 1) * kKVSplitSlots;
        const std::int64_t end = stop < seen.end ? stop : seen.end;
        if (!split || task++ % worker.count == worker.index)
          for (std::int64_t h = 0; h < group; h += kHeads) {
            const std::int64_t now = group - h < kHeads ? group - h : kHeads;
            float* home = store_at + h * most * floats + (split ? index * floats : 0);
            const bool fresh = split || begin == seen.begin;
            const KVSplit first{fresh ? home : scratch, width};
            const std::int64_t stride = fresh ? most * floats : width + 2;
            const bool more = cold && h == 0 && begin + stride_slots < seen.end;
            const Next<T> next{cold && h == 0 ? values + offset_of(begin) : nullptr,
                               more ? keys + offset_of(begin + stride_slots) : nullptr};
            compute_split(queries + h * model.head_dim, now, model.head_dim, keys + offset_of(begin),
                          values + offset_of(begin), end - begin, model.scale, first, stride, next);
            for (std::int64_t j = 0; !fresh && j < now; ++j)
              merge(KVSplit{home + j * most * floats, width}, KVSplit{scratch + j * stride, width});
          }
        begin = end;
      }
    }
}

}  // namespace

void decode_attention(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, const Worker& worker) {
  if (step.model->dtype == DType::f32)
    attend<float>(step, layer, all_tokens, split, worker);
  else
    attend<bf16>(step, layer, all_tokens, split, worker);
}

void merge_kv_splits(const DecodeStep& step, const Layer& layer, bool all_tokens, bool split, std::int64_t i, float* out) {
  const Model& model = *step.model;
  const std::int64_t floats = kv_split_floats(model.head_dim), width = padded(model.head_dim), most = max_splits(step, split);
  const Range seen = seen_by(step, layer, token_of(step, all_tokens, i));
  const std::int64_t first = split ? seen.begin / kKVSplitSlots : 0, last = split ? (seen.end - 1) / kKVSplitSlots : 0;
  for (std::int64_t head = 0; head < model.query_heads; ++head) {
    float* splits = step.scratch.kv_splits + (i * model.query_heads + head) * most * floats;
    // Several workers may merge the same splits, so nothing is written to them.
    float merged[kMaxHeadDim + 2];
    std::memcpy(merged, splits + first * floats, floats * sizeof(float));
    for (std::int64_t index = first + 1; index <= last; ++index)
      merge(KVSplit{merged, width}, KVSplit{splits + index * floats, width});
    const float scale = 1.0f / merged[width + 1];
    for (std::int64_t j = 0; j < model.head_dim; ++j) out[head * model.head_dim + j] = merged[j] * scale;
  }
}

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
