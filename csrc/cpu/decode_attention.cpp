#include "decode_attention.h"

#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// Query heads, and vectors of a head, whose sums are in registers at once.
constexpr int kHeads = 4, kChunk = kLanes == 16 ? 4 : 2;
constexpr float kNothing = -3.4e38f;  // below every score

// A part, or several put together: padded(head_dim) sums, the largest score, and the sum of the weights.
struct Part {
  float* sums;
  std::int64_t width;  // padded(head_dim)
  float& top() const { return sums[width]; }
  float& mass() const { return sums[width + 1]; }
};

// What is read after this, one slot at a time; null where it is in a cache already.
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
               float scores[kHeads][kPartSlots], const T* values) {
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
void mix(const float weights[kHeads][kPartSlots], const T* values, std::int64_t head_dim, std::int64_t slots,
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
void part_of(const float* queries, std::int64_t head_dim, const T* keys, const T* values, std::int64_t slots, float scale,
             const Part& first, std::int64_t stride, const Next<T>& next) {
  alignas(64) float scores[kHeads][kPartSlots];
  scores_of<T, H>(queries, head_dim, keys, slots, scale, scores, next.values);
  for (std::int64_t s = 0; next.keys && s < kPartSlots; ++s) prefetch_slot(next.keys + s * head_dim, head_dim);
  for (int h = 0; h < H; ++h) {
    for (std::int64_t s = slots; s < (slots + kLanes - 1) / kLanes * kLanes; ++s) scores[h][s] = kNothing;
    Vec top = all(kNothing), mass = zero();
    for (std::int64_t s = 0; s < slots; s += kLanes) top = max(top, load(scores[h] + s));
    const float shift = largest(top);
    for (std::int64_t s = 0; s < slots; s += kLanes) {
      const Vec weight = exp(add(load(scores[h] + s), all(-shift)));
      store(scores[h] + s, weight);
      if (s + kLanes <= slots) mass = add(mass, weight);
    }
    float total = sum(mass);
    for (std::int64_t s = slots / kLanes * kLanes; s < slots; ++s) total += scores[h][s];
    const Part part{first.sums + h * stride, first.width};
    part.top() = shift;
    part.mass() = total;
  }
  std::int64_t i = 0;
  for (; i + kChunk * kLanes <= head_dim; i += kChunk * kLanes)
    mix<T, H, kChunk>(scores, values + i, head_dim, slots, 0, first.sums + i, stride);
  for (; i + kLanes <= head_dim; i += kLanes) mix<T, H, 1>(scores, values + i, head_dim, slots, 0, first.sums + i, stride);
  if (i < head_dim) mix<T, H, 1>(scores, values + i, head_dim, slots, head_dim - i, first.sums + i, stride);
}

template <typename T>
void part_of(const float* queries, std::int64_t heads, std::int64_t head_dim, const T* keys, const T* values,
             std::int64_t slots, float scale, const Part& first, std::int64_t stride, const Next<T>& next) {
  static_assert(kHeads == 4, "a case for each number of heads");
  if (heads == 4) return part_of<T, 4>(queries, head_dim, keys, values, slots, scale, first, stride, next);
  if (heads == 3) return part_of<T, 3>(queries, head_dim, keys, values, slots, scale, first, stride, next);
  if (heads == 2) return part_of<T, 2>(queries, head_dim, keys, values, slots, scale, first, stride, next);
  part_of<T, 1>(queries, head_dim, keys, values, slots, scale, first, stride, next);
}

// into = into and part, put together.
void join(const Part& into, const Part& part) {
  const float top = into.top() > part.top() ? into.top() : part.top();
  const float keep = __builtin_expf(into.top() - top), take = __builtin_expf(part.top() - top);
  for (std::int64_t i = 0; i < into.width; i += kLanes)
    store(into.sums + i, fma(load(into.sums + i), all(keep), mul(load(part.sums + i), all(take))));
  into.mass() = into.mass() * keep + part.mass() * take;
  into.top() = top;
}

// The slots that the entry sees: its own and those before it, within the window. Positions rise along a row.
Range seen_by(const Step& step, const Layer& layer, std::int64_t entry) {
  const Entries& e = step.entries;
  std::int64_t low = 0, high = e.slot[entry];
  if (layer.window) {
    const std::int64_t* positions = step.memory.positions + e.row[entry] * step.memory.positions_stride;
    const std::int64_t oldest = e.position[entry] - layer.window + 1;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (positions[middle] < oldest)
        low = middle + 1;
      else
        high = middle;
    }
  }
  return {low, e.slot[entry] + 1};
}

inline std::int64_t entry_of(const Step& step, bool all, std::int64_t i) { return all ? i : step.entries.wanted[i]; }

// Parts that each entry has room for.
std::int64_t room(const Step& step, bool split) {
  std::int64_t most = 1;
  for (std::int64_t e = 0; split && e < step.entries.count; ++e) {
    const std::int64_t parts = parts_of(step.entries.slot[e] + 1);
    if (parts > most) most = parts;
  }
  return most;
}

template <typename T>
void attend(const Step& step, const Layer& layer, bool everybody, bool split, const Member& me) {
  const Decoder& d = *step.decoder;
  const Memory& m = step.memory;
  const std::int64_t count = everybody ? step.entries.count : step.entries.wanted_count;
  const std::int64_t group = d.query_heads / d.kv_heads, floats = part_floats(d.head_dim), width = padded(d.head_dim);
  const std::int64_t most = room(step, split), heads = d.query_heads + 2 * d.kv_heads;
  float scratch[kHeads * (kMostHeadDim + 2)];
  std::int64_t task = 0;
  // Heads outside: the keys and values of one stay in the cache while the entries of a prompt pass over them.
  for (std::int64_t kv = 0; kv < d.kv_heads; ++kv)
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t entry = entry_of(step, everybody, i), row = step.entries.row[entry];
      const Range seen = seen_by(step, layer, entry);
      const std::int64_t at = layer.slot * m.layer_stride + row * m.row_stride + kv * m.head_stride;
      const T* keys = static_cast<const T*>(m.keys) + at;
      const T* values = static_cast<const T*>(m.values) + at;
      // Parts are either in the shared prefix or the row's own.
      const std::int64_t prefix_len = m.prefix_len ? m.prefix_len[row] : 0;
      const std::int64_t lent = prefix_len ? (m.prefix_row[row] - row) * m.row_stride : 0;
      const auto place = [&](std::int64_t slot) { return (slot < prefix_len ? lent : 0) + slot * d.head_dim; };
      const float* queries = step.scratch.qkv + (entry * heads + kv * group) * d.head_dim;
      float* store_at = step.scratch.partials + (i * d.query_heads + kv * group) * most * floats;
      if (!split && task++ % me.count != me.index) continue;
      const bool cold = i == 0 || step.entries.row[entry_of(step, everybody, i - 1)] != row;
      const std::int64_t stride_slots = split ? me.count * kPartSlots : kPartSlots;
      for (std::int64_t begin = seen.begin; begin < seen.end;) {
        const std::int64_t part = begin / kPartSlots, stop = (part + 1) * kPartSlots;
        const std::int64_t end = stop < seen.end ? stop : seen.end;
        if (!split || task++ % me.count == me.index)
          for (std::int64_t h = 0; h < group; h += kHeads) {
            const std::int64_t now = group - h < kHeads ? group - h : kHeads;
            float* home = store_at + h * most * floats + (split ? part * floats : 0);
            const bool fresh = split || begin == seen.begin;
            const Part first{fresh ? home : scratch, width};
            const std::int64_t stride = fresh ? most * floats : width + 2;
            const bool more = cold && h == 0 && begin + stride_slots < seen.end;
            const Next<T> next{cold && h == 0 ? values + place(begin) : nullptr,
                               more ? keys + place(begin + stride_slots) : nullptr};
            part_of(queries + h * d.head_dim, now, d.head_dim, keys + place(begin), values + place(begin), end - begin, d.scale,
                    first, stride, next);
            for (std::int64_t j = 0; !fresh && j < now; ++j)
              join(Part{home + j * most * floats, width}, Part{scratch + j * stride, width});
          }
        begin = end;
      }
    }
}

}  // namespace

