// Runs the CPU steps on small odd sizes with every instruction set and number of threads, against the portable kernels on one
// thread. All memory is as long as it must be and not an element longer, so that the address sanitizer sees what is read or
// written too far. Built by tests/engines/test_sanitizers.py; exit status 0 means that all agree.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu/runner.h"

using namespace latentmas;

namespace {

struct Size {
  std::int64_t query_heads, kv_heads, head_dim, width, intermediate, vocabulary, batch, prompt, window;
};

// A generator of small numbers, the same on every machine.
struct Draw {
  std::uint32_t state = 1;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return (static_cast<float>(state >> 8) / (1 << 24) - 0.5f) * 0.4f;
  }
};

// Elements of a dtype, on the heap by themselves.
struct Values {
  std::unique_ptr<char[]> data;
  Values(std::int64_t count, DType dtype, Draw& draw, float offset = 0) {
    const std::int64_t size = dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1;
    data.reset(new char[count * size]);
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = draw() + offset;
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      const std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
      const std::int8_t quarter = static_cast<std::int8_t>(value * 500);
      if (dtype == DType::f32) std::memcpy(data.get() + i * 4, &value, 4);
      if (dtype == DType::bf16) std::memcpy(data.get() + i * 2, &half, 2);
      if (dtype == DType::i8) std::memcpy(data.get() + i, &quarter, 1);
    }
  }
};

struct TestModel {
  std::vector<Values> kept;
  Model model{};
  std::vector<Layer> layers;
  std::vector<float> inv_freq;

  TestModel(const Size& s, DType dtype, bool int8) {
    Draw draw;
    const auto vector = [&](std::int64_t n, float offset) {
      kept.emplace_back(n, dtype, draw, offset);
      return static_cast<const void*>(kept.back().data.get());
    };
    const auto weight = [&](std::int64_t rows, std::int64_t cols) {
      kept.emplace_back(rows * cols, int8 ? DType::i8 : dtype, draw);
      Weight w{kept.back().data.get(), int8 ? DType::i8 : dtype, rows, cols, nullptr};
      if (int8) {
        kept.emplace_back(rows, DType::f32, draw, 0.3f);
        w.scales = reinterpret_cast<const float*>(kept.back().data.get());
        for (std::int64_t i = 0; i < rows; ++i) const_cast<float*>(w.scales)[i] *= 0.005f;
      }
      return w;
    };
    const std::int64_t qkv = (s.query_heads + 2 * s.kv_heads) * s.head_dim;
    for (int i = 0; i < 2; ++i) {
      Layer layer{};
      layer.input_norm = vector(s.width, 1);
      layer.qkv = weight(qkv, s.width);
      layer.qkv_bias = vector(qkv, 0);
      layer.query_norm = vector(s.head_dim, 1);
      layer.key_norm = vector(s.head_dim, 1);
      layer.output = weight(s.width, s.query_heads * s.head_dim);
      layer.mlp_norm = vector(s.width, 1);
      layer.gate_up = weight(2 * s.intermediate, s.width);
      layer.gate_up_bias = vector(2 * s.intermediate, 0);
      layer.down = weight(s.width, s.intermediate);
      layer.window = i ? s.window : 0;
      layer.slot = i;
      layers.push_back(layer);
    }
    model.dtype = dtype;
    model.hidden_size = s.width;
    model.query_heads = s.query_heads;
    model.kv_heads = s.kv_heads;
    model.head_dim = s.head_dim;
    model.intermediate_size = s.intermediate;
    model.embedding = vector(s.vocabulary * s.width, 0);
    model.embedding_rows = s.vocabulary;
    model.final_norm = vector(s.width, 1);
    model.lm_head = weight(s.vocabulary, s.width);
    model.eps = 1e-5f;
    model.scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
    model.attention_scaling = 1;
    for (std::int64_t i = 0; i < s.head_dim / 2; ++i)
      inv_freq.push_back(std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(s.head_dim)));
  }
};

