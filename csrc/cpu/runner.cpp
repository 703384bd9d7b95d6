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

// bf16 and back; the kernels have their own, compiled for their instruction set.
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
// latentmas_kernels/engines/thinking.py has the same.
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

// Entries as vectors that can be filled.
struct Listed {
  std::vector<std::int64_t> row, slot, position, wanted;

  void add(std::int64_t r, const Rows& rows, std::int64_t offset) {
    row.push_back(r);
    slot.push_back(rows.lengths[r] + offset);
    position.push_back(rows.positions[r] + offset);
  }
  Entries entries() const {
    return {static_cast<std::int64_t>(row.size()), row.data(), slot.data(), position.data(),
            static_cast<std::int64_t>(wanted.size()), wanted.data()};
  }
  std::int64_t longest() const { return slot.empty() ? 0 : *std::max_element(slot.begin(), slot.end()) + 1; }
};

}  // namespace

Runner::Runner(const Decoder& decoder, std::vector<Layer> layers, std::vector<float> inv_freq)
    : layers_(std::move(layers)), inv_freq_(std::move(inv_freq)), decoder_(decoder) {
  decoder_.layers = layers_.data();
  decoder_.layer_count = static_cast<std::int64_t>(layers_.size());
  decoder_.inv_freq = inv_freq_.data();
}

Runner::Lent::Lent(const Runner& runner) : runner_(runner) {
  const std::unique_lock<std::mutex> shelf(runner.shelf_, std::try_to_lock);
  if (shelf && !runner.idle_.empty()) {
    workspace_ = std::move(runner.idle_.back());
    runner.idle_.pop_back();
  } else {
    workspace_ = std::make_unique<Workspace>();
  }
}

Runner::Lent::~Lent() {
  const std::unique_lock<std::mutex> shelf(runner_.shelf_, std::try_to_lock);
  if (shelf) runner_.idle_.push_back(std::move(workspace_));
}

std::int64_t Runner::scratch_bytes() const {
  const std::unique_lock<std::mutex> shelf(shelf_, std::try_to_lock);
  std::size_t floats = 0;
  if (shelf)
    for (const auto& w : idle_) floats += w->floats.size() + w->hidden.size() + w->logits.size();
  return static_cast<std::int64_t>(floats * sizeof(float));
}

std::int64_t Runner::embedded(std::int64_t token) const {
  if (token < 0 || token >= decoder_.embedding_rows)
    throw std::out_of_range("token " + std::to_string(token) + " has no row in the input embedding, which has " +
                            std::to_string(decoder_.embedding_rows) + ": use token ids, a padding token and an lm_head of that size");
  return token;
}

void Runner::run(Step& step, std::int64_t longest, Workspace& workspace) const {
  const Decoder& d = decoder_;
  const int threads = team_size();
  const std::int64_t entries = step.entries.count;
  const bool split = splits_attention(entries, d.kv_heads, threads);
  const std::int64_t widest = std::max({d.width, d.query_heads * d.head_dim, d.intermediate});
  const std::int64_t rows = (entries + 15) / 16 * 16;  // tiles hold 16
  Scratch scratch{};
  std::vector<float>& floats = workspace.floats;
  struct Part {
    float** start;
    std::int64_t floats;
  };
  const Part parts[] = {
      {&scratch.x, entries * d.width},
      {&scratch.rows, rows * padded(widest)},
      {&scratch.qkv, entries * (d.query_heads + 2 * d.kv_heads) * d.head_dim},
      {&scratch.activated, entries * d.intermediate},
      {&scratch.rotary, entries * d.head_dim},
      {&scratch.partials, entries * d.query_heads * part_floats(d.head_dim) * (split ? parts_of(longest) : 1)},
      {&scratch.operand, rows * padded(widest)},
      {&scratch.own, threads * own_floats(widest)},
      {&scratch.products, entries * d.width},
  };
  constexpr std::int64_t kLine = 16;  // floats of a cache line: parts of two threads do not share one
  std::int64_t total = kLine;
  for (const Part& part : parts) total += (part.floats + kLine - 1) / kLine * kLine;
  if (static_cast<std::int64_t>(floats.size()) < total) floats = std::vector<float>(total);
  float* next = floats.data();
  while (reinterpret_cast<std::uintptr_t>(next) % 64) ++next;
  for (const Part& part : parts) {
    *part.start = next;
    next += (part.floats + kLine - 1) / kLine * kLine;
  }
  scratch.own_stride = own_floats(widest);
  step.decoder = &decoder_;
  step.scratch = scratch;
  struct Argument {
    const Step& step;
    const Kernels& kernels;
  } argument{step, active()};
  run_on_team(
      [](const void* given, const Member& me) {
        const Argument& a = *static_cast<const Argument*>(given);
        a.kernels.step(a.step, me);
      },
      &argument, threads);
}

