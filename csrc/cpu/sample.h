// sample: the next token of a row from its logits; ops/sample.py has the formulas.
#pragma once

#include <cstdint>
#include <vector>

namespace latentmas {

struct Sampling {
  bool draw = false;  // else the most likely token
  float temperature = 1.0f;
  std::int64_t top_k = 0;  // 0 is off
  float top_p = 1.0f;
  std::uint64_t seed = 0;
};

// The token of one row. Throws std::invalid_argument where no logit is finite. `counter` numbers the random draws of one seed. suppressed tokens are not chosen. `scratch` is
// reused between calls.
std::int64_t sample(const float* logits, std::int64_t vocabulary, const Sampling& how, std::uint32_t counter,
                    const std::vector<std::int64_t>& suppressed, std::vector<float>& scratch);

}  // namespace latentmas
