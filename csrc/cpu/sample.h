// sample: the next token of a row from its logits; ops/sample.py has the formulas.
#pragma once

#include <cstdint>
#include <vector>

namespace latentmas {

struct Sampling {
  bool do_sample = false;  // else the most likely token
  float temperature = 1.0f;
  std::int64_t top_k = 0;  // 0 is off
  float top_p = 1.0f;
  float min_p = 0.0f;    // least share of the most likely token's probability; 0 is off
  float repetition_penalty = 1.0f;  // on logits before all else; 1 is off
  std::uint64_t seed = 0;
};

// Returns the token of one row. Throws std::invalid_argument where no logit is finite. `counter` numbers the random draws of
// one seed. Suppressed tokens are not chosen; those whose byte in penalty_mask [vocabulary] is not 0 are penalised (null: none
// are). `scratch` is reused between calls.
std::int64_t sample(const float* logits, std::int64_t vocabulary, const Sampling& how, std::uint32_t counter,
                    const std::vector<std::int64_t>& suppressed, const std::uint8_t* penalty_mask, std::vector<float>& scratch);

}  // namespace latentmas