// Logits behind a prompt of ragged rows and latent steps, and the states after soft feedback; then tokens are decoded.
std::vector<float> run(const Size& s, DType dtype, bool int8) {
  TestModel test(s, dtype, int8);
  Runner runner(test.model, test.layers, test.inv_freq);
  constexpr std::int64_t kSteps = 3, kTokens = 4;
  const std::int64_t slots = s.prompt + 2 * kSteps + 1 + kTokens, size = dtype == DType::f32 ? 4 : 2;
  const std::int64_t layer_stride = s.batch * s.kv_heads * slots * s.head_dim, bytes = 2 * layer_stride * size;
  const std::unique_ptr<char[]> keys(new char[bytes]), values(new char[bytes]);
  std::memset(keys.get(), 0xff, bytes);  // NaN
  std::memset(values.get(), 0xff, bytes);
  const std::unique_ptr<std::int64_t[]> positions(new std::int64_t[s.batch * slots]);
  const KVCache cache{keys.get(),    values.get(), layer_stride, s.kv_heads * slots * s.head_dim, slots * s.head_dim,
                      positions.get(), slots};
  RowCursor rows;
  std::vector<std::int64_t> counts, ids(s.batch * s.prompt, -1), one(s.batch, 1), next(s.batch, 2);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    rows.lengths.push_back(0);
    rows.positions.push_back(0);
    counts.push_back(b % 2 ? 1 + b % s.prompt : s.prompt);
    for (std::int64_t t = s.prompt - counts[b]; t < s.prompt; ++t) ids[b * s.prompt + t] = (7 * b + 3 * t) % s.vocabulary;
  }
  const auto advance = [&](const std::vector<std::int64_t>& by) {
    for (std::int64_t b = 0; b < s.batch; ++b) rows.lengths[b] += by[b], rows.positions[b] += by[b];
  };
  const std::unique_ptr<char[]> state(new char[s.batch * s.width * size]), last(new char[s.batch * s.width * size]);
  const std::unique_ptr<char[]> latents(new char[s.batch * kSteps * s.width * size]);
  const std::unique_ptr<float[]> logits(new float[s.batch * s.vocabulary]);
  Draw draw;
  const Values aligner(s.width * s.width, DType::f32, draw);
  runner.extend(cache, rows, counts, s.prompt, ids.data(), nullptr, state.get(), nullptr, {});
  advance(counts);
  const Feedback mapped{reinterpret_cast<const float*>(aligner.data.get()), 1.5f, 0}, soft{nullptr, 1.5f, 10};
  // Rows end by themselves, some because their embeddings have converged.
  LatentParams latent_params;
  for (std::int64_t b = 0; b < s.batch; ++b) latent_params.steps.push_back(1 + b % kSteps);
  latent_params.stop_cosine = 0.5f;
  const std::unique_ptr<char[]> states(new char[s.batch * kSteps * s.width * size]);
  advance(runner.run_latent(cache, rows, state.get(), mapped, latent_params, latents.get(), last.get(), states.get(), {}));
  runner.extend(cache, rows, one, 1, next.data(), nullptr, nullptr, logits.get(), {});
  advance(one);
  std::vector<float> result(logits.get(), logits.get() + s.batch * s.vocabulary);
  latent_params.stop_cosine = kNeverCosine;
  advance(runner.run_latent(cache, rows, logits.get(), soft, latent_params, latents.get(), last.get(), nullptr, {}));
  if (dtype == DType::f32) {  // in bf16 another token may come among the ten most likely
    const float* last_states = reinterpret_cast<const float*>(last.get());
    result.insert(result.end(), last_states, last_states + s.batch * s.width);
  }
  DecodeParams how;
  how.sampling = {true, 0.9f, 5, 0.8f, 42};
  how.max_new_tokens = kTokens;
  how.eos_token_ids = {1, 2};
  const std::unique_ptr<std::int64_t[]> tokens(new std::int64_t[s.batch * kTokens]);
  runner.decode(cache, rows, logits.get(), how, tokens.get(), {});
  return result;
}

}  // namespace

int main() {
  // Heads, sizes and batches that vectors and tiles do not divide; a prompt that is run in several parts.
  const Size sizes[] = {
      {4, 2, 16, 48, 80, 97, 3, 9, 0},   {3, 1, 8, 33, 17, 50, 7, 5, 4},   {8, 1, 64, 65, 40, 31, 2, 70, 0},
      {5, 5, 24, 16, 161, 19, 19, 3, 2}, {2, 1, 128, 40, 33, 23, 1, 300, 100},
  };
  int wrong = 0;
  for (const Size& size : sizes)
    for (const auto& [dtype, int8] : {std::pair(DType::f32, false), {DType::bf16, false}, {DType::bf16, true}}) {
      setenv("LATENTMAS_ISA", "portable", 1);
      setenv("LATENTMAS_NUM_THREADS", "1", 1);
      const std::vector<float> want = run(size, dtype, int8);
      std::istringstream isas(available_isas());
      for (std::string isa; isas >> isa;)
        for (const char* threads : {"1", "2", "3"}) {
          setenv("LATENTMAS_ISA", isa.c_str(), 1);
          setenv("LATENTMAS_NUM_THREADS", threads, 1);
          const std::vector<float> got = run(size, dtype, int8);
          double error = 0, norm = 0;
          for (std::size_t i = 0; i < want.size(); ++i) {
            error += std::pow(got[i] - want[i], 2);
            norm += std::pow(want[i], 2);
          }
          const double relative = std::sqrt(error / norm), limit = dtype == DType::f32 ? 1e-4 : 0.05;
          if (!(relative < limit)) {
            std::printf("%s, %s threads, width %ld: relative error %g\n", isa.c_str(), threads, static_cast<long>(size.width),
                        relative);
            ++wrong;
          }
        }
    }
  std::printf("%s\n", wrong ? "wrong" : "all agree");
  return wrong ? 1 : 0;
}