void Runner::extend(const Memory& memory, const Rows& rows, const std::vector<std::int64_t>& counts, std::int64_t columns,
                    const std::int64_t* tokens, const void* embeds, void* states, float* logits, const Between& between) const {
  const Lent workspace(*this);
  std::vector<float>&hidden = workspace->hidden, &spoken = workspace->logits;
  const std::int64_t batch = static_cast<std::int64_t>(counts.size()), width = decoder_.width;
  const std::int64_t vocabulary = decoder_.lm_head.rows, most = active().prefill_entries;
  Listed listed;
  std::vector<std::int64_t> ids, owners;
  std::vector<const void*> places;
  std::int64_t chunk = 0;
  const auto flush = [&] {
    if (listed.row.empty()) return;
    const std::int64_t wanted = static_cast<std::int64_t>(listed.wanted.size());
    hidden.resize(std::max<std::size_t>(hidden.size(), std::max<std::int64_t>(wanted, 1) * width));
    if (logits) spoken.resize(std::max<std::size_t>(spoken.size(), wanted * vocabulary));
    Step step{};
    step.memory = memory;
    step.entries = listed.entries();
    step.tokens = tokens ? ids.data() : nullptr;
    step.embeds = places.data();
    step.hidden = hidden.data();
    step.logits = logits ? spoken.data() : nullptr;
    if (between) between(chunk++);
    run(step, listed.longest(), *workspace);
    for (std::int64_t i = 0; i < wanted; ++i) {
      if (states) narrow(hidden.data() + i * width, decoder_.dtype, width, at(states, owners[i] * width, decoder_.dtype));
      if (logits) std::copy_n(spoken.data() + i * vocabulary, vocabulary, logits + owners[i] * vocabulary);
    }
    listed = {};
    ids.clear(), owners.clear(), places.clear();
  };
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t t = 0; t < counts[b]; ++t) {
      const std::int64_t given = b * columns + columns - counts[b] + t;
      listed.add(b, rows, t);
      if (tokens)
        ids.push_back(embedded(tokens[given]));
      else
        places.push_back(at(embeds, given * width, decoder_.dtype));
      if (t + 1 == counts[b]) {
        listed.wanted.push_back(static_cast<std::int64_t>(listed.row.size()) - 1);
        owners.push_back(b);
      }
      if (static_cast<std::int64_t>(listed.row.size()) == most) flush();
    }
  flush();
}

