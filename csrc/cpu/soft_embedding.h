// soft_embedding: soft feedback. The mean of the input embeddings of the most likely tokens, weighted by their probabilities
// among themselves; rounded to the model's dtype as in alignment.py, computed in float32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// The largest logits in falling order, and their tokens. Of logits that are all NaN there are none.
struct TopTokens {
  float logits[kMaxSoftTokens];
  std::int64_t tokens[kMaxSoftTokens];
  std::int64_t count = 0;

  void take(float logit, std::int64_t token, std::int64_t most) {
    if (count == most && !(logit > logits[count - 1])) return;
    std::int64_t at = count < most ? count++ : count - 1;
    for (; at > 0 && logits[at - 1] < logit; --at) {
      logits[at] = logits[at - 1];
      tokens[at] = tokens[at - 1];
    }
    logits[at] = logit;
    tokens[at] = token;
  }
};

inline TopTokens top_tokens_of(const float* logits, std::int64_t vocabulary, std::int64_t most) {
  constexpr std::int64_t kBlock = 4 * kLanes;
  TopTokens top;
  std::int64_t i = 0;
  for (; i + kBlock <= vocabulary; i += kBlock) {
    // Few blocks hold one of the largest logits, so a block is searched only where its maximum would be one.
    Vec maxima = load(logits + i);
    for (int j = 1; j < 4; ++j) maxima = max(maxima, load(logits + i + j * kLanes));
    if (top.count == most && !(largest(maxima) > top.logits[most - 1])) continue;
    for (std::int64_t j = i; j < i + kBlock; ++j)
      if (logits[j] == logits[j]) top.take(logits[j], j, most);
  }
  for (; i < vocabulary; ++i)
    if (logits[i] == logits[i]) top.take(logits[i], i, most);
  return top;
}

template <typename T>
inline void soft_embedding(const float* logits, std::int64_t vocabulary, std::int64_t most, const T* embedding,
                           std::int64_t width, float* out) {
  const TopTokens top = top_tokens_of(logits, vocabulary, most);
  float weights[kMaxSoftTokens], sum = 0;
  for (std::int64_t k = 0; k < top.count; ++k) sum += weights[k] = __builtin_expf(top.logits[k] - top.logits[0]);
  for (std::int64_t i = 0; i < width; ++i) {
    float mean = top.count ? 0.0f : __builtin_nanf("");
    for (std::int64_t k = 0; k < top.count; ++k)
      mean += weights[k] / sum * to_float(embedding[top.tokens[k] * width + i]);
    T rounded;
    from_float(mean, &rounded);
    out[i] = to_float(rounded);
  }
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
