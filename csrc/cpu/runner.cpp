#include "runner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

namespace latentmas {
namespace {

std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

std::vector<std::int64_t> numbers(std::int64_t count) {
  std::vector<std::int64_t> all(count);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// bf16 to float32 and back; the kernels have functions of their own, compiled for their instruction set.
void widen(const void* from, DType dtype, std::int64_t n, float* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(from)[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

void narrow(const float* from, DType dtype, std::int64_t n, void* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    static_cast<std::uint16_t*>(to)[i] =
        from[i] != from[i] ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

char* at(void* data, std::int64_t element, DType dtype) { return static_cast<char*>(data) + element * size_of(dtype); }
const char* at(const void* data, std::int64_t element, DType dtype) {
  return static_cast<const char*>(data) + element * size_of(dtype);
}

// 0 where one of them is zero, NaN where one holds NaN; of the same bits exactly 1, since the root of a square is exact.
// `cosine` of latentmas_kernels/engines/base.py is the same.
double cosine(const std::vector<float>& a, const std::vector<float>& b) {
  double both = 0, of_a = 0, of_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    both += static_cast<double>(a[i]) * b[i];
    of_a += static_cast<double>(a[i]) * a[i];
    of_b += static_cast<double>(b[i]) * b[i];
  }
  const double size = std::sqrt(of_a * of_b), cosine = size == 0 ? 0 : both / size;
  return cosine < -1 ? -1 : cosine;
}

// A TokenBatch that grows token by token.
struct BatchBuilder {
  std::vector<std::int64_t> row, slot, position, output_rows;

  void add(std::int64_t r, const RowCursor& rows, std::int64_t offset) {
    row.push_back(r);
    slot.push_back(rows.lengths[r] + offset);
    position.push_back(rows.positions[r] + offset);
  }
  TokenBatch token_batch() const {
    return {static_cast<std::int64_t>(row.size()), row.data(), slot.data(), position.data(),
            static_cast<std::int64_t>(output_rows.size()), output_rows.data()};
  }
  std::int64_t longest() const { return slot.empty() ? 0 : *std::max_element(slot.begin(), slot.end()) + 1; }
};

}  // namespace

Runner::Runner(const Model& model, std::vector<Layer> layers, std::vector<float> inv_freq)
    : layers_(std::move(layers)), inv_freq_(std::move(inv_freq)), model_(model) {
  model_.layers = layers_.data();
  model_.layer_count = static_cast<std::int64_t>(layers_.size());
  model_.inv_freq = inv_freq_.data();
}

Runner::ScopedWorkspace::ScopedWorkspace(const Runner& runner) : runner_(runner) {
  const std::unique_lock<std::mutex> pool_lock(runner.pool_mutex_, std::try_to_lock);
  if (pool_lock && !runner.free_workspaces_.empty()) {
    workspace_ = std::move(runner.free_workspaces_.back());
    runner.free_workspaces_.pop_back();
  } else {
    workspace_ = std::make_unique<Workspace>();
  }
}

Runner::ScopedWorkspace::~ScopedWorkspace() {
  const std::unique_lock<std::mutex> pool_lock(runner_.pool_mutex_, std::try_to_lock);
  if (pool_lock) runner_.free_workspaces_.push_back(std::move(workspace_));
}

std::int64_t Runner::scratch_bytes() const {
  const std::unique_lock<std::mutex> pool_lock(pool_mutex_, std::try_to_lock);
  std::size_t floats = 0;
  if (pool_lock)
    for (const auto& w : free_workspaces_) floats += w->floats.size() + w->hidden.size() + w->logits.size();
  return static_cast<std::int64_t>(floats * sizeof(float));
}

std::int64_t Runner::check_embedded(std::int64_t token) const {
  if (token < 0 || token >= model_.embedding_rows)
    throw std::out_of_range("token " + std::to_string(token) + " has no row in the input embedding, which has " +
                            std::to_string(model_.embedding_rows) +
                            ": use token ids, a padding token and an lm_head of that size");
  return token;
}

void Runner::run(DecodeStep& step, std::int64_t longest, Workspace& workspace) const {
  const Model& model = model_;
  const int threads = team_size();
  const std::int64_t tokens = step.batch.count;
  const bool split = splits_attention(tokens, model.kv_heads, threads);
  const std::int64_t widest = std::max({model.hidden_size, model.query_heads * model.head_dim, model.intermediate_size});
  const std::int64_t rows = (tokens + 15) / 16 * 16;  // tiles hold 16
  Scratch scratch{};
  std::vector<float>& floats = workspace.floats;
  struct Region {
    float** start;
    std::int64_t floats;
  };
  const Region regions[] = {
      {&scratch.x, tokens * model.hidden_size},
      {&scratch.rows, rows * padded(widest)},
      {&scratch.qkv, tokens * (model.query_heads + 2 * model.kv_heads) * model.head_dim},
      {&scratch.activated, tokens * model.intermediate_size},
      {&scratch.rotary, tokens * model.head_dim},
      {&scratch.kv_splits,
       tokens * model.query_heads * kv_split_floats(model.head_dim) * (split ? kv_splits_of(longest) : 1)},
      {&scratch.operand, rows * padded(widest)},
      {&scratch.thread_scratch, threads * thread_scratch_floats(widest)},
      {&scratch.products, tokens * model.hidden_size},
  };
  constexpr std::int64_t kLine = 16;  // floats of a cache line: two regions do not share one
  std::int64_t total = kLine;
  for (const Region& region : regions) total += (region.floats + kLine - 1) / kLine * kLine;
  if (static_cast<std::int64_t>(floats.size()) < total) floats = std::vector<float>(total);
  float* next = floats.data();
  while (reinterpret_cast<std::uintptr_t>(next) % 64) ++next;
  for (const Region& region : regions) {
    *region.start = next;
    next += (region.floats + kLine - 1) / kLine * kLine;
  }
  scratch.thread_scratch_stride = thread_scratch_floats(widest);
  step.model = &model_;
  step.scratch = scratch;
  struct Argument {
    const DecodeStep& step;
    const Kernels& kernels;
  } argument{step, active()};
  parallel_run(
      [](const void* given, const Worker& worker) {
        const Argument& a = *static_cast<const Argument*>(given);
        a.kernels.step(a.step, worker);
      },
      &argument, threads);
}

void Runner::extend(const KVCache& cache, const RowCursor& rows, const std::vector<std::int64_t>& counts, std::int64_t columns,
                    const std::int64_t* tokens, const void* embeds, void* states, float* logits,
                    const StepCallback& on_step) const {
  const ScopedWorkspace workspace(*this);
  std::vector<float>&hidden = workspace->hidden, &step_logits = workspace->logits;
  const std::int64_t batch = static_cast<std::int64_t>(counts.size()), width = model_.hidden_size;
  const std::int64_t vocabulary = model_.lm_head.rows, most = active().prefill_tokens;
  BatchBuilder builder;
  std::vector<std::int64_t> ids, output_of;
  std::vector<const void*> embed_rows;
  std::int64_t chunk = 0;
  const auto flush = [&] {
    if (builder.row.empty()) return;
    const std::int64_t outputs = static_cast<std::int64_t>(builder.output_rows.size());
    hidden.resize(std::max<std::size_t>(hidden.size(), std::max<std::int64_t>(outputs, 1) * width));
    if (logits) step_logits.resize(std::max<std::size_t>(step_logits.size(), outputs * vocabulary));
    DecodeStep step{};
    step.cache = cache;
    step.batch = builder.token_batch();
    step.token_ids = tokens ? ids.data() : nullptr;
    step.embeds = embed_rows.data();
    step.hidden = hidden.data();
    step.logits = logits ? step_logits.data() : nullptr;
    if (on_step) on_step(chunk++);
    run(step, builder.longest(), *workspace);
    for (std::int64_t i = 0; i < outputs; ++i) {
      if (states) narrow(hidden.data() + i * width, model_.dtype, width, at(states, output_of[i] * width, model_.dtype));
      if (logits) std::copy_n(step_logits.data() + i * vocabulary, vocabulary, logits + output_of[i] * vocabulary);
    }
    builder = {};
    ids.clear(), output_of.clear(), embed_rows.clear();
  };
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t t = 0; t < counts[b]; ++t) {
      const std::int64_t given = b * columns + columns - counts[b] + t;
      builder.add(b, rows, t);
      if (tokens)
        ids.push_back(check_embedded(tokens[given]));
      else
        embed_rows.push_back(at(embeds, given * width, model_.dtype));
      if (t + 1 == counts[b]) {
        builder.output_rows.push_back(static_cast<std::int64_t>(builder.row.size()) - 1);
        output_of.push_back(b);
      }
      if (static_cast<std::int64_t>(builder.row.size()) == most) flush();
    }
  flush();
}

std::vector<std::int64_t> Runner::run_latent(const KVCache& cache, const RowCursor& rows, const void* seed,
                                             const Feedback& feedback, const LatentParams& params, void* latents,
                                             void* last_hidden, void* states, const StepCallback& on_step) const {
  const ScopedWorkspace workspace(*this);
  std::vector<float>&hidden = workspace->hidden, &logits = workspace->logits;
  const std::int64_t batch = static_cast<std::int64_t>(rows.lengths.size()), width = model_.hidden_size;
  const std::int64_t vocabulary = model_.lm_head.rows, longest = *std::max_element(params.steps.begin(), params.steps.end());
  const DType dtype = model_.dtype;
  hidden.resize(std::max<std::size_t>(hidden.size(), batch * width));
  if (feedback.soft_top_k) {
    const std::size_t count = batch * vocabulary;
    logits.resize(std::max(logits.size(), count));
    std::copy_n(static_cast<const float*>(seed), count, logits.data());
  } else {
    widen(seed, dtype, batch * width, hidden.data());
  }
  std::vector<std::int64_t> active = numbers(batch), steps_taken(batch, 0);
  std::vector<float> now(width), before(width);
  const std::unique_ptr<char[]> step_latents(new char[batch * width * size_of(dtype)]);
  for (std::int64_t i = 0; i < longest && !active.empty(); ++i) {
    if (on_step) on_step(i);
    BatchBuilder builder;
    for (const std::int64_t b : active) builder.add(b, rows, i);
    builder.output_rows = numbers(static_cast<std::int64_t>(active.size()));
    DecodeStep step{};
    step.cache = cache;
    step.batch = builder.token_batch();
    step.aligner = feedback.aligner;
    step.target_norm = feedback.target_norm;
    step.latents = step_latents.get();
    step.latents_stride = width;
    step.hidden = hidden.data();
    if (feedback.soft_top_k) {
      step.soft_logits = logits.data();
      step.soft_top_k = feedback.soft_top_k;
      if (i + 1 < longest) step.logits = logits.data();
    }
    run(step, builder.longest(), *workspace);
    // Rows that have ended leave the batch; the others move together.
    std::size_t left = 0;
    for (std::size_t n = 0; n < active.size(); ++n) {
      const std::int64_t b = active[n], at_step = (b * longest + i) * width;
      const float* state = hidden.data() + n * width;
      std::memcpy(at(latents, at_step, dtype), at(step_latents.get(), n * width, dtype), width * size_of(dtype));
      if (states) narrow(state, dtype, width, at(states, at_step, dtype));
      steps_taken[b] = i + 1;
      bool ends = i + 1 == params.steps[b];
      if (!ends && i && params.stop_cosine <= 1) {
        widen(at(latents, at_step, dtype), dtype, width, now.data());
        widen(at(latents, at_step - width, dtype), dtype, width, before.data());
        ends = cosine(now, before) >= params.stop_cosine;
      }
      if (ends) {
        narrow(state, dtype, width, at(last_hidden, b * width, dtype));
        continue;
      }
      if (left != n) {
        std::copy_n(state, width, hidden.data() + left * width);
        if (feedback.soft_top_k) std::copy_n(logits.data() + n * vocabulary, vocabulary, logits.data() + left * vocabulary);
      }
      active[left++] = b;
    }
    active.resize(left);
  }
  return steps_taken;
}

void Runner::decode(const KVCache& cache, const RowCursor& rows, const float* logits, const DecodeParams& params,
                    std::int64_t* tokens, const StepCallback& on_step) const {
  const ScopedWorkspace workspace(*this);
  std::vector<float>&hidden = workspace->hidden, &step_logits = workspace->logits;
  const std::int64_t batch = static_cast<std::int64_t>(rows.lengths.size()), vocabulary = model_.lm_head.rows;
  hidden.resize(std::max<std::size_t>(hidden.size(), batch * model_.hidden_size));
  step_logits.resize(std::max<std::size_t>(step_logits.size(), batch * vocabulary));
  std::vector<std::int64_t> active = numbers(batch), chosen;
  std::vector<float> scratch;
  const std::vector<std::int64_t> none;
  for (std::int64_t n = 0; n < params.max_new_tokens; ++n) {
    // The rows that go on, with their tokens.
    BatchBuilder builder;
    chosen.clear();
    std::vector<std::int64_t> still_active;
    for (std::size_t i = 0; i < active.size(); ++i) {
      const std::int64_t b = active[i];
      const float* row = n ? step_logits.data() + static_cast<std::int64_t>(i) * vocabulary : logits + b * vocabulary;
      // One number per draw and row of the batch, whichever rows have ended before it.
      const std::uint32_t counter = static_cast<std::uint32_t>(n * 65536 + b);
      std::uint8_t* penalty_mask = params.penalty_mask ? params.penalty_mask + b * vocabulary : nullptr;
      const std::int64_t token =
          sample(row, vocabulary, params.sampling, counter, n < params.min_new_tokens ? params.eos_token_ids : none,
                 penalty_mask, scratch);
      if (penalty_mask) penalty_mask[token] = 1;
      tokens[b * params.max_new_tokens + n] = token;
      if (std::find(params.eos_token_ids.begin(), params.eos_token_ids.end(), token) != params.eos_token_ids.end()) continue;
      still_active.push_back(b);
      if (n + 1 < params.max_new_tokens) chosen.push_back(check_embedded(token));
      builder.add(b, rows, n);
    }
    if (on_step) on_step(n);
    if (still_active.empty() || n + 1 == params.max_new_tokens) return;
    active = still_active;
    builder.output_rows = numbers(static_cast<std::int64_t>(active.size()));
    DecodeStep step{};
    step.cache = cache;
    step.batch = builder.token_batch();
    step.token_ids = chosen.data();
    step.hidden = hidden.data();
    step.logits = step_logits.data();
    run(step, builder.longest(), *workspace);
  }
}

}  // namespace latentmas