void decode_attention(const Step& step, const Layer& layer, bool all, bool split, const Member& me) {
  if (step.decoder->dtype == DType::f32)
    attend<float>(step, layer, all, split, me);
  else
    attend<bf16>(step, layer, all, split, me);
}

void merge_parts(const Step& step, const Layer& layer, bool everybody, bool split, std::int64_t i, float* out) {
  const Decoder& d = *step.decoder;
  const std::int64_t floats = part_floats(d.head_dim), width = padded(d.head_dim), most = room(step, split);
  const Range seen = seen_by(step, layer, entry_of(step, everybody, i));
  const std::int64_t first = split ? seen.begin / kPartSlots : 0, last = split ? (seen.end - 1) / kPartSlots : 0;
  for (std::int64_t head = 0; head < d.query_heads; ++head) {
    float* parts = step.scratch.partials + (i * d.query_heads + head) * most * floats;
    // Several members may merge the same parts, so nothing is written to them.
    float joined[kMostHeadDim + 2];
    std::memcpy(joined, parts + first * floats, floats * sizeof(float));
    for (std::int64_t part = first + 1; part <= last; ++part)
      join(Part{joined, width}, Part{parts + part * floats, width});
    const float scale = 1.0f / joined[width + 1];
    for (std::int64_t j = 0; j < d.head_dim; ++j) out[head * d.head_dim + j] = joined[j] * scale;
  }
}

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
