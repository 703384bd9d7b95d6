// mix: soft feedback. The mean of the input embeddings of the most likely tokens, weighted by their probabilities among
// themselves; in the model's dtype, as alignment.py has it, in float32 on the way.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace latentmas {
namespace LATENTMAS_ISA {
namespace {

// The largest logits in falling order, and whose they are. Of logits that are all NaN there are none.
struct Likely {
  float logits[kMostLikely];
  std::int64_t tokens[kMostLikely];
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

inline Likely likely_of(const float* logits, std::int64_t vocabulary, std::int64_t most) {
  constexpr std::int64_t kBlock = 4 * kLanes;
  Likely likely;
  std::int64_t i = 0;
  for (; i + kBlock <= vocabulary; i += kBlock) {
    // Few blocks hold one of them, so a block is looked through only where its largest would be one.
    Vec top = load(logits + i);
    for (int j = 1; j < 4; ++j) top = max(top, load(logits + i + j * kLanes));
    if (likely.count == most && !(largest(top) > likely.logits[most - 1])) continue;
    for (std::int64_t j = i; j < i + kBlock; ++j)
      if (logits[j] == logits[j]) likely.take(logits[j], j, most);
  }
  for (; i < vocabulary; ++i)
    if (logits[i] == logits[i]) likely.take(logits[i], i, most);
  return likely;
}

template <typename T>
inline void mix(const float* logits, std::int64_t vocabulary, std::int64_t most, const T* embedding, std::int64_t width,
                float* out) {
  const Likely likely = likely_of(logits, vocabulary, most);
  float weights[kMostLikely], sum = 0;
  for (std::int64_t k = 0; k < likely.count; ++k) sum += weights[k] = __builtin_expf(likely.logits[k] - likely.logits[0]);
  for (std::int64_t i = 0; i < width; ++i) {
    float mean = likely.count ? 0.0f : __builtin_nanf("");
    for (std::int64_t k = 0; k < likely.count; ++k)
      mean += weights[k] / sum * to_float(embedding[likely.tokens[k] * width + i]);
    T rounded;
    from_float(mean, &rounded);
    out[i] = to_float(rounded);
  }
}

}  // namespace
}  // namespace LATENTMAS_ISA
}  // namespace latentmas
