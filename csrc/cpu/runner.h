// Runner: a model with its scratch, and the calls of an engine as steps: extend, run_latent, decode.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "sample.h"

namespace latentmas {

// A cosine that is never reached: stop_cosine where rows end by their number of steps alone.
constexpr double kNeverCosine = 2;

// Where each row of a KV cache goes on: the slot of its next token, and the position.
struct RowCursor {
  std::vector<std::int64_t> lengths, positions;
};

// Called between steps, on the thread that made the call; may throw to end it.
using StepCallback = std::function<void(std::int64_t step)>;

// The input of a latent step, from the step before: realign with W_a (transposed, null is the identity), or of the mean of
// the embeddings of the soft_top_k most likely tokens where that is not 0.
struct Feedback {
  const float* aligner = nullptr;
  float target_norm = 0;
  std::int64_t soft_top_k = 0;
};

// Latent steps of each row: its own number of steps, one or more, or until the embedding of a step (its second at the earliest)
// has at least the cosine stop_cosine to that of the step before.
struct LatentParams {
  std::vector<std::int64_t> steps;
  double stop_cosine = kNeverCosine;
};

struct DecodeParams {
  Sampling sampling;
  std::int64_t max_new_tokens = 0, min_new_tokens = 0;
  std::vector<std::int64_t> eos_token_ids;
  // [B, vocabulary], not 0 where the repetition penalty applies; chosen tokens are marked. Null: no penalty.
  std::uint8_t* penalty_mask = nullptr;
};

// Calls may come from several threads, and out of `on_step`: each has a workspace of its own while it runs, and the steps of
// all calls take turns on the team.
class Runner {
 public:
  // Copies the layers and inv_freq; everything else that the model points to stays the caller's.
  Runner(const Model& model, std::vector<Layer> layers, std::vector<float> inv_freq);

  // Runs counts[b] new positions of row b: tokens[b * columns + t], or embeds (rows of hidden_size elements) alike, the last
  // counts[b] of `columns`. Writes each row's last state [B, hidden_size] in the model's dtype, or its logits [B, vocabulary];
  // rows without new positions are left as they are. Where one of the two is null it is not computed.
  void extend(const KVCache& cache, const RowCursor& rows, const std::vector<std::int64_t>& counts, std::int64_t columns,
              const std::int64_t* tokens, const void* embeds, void* states, float* logits, const StepCallback& on_step) const;

  // Latent steps. Writes latents [B, longest, hidden_size] and each row's last_hidden [B, hidden_size] in the model's dtype;
  // `states`, shaped as the latents, gets the states behind all steps where it is not null. Nothing is written behind a row's
  // end. The seed is [B, hidden_size], or for soft feedback logits [B, vocabulary] in float32. Returns the steps of each row.
  std::vector<std::int64_t> run_latent(const KVCache& cache, const RowCursor& rows, const void* seed, const Feedback& feedback,
                                       const LatentParams& params, void* latents, void* last_hidden, void* states,
                                       const StepCallback& on_step) const;

  // Text: chooses from logits [B, vocabulary], then steps until all rows have ended or have max_new_tokens. Writes
  // tokens [B, max_new_tokens] as far as they were chosen. on_step(n) is called when the n-th tokens are written.
  void decode(const KVCache& cache, const RowCursor& rows, const float* logits, const DecodeParams& params,
              std::int64_t* tokens, const StepCallback& on_step) const;

  const Model& model() const { return model_; }
  // Bytes of scratch held between calls.
  std::int64_t scratch_bytes() const;

 private:
  struct Workspace {
    std::vector<float> floats, hidden, logits;
  };
  // A workspace for the duration of a call.
  class ScopedWorkspace {
   public:
    explicit ScopedWorkspace(const Runner& runner);
    ~ScopedWorkspace();
    Workspace* operator->() const { return workspace_.get(); }
    Workspace& operator*() const { return *workspace_; }

   private:
    const Runner& runner_;
    std::unique_ptr<Workspace> workspace_;
  };

  void run(DecodeStep& step, std::int64_t longest, Workspace& workspace) const;
  // Returns the token; throws std::out_of_range where the input embedding has no row for it.
  std::int64_t check_embedded(std::int64_t token) const;

  std::vector<Layer> layers_;
  std::vector<float> inv_freq_;
  Model model_;
  // Locked with try_lock only: in a forked child it may be locked for good.
  mutable std::mutex pool_mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> free_workspaces_;
};

}  // namespace latentmas
