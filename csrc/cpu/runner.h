// Runner: a decoder with its scratch, and the calls of an engine as steps: extend, run_latent, decode.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "sample.h"

namespace latentmas {

// Rows of a memory that a call goes on from: where each row's next position is stored, and its number.
struct Rows {
  std::vector<std::int64_t> lengths, positions;
};

// Called between steps, on the thread that made the call; may throw to end it.
using Between = std::function<void(std::int64_t step)>;

// How a step's input comes from the step before: realign with W_a (transposed, null is the identity), or of the mean of the
// `likely` most likely tokens' embeddings where that is not 0.
struct Feedback {
  const float* aligner = nullptr;
  float target_norm = 0;
  std::int64_t likely = 0;
};

// How long each row thinks: its own number of steps, one or more, or until the embedding of a step (its second at the
// earliest) has at least the cosine `settle` to that of the step before; above 1 is never.
struct LatentParams {
  std::vector<std::int64_t> steps;
  double settle = 2;
};

struct DecodeParams {
  Sampling sampling;
  std::int64_t max_new_tokens = 0, min_new_tokens = 0;
  std::vector<std::int64_t> ends;
  std::uint8_t* seen = nullptr;  // [B, vocabulary], not 0 where a penalty applies; chosen tokens are marked. Null: no penalty
};

// Calls may come from several threads, and out of `between`: each has a workspace of its own while it runs, and the steps of
// all take turns on the team.
class Runner {
 public:
  // Copies the layers and inv_freq; everything else that the decoder points to stays the caller's.
  Runner(const Decoder& decoder, std::vector<Layer> layers, std::vector<float> inv_freq);

  // Runs counts[b] new positions of row b: tokens[b * columns + t], or embeds (rows of width elements) alike, the last
  // counts[b] of `columns`. Writes each row's last state [B, width] in the model's dtype, or its logits [B, vocabulary];
  // rows that bring nothing are left as they are. Where one of the two is null it is not computed.
  void extend(const Memory& memory, const Rows& rows, const std::vector<std::int64_t>& counts, std::int64_t columns,
              const std::int64_t* tokens, const void* embeds, void* states, float* logits, const Between& between) const;

  // Latent steps: latents [B, longest, width] and each row's last state [B, width] in the model's dtype; `recorded`, like the
  // latents, gets the states behind all steps, where it is not null. What lies behind a row's end is not written. The seed is
  // [B, width], or for soft feedback logits [B, vocabulary] in float32. Returns the steps that each row took.
  std::vector<std::int64_t> run_latent(const Memory& memory, const Rows& rows, const void* seed, const Feedback& feedback,
                                  const LatentParams& how, void* latents, void* states, void* recorded,
                                  const Between& between) const;

  // Text: chooses from logits [B, vocabulary], then steps until all rows have ended or have max_new_tokens. Writes
  // tokens [B, max_new_tokens] at what was chosen. between(n) comes when the n-th tokens are there.
  void decode(const Memory& memory, const Rows& rows, const float* logits, const DecodeParams& how, std::int64_t* tokens,
             const Between& between) const;

  // Bytes of scratch held between calls.
  std::int64_t scratch_bytes() const;

 private:
  struct Workspace {
    std::vector<float> floats, hidden, logits;
  };
  // A workspace for the time of a call.
  class Lent {
   public:
    explicit Lent(const Runner& runner);
    ~Lent();
    Workspace* operator->() const { return workspace_.get(); }
    Workspace& operator*() const { return *workspace_; }

   private:
    const Runner& runner_;
    std::unique_ptr<Workspace> workspace_;
  };

  void run(Step& step, std::int64_t longest, Workspace& workspace) const;
  // The token, or std::out_of_range where the input embedding has no row for it.
  std::int64_t embedded(std::int64_t token) const;

  std::vector<Layer> layers_;
  std::vector<float> inv_freq_;
  Decoder decoder_;
  // Only ever tried, not waited for: in a forked child it may be locked for good.
  mutable std::mutex shelf_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace latentmas