std::vector<std::int64_t> Runner::run_latent(const Memory& memory, const Rows& rows, const void* seed, const Feedback& feedback,
                                        const LatentParams& how, void* latents, void* states, void* recorded,
                                        const Between& between) const {
  const Lent workspace(*this);
  std::vector<float>&hidden = workspace->hidden, &logits = workspace->logits;
  const std::int64_t batch = static_cast<std::int64_t>(rows.lengths.size()), width = decoder_.width;
  const std::int64_t vocabulary = decoder_.lm_head.rows, longest = *std::max_element(how.steps.begin(), how.steps.end());
  const DType dtype = decoder_.dtype;
  hidden.resize(std::max<std::size_t>(hidden.size(), batch * width));
  if (feedback.likely) {
    const std::size_t count = batch * vocabulary;
    logits.resize(std::max(logits.size(), count));
    std::copy_n(static_cast<const float*>(seed), count, logits.data());
  } else {
    widen(seed, dtype, batch * width, hidden.data());
  }
  std::vector<std::int64_t> active = numbers(batch), taken(batch, 0);
  std::vector<float> now(width), before(width);
  const std::unique_ptr<char[]> fed(new char[batch * width * size_of(dtype)]);
  for (std::int64_t i = 0; i < longest && !active.empty(); ++i) {
    if (between) between(i);
    Listed listed;
    for (const std::int64_t b : active) listed.add(b, rows, i);
    listed.wanted = numbers(static_cast<std::int64_t>(active.size()));
    Step step{};
    step.memory = memory;
    step.entries = listed.entries();
    step.aligner = feedback.aligner;
    step.target_norm = feedback.target_norm;
    step.latents = fed.get();
    step.latents_stride = width;
    step.hidden = hidden.data();
    if (feedback.likely) {
      step.seeds = logits.data();
      step.likely = feedback.likely;
      if (i + 1 < longest) step.logits = logits.data();
    }
    run(step, listed.longest(), *workspace);
    // Rows that have ended leave; the others move together.
    std::size_t left = 0;
    for (std::size_t n = 0; n < active.size(); ++n) {
      const std::int64_t b = active[n], at_step = (b * longest + i) * width;
      const float* state = hidden.data() + n * width;
      std::memcpy(at(latents, at_step, dtype), at(fed.get(), n * width, dtype), width * size_of(dtype));
      if (recorded) narrow(state, dtype, width, at(recorded, at_step, dtype));
      taken[b] = i + 1;
      bool ends = i + 1 == how.steps[b];
      if (!ends && i && how.settle <= 1) {
        widen(at(latents, at_step, dtype), dtype, width, now.data());
        widen(at(latents, at_step - width, dtype), dtype, width, before.data());
        ends = cosine(now, before) >= how.settle;
      }
      if (ends) {
        narrow(state, dtype, width, at(states, b * width, dtype));
        continue;
      }
      if (left != n) {
        std::copy_n(state, width, hidden.data() + left * width);
        if (feedback.likely) std::copy_n(logits.data() + n * vocabulary, vocabulary, logits.data() + left * vocabulary);
      }
      active[left++] = b;
    }
    active.resize(left);
  }
  return taken;
}

void Runner::decode(const Memory& memory, const Rows& rows, const float* logits, const DecodeParams& how, std::int64_t* tokens,
                   const Between& between) const {
  const Lent workspace(*this);
  std::vector<float>&hidden = workspace->hidden, &spoken = workspace->logits;
  const std::int64_t batch = static_cast<std::int64_t>(rows.lengths.size()), vocabulary = decoder_.lm_head.rows;
  hidden.resize(std::max<std::size_t>(hidden.size(), batch * decoder_.width));
  spoken.resize(std::max<std::size_t>(spoken.size(), batch * vocabulary));
  std::vector<std::int64_t> active = numbers(batch), chosen;
  std::vector<float> scratch;
  const std::vector<std::int64_t> none;
  for (std::int64_t n = 0; n < how.max_new_tokens; ++n) {
    // The rows that go on, and what they go on with.
    Listed listed;
    chosen.clear();
    std::vector<std::int64_t> going;
    for (std::size_t i = 0; i < active.size(); ++i) {
      const std::int64_t b = active[i];
      const float* row = n ? spoken.data() + static_cast<std::int64_t>(i) * vocabulary : logits + b * vocabulary;
      // One number per draw and row of the batch, whichever rows have ended before it.
      const std::uint32_t counter = static_cast<std::uint32_t>(n * 65536 + b);
      std::uint8_t* seen = how.seen ? how.seen + b * vocabulary : nullptr;
      const std::int64_t token =
          sample(row, vocabulary, how.sampling, counter, n < how.min_new_tokens ? how.ends : none, seen, scratch);
      if (seen) seen[token] = 1;
      tokens[b * how.max_new_tokens + n] = token;
      if (std::find(how.ends.begin(), how.ends.end(), token) != how.ends.end()) continue;
      going.push_back(b);
      if (n + 1 < how.max_new_tokens) chosen.push_back(embedded(token));
      listed.add(b, rows, n);
    }
    if (between) between(n);
    if (going.empty() || n + 1 == how.max_new_tokens) return;
    active = going;
    listed.wanted = numbers(static_cast<std::int64_t>(active.size()));
    Step step{};
    step.memory = memory;
    step.entries = listed.entries();
    step.tokens = chosen.data();
    step.hidden = hidden.data();
    step.logits = spoken.data();
    run(step, listed.longest(), *workspace);
  }
}

}  // namespace latentmas
