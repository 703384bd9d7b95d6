// The border to Python. It takes torch tensors and small structs, and checks dtype, shape, strides and device of every tensor
// (tensor.h): an argument that does not fit raises a LatentMASError that names it. So does every std::invalid_argument.
#include <pybind11/functional.h>
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/kernels.h"
#include "cpu/runner.h"
#include "cpu/sample.h"
#include "tensor.h"

using namespace latentmas;

namespace {

void check(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

DType model_dtype(const Tensor& tensor) {
  if (tensor.element() == Element::f32) return DType::f32;
  if (tensor.element() == Element::bf16) return DType::bf16;
  tensor.fail("float32 or bfloat16");
}

// ---- ops -----------------------------------------------------------------------------------------------------------

void realign(const py::object& hidden_arg, const py::object& weight_arg, float target_norm, const py::object& out_arg) {
  const Tensor hidden("realign: hidden", hidden_arg), weight = Tensor::optional("realign: weight", weight_arg);
  const Tensor out("realign: out", out_arg);
  const DType from = model_dtype(hidden), to = model_dtype(out);
  hidden.check(hidden.element(), {kAny, kAny}, Strides::rows);
  const std::int64_t rows = hidden.size(0), cols_in = hidden.size(1);
  if (weight) weight.check(Element::f32, {kAny, cols_in});
  const std::int64_t cols_out = weight ? weight.size(0) : cols_in;
  out.check(out.element(), {rows, cols_out}, Strides::rows);
  check(cols_in > 0 && cols_out > 0, "realign: rows must not be empty");
  // A matrix of one row may have any stride.
  check(rows < 2 || (hidden.stride(0) >= cols_in && out.stride(0) >= cols_out), "realign: rows of hidden or out overlap");
  if (rows == 0) return;
  const ConstMatrix source{hidden.data<const void>(), from, rows, cols_in, std::max(hidden.stride(0), cols_in)};
  const Matrix target{out.data<void>(), to, rows, cols_out, std::max(out.stride(0), cols_out)};
  const Kernels& kernels = active();
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> scratch(new float[realign_scratch(rows, cols_in, cols_out)]);
  kernels.realign(source, weight.data<const float>(), target_norm, scratch.get(), target);
}

std::vector<std::int64_t> sample_rows(const py::object& logits_arg, const Sampling& how, std::int64_t draw) {
  const Tensor logits("sample: logits", logits_arg);
  logits.check(Element::f32, {kAny, kAny});
  const std::int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check(vocabulary > 0, "sample: there are no logits");
  py::gil_scoped_release release;
  std::vector<std::int64_t> tokens;
  std::vector<float> scratch;
  for (std::int64_t row = 0; row < rows; ++row)
    tokens.push_back(sample(logits.data<const float>() + row * vocabulary, vocabulary, how,
                            static_cast<std::uint32_t>(draw * 65536 + row), {}, nullptr, scratch));
  return tokens;
}

std::uint64_t checksum_of(const py::object& tensor_arg) {
  const Tensor tensor("checksum: tensor", tensor_arg);
  if (!tensor.has_strides(Strides::contiguous)) tensor.fail("contiguous");
  const std::int64_t bytes = tensor.bytes();
  py::gil_scoped_release release;
  return checksum(tensor.data<const void>(), bytes);
}

// ---- the model -----------------------------------------------------------------------------------------------------

// A Linear, Layer or Model as Python gives it; a Runner is made of them once all sizes are known to fit. None is optional.
struct LinearArgs {
  py::object weight, bias, scales;
};
struct LayerArgs {
  py::object input_norm, query_norm, key_norm, mlp_norm;
  LinearArgs qkv, output, gate_up, down;
  std::optional<std::int64_t> window;
  std::int64_t slot;
};
struct ModelArgs {
  py::object embedding, final_norm, inv_freq;
  LinearArgs lm_head;
  std::vector<LayerArgs> layers;
  std::int64_t query_heads, kv_heads, head_dim, intermediate_size;
  float eps, scale, attention_scaling;
};

Vector vector_of(const std::string& name, const py::object& given, DType dtype, std::int64_t size) {
  const Tensor tensor = Tensor::optional(name, given);
  if (tensor) tensor.check(element_of(dtype), {size});
  return tensor.data<const void>();
}

Vector norm_of(const std::string& name, const py::object& given, DType dtype, std::int64_t size) {
  return Tensor(name, given).check(element_of(dtype), {size}).data<const void>();
}

struct Linear {
  Weight weight;
  Vector bias;
};
// With scales the weight is int8.
Linear linear_of(const std::string& name, const LinearArgs& given, DType dtype, std::int64_t rows, std::int64_t cols) {
  const Tensor weight(name + ".weight", given.weight), scales = Tensor::optional(name + ".scales", given.scales);
  weight.check(scales ? Element::i8 : element_of(dtype), {rows, cols});
  rows = weight.size(0);
  check(rows > 0 && cols > 0, name + ".weight is empty");
  if (scales) scales.check(Element::f32, {rows});
  return {{weight.data<const void>(), scales ? DType::i8 : dtype, rows, cols, scales.data<const float>()},
          vector_of(name + ".bias", given.bias, dtype, rows)};
}

std::unique_ptr<Runner> make_runner(const ModelArgs& given) {
  const Tensor embedding("Model: embedding", given.embedding), inv_freq("Model: inv_freq", given.inv_freq);
  Model m{};
  m.dtype = model_dtype(embedding);
  embedding.check(embedding.element(), {kAny, kAny});
  if (embedding.size(0) == 0) embedding.fail("of at least one row");
  m.embedding = embedding.data<const void>();
  m.embedding_rows = embedding.size(0);
  m.hidden_size = embedding.size(1);
  m.query_heads = given.query_heads;
  m.kv_heads = given.kv_heads;
  m.head_dim = given.head_dim;
  m.intermediate_size = given.intermediate_size;
  m.eps = given.eps;
  m.scale = given.scale;
  m.attention_scaling = given.attention_scaling;
  check(m.hidden_size > 0 && m.intermediate_size > 0 && m.query_heads > 0, "Model: sizes must be positive");
  check(m.head_dim > 0 && m.head_dim <= kMaxHeadDim && m.head_dim % 2 == 0, "Model: heads must be even and up to 256 wide");
  check(m.kv_heads > 0 && m.query_heads % m.kv_heads == 0, "Model: query heads must be a multiple of key heads");
  inv_freq.check(Element::f32, {m.head_dim / 2});
  m.final_norm = norm_of("Model: final_norm", given.final_norm, m.dtype, m.hidden_size);
  const Linear lm_head = linear_of("Model: lm_head", given.lm_head, m.dtype, kAny, m.hidden_size);
  m.lm_head = lm_head.weight;
  m.lm_head_bias = lm_head.bias;
  std::vector<Layer> layers;
  for (const LayerArgs& from : given.layers) {
    const std::string at = "Layer " + std::to_string(layers.size()) + ": ";
    const auto linear = [&](const char* name, const LinearArgs& args, std::int64_t rows, std::int64_t cols) {
      return linear_of(at + name, args, m.dtype, rows, cols);
    };
    const Linear qkv = linear("qkv", from.qkv, (m.query_heads + 2 * m.kv_heads) * m.head_dim, m.hidden_size);
    const Linear output = linear("output", from.output, m.hidden_size, m.query_heads * m.head_dim);
    const Linear gate_up = linear("gate_up", from.gate_up, 2 * m.intermediate_size, m.hidden_size);
    const Linear down = linear("down", from.down, m.hidden_size, m.intermediate_size);
    check(from.slot >= 0 && from.window.value_or(1) > 0, at + "slot must be 0 or more and a window 1 or more");
    Layer layer{};
    layer.input_norm = norm_of(at + "input_norm", from.input_norm, m.dtype, m.hidden_size);
    layer.qkv = qkv.weight;
    layer.qkv_bias = qkv.bias;
    layer.query_norm = vector_of(at + "query_norm", from.query_norm, m.dtype, m.head_dim);
    layer.key_norm = vector_of(at + "key_norm", from.key_norm, m.dtype, m.head_dim);
    layer.output = output.weight;
    layer.output_bias = output.bias;
    layer.mlp_norm = norm_of(at + "mlp_norm", from.mlp_norm, m.dtype, m.hidden_size);
    layer.gate_up = gate_up.weight;
    layer.gate_up_bias = gate_up.bias;
    layer.down = down.weight;
    layer.down_bias = down.bias;
    layer.window = from.window.value_or(0);
    layer.slot = from.slot;
    layers.push_back(layer);
  }
  const float* frequencies = inv_freq.data<const float>();
  return std::make_unique<Runner>(m, std::move(layers), std::vector<float>(frequencies, frequencies + m.head_dim / 2));
}

// ---- calls ---------------------------------------------------------------------------------------------------------

std::vector<std::int64_t> numbers_of(const Tensor& tensor, std::int64_t count) {
  tensor.check(Element::i64, {count});
  const std::int64_t* first = tensor.data<const std::int64_t>();
  return {first, first + tensor.size(0)};
}

// A KV cache and where its rows go on. Holds the tensors.
struct CacheArgs {
  Tensor keys, values, positions, prefix_row, prefix_len;
  DType dtype;
  RowCursor rows;

  CacheArgs(const py::object& keys_arg, const py::object& values_arg, const py::object& positions_arg,
            const py::object& lengths, const py::object& next_position, const py::object& prefix_row_arg,
            const py::object& prefix_len_arg)
      : keys("KVCache: keys", keys_arg), values("KVCache: values", values_arg), positions("KVCache: positions", positions_arg),
        prefix_row("KVCache: prefix_row", prefix_row_arg), prefix_len("KVCache: prefix_len", prefix_len_arg),
        dtype(model_dtype(keys)) {
    keys.check(keys.element(), {kAny, kAny, kAny, kAny, kAny}, Strides::rows);
    values.check(keys.element(), {keys.size(0), keys.size(1), keys.size(2), keys.size(3), keys.size(4)}, Strides::rows);
    if (keys.stride(3) != keys.size(4) && keys.size(3) > 1) keys.fail("of contiguous slots");
    for (int i = 0; i < keys.dims(); ++i)
      if (values.stride(i) != keys.stride(i) && keys.size(i) > 1) values.fail("of the strides of keys");
    const std::int64_t batch = keys.size(1);
    positions.check(Element::i64, {batch, keys.size(3)}, Strides::rows);
    rows = {numbers_of(Tensor("KVCache: lengths", lengths), batch),
            numbers_of(Tensor("KVCache: next_position", next_position), batch)};
    prefix_row.check(Element::i64, {batch});
    prefix_len.check(Element::i64, {batch});
  }

  // The cache for a call on `model` that adds counts[b] slots to row b.
  KVCache cache_for(const Model& model, const std::vector<std::int64_t>& counts) const {
    keys.check(element_of(model.dtype), {kAny, kAny, model.kv_heads, kAny, model.head_dim}, Strides::rows);
    std::int64_t layers = 0;
    for (std::int64_t i = 0; i < model.layer_count; ++i) layers = std::max(layers, model.layers[i].slot + 1);
    if (layers > keys.size(0)) keys.fail("of at least " + std::to_string(layers) + " layers");
    bool shares_prefix = false;
    for (std::size_t b = 0; b < rows.lengths.size(); ++b) {
      const std::int64_t length = rows.lengths[b], len = prefix_len.data<const std::int64_t>()[b];
      check(length >= 0 && counts[b] >= 0 && length + counts[b] <= keys.size(3),
            "KVCache: row " + std::to_string(b) + " of length " + std::to_string(length) + " has no room for " +
                std::to_string(counts[b]) + " more of " + std::to_string(keys.size(3)) + " slots");
      if (len == 0) continue;
      const std::int64_t source = prefix_row.data<const std::int64_t>()[b];
      check(len > 0 && len <= length && len % kKVSplitSlots == 0 && source >= 0 && source < keys.size(1),
            "KVCache: row " + std::to_string(b) + " cannot share " + std::to_string(len) + " slots with row " +
                std::to_string(source) + "; supported are multiples of " + std::to_string(kKVSplitSlots) + " up to its length");
      shares_prefix = true;
    }
    return {keys.data<void>(), values.data<void>(), keys.stride(0), keys.stride(1), keys.stride(2),
            positions.data<std::int64_t>(), positions.stride(0),
            shares_prefix ? prefix_row.data<const std::int64_t>() : nullptr,
            shares_prefix ? prefix_len.data<const std::int64_t>() : nullptr};
  }
};

struct FeedbackArgs {
  float target_norm;
  Tensor aligner;
  std::int64_t soft_top_k;
};
struct DecodeArgs {
  DecodeParams params;
  Tensor penalty_mask;
};

// The work between two steps: the caller's function, and Ctrl-C.
StepCallback callback_of(const py::object& callback) {
  return [&callback](std::int64_t step) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!callback.is_none()) callback(step);
  };
}

void extend(Runner& runner, const CacheArgs& cache, const py::object& counts_arg, const py::object& token_ids_arg,
            const py::object& embeds_arg, const py::object& states_arg, const py::object& logits_arg) {
  const Model& model = runner.model();
  const std::int64_t batch = static_cast<std::int64_t>(cache.rows.lengths.size());
  const std::vector<std::int64_t> counts = numbers_of(Tensor("extend: counts", counts_arg), batch);
  const Tensor ids = Tensor::optional("extend: token_ids", token_ids_arg);
  const Tensor embeds = Tensor::optional("extend: embeds", embeds_arg);
  check(static_cast<bool>(ids) != static_cast<bool>(embeds), "extend: pass token_ids or embeds");
  if (ids) ids.check(Element::i64, {batch, kAny});
  if (embeds) embeds.check(element_of(model.dtype), {batch, kAny, model.hidden_size});
  const std::int64_t columns = (ids ? ids : embeds).size(1);
  for (const std::int64_t count : counts) check(count <= columns, "extend: counts are above the columns of the prompt");
  const Tensor states = Tensor::optional("extend: states", states_arg), logits = Tensor::optional("extend: logits", logits_arg);
  if (states) states.check(element_of(model.dtype), {batch, model.hidden_size});
  if (logits) logits.check(Element::f32, {batch, model.lm_head.rows});
  const KVCache kv = cache.cache_for(model, counts);
  const py::object no_callback = py::none();
  const StepCallback on_step = callback_of(no_callback);
  py::gil_scoped_release release;
  runner.extend(kv, cache.rows, counts, columns, ids.data<const std::int64_t>(), embeds.data<const void>(), states.data<void>(),
                logits.data<float>(), on_step);
}

std::vector<std::int64_t> run_latent(Runner& runner, const CacheArgs& cache, const py::object& seed_arg,
                                     const FeedbackArgs& feedback, const LatentParams& params, const py::object& latents_arg,
                                     const py::object& last_hidden_arg, const py::object& states_arg,
                                     const py::object& on_step_arg) {
  const Model& model = runner.model();
  const std::int64_t batch = static_cast<std::int64_t>(cache.rows.lengths.size());
  const std::vector<std::int64_t>& steps = params.steps;
  check(!steps.empty() && steps.size() == cache.rows.lengths.size() && *std::min_element(steps.begin(), steps.end()) > 0,
        "run_latent: steps must be 1 or more for each row");
  const std::int64_t longest = *std::max_element(steps.begin(), steps.end());
  const Element dtype = element_of(model.dtype);
  const Tensor seed("run_latent: seed", seed_arg), latents("run_latent: latents", latents_arg);
  const Tensor last_hidden("run_latent: last_hidden", last_hidden_arg);
  const Tensor states = Tensor::optional("run_latent: states", states_arg);
  if (feedback.soft_top_k) {
    check(feedback.soft_top_k <= model.lm_head.rows && model.lm_head.rows <= model.embedding_rows,
          "Feedback: soft_top_k needs as many tokens, with an embedding each");
    seed.check(Element::f32, {batch, model.lm_head.rows});
  } else {
    seed.check(dtype, {batch, model.hidden_size});
  }
  if (feedback.aligner) feedback.aligner.check(Element::f32, {model.hidden_size, model.hidden_size});
  latents.check(dtype, {batch, longest, model.hidden_size});
  last_hidden.check(dtype, {batch, model.hidden_size});
  if (states) states.check(dtype, {batch, longest, model.hidden_size});
  const KVCache kv = cache.cache_for(model, steps);
  const StepCallback on_step = callback_of(on_step_arg);
  py::gil_scoped_release release;
  return runner.run_latent(kv, cache.rows, seed.data<const void>(),
                           {feedback.aligner.data<const float>(), feedback.target_norm, feedback.soft_top_k}, params,
                           latents.data<void>(), last_hidden.data<void>(), states.data<void>(), on_step);
}

void decode(Runner& runner, const CacheArgs& cache, const py::object& logits_arg, const DecodeArgs& given,
            const py::object& token_ids_arg, const py::object& on_token) {
  const Model& model = runner.model();
  const std::int64_t batch = static_cast<std::int64_t>(cache.rows.lengths.size()), most = given.params.max_new_tokens;
  check(most >= 0, "DecodeParams: max_new_tokens must be 0 or more");
  const Tensor logits("decode: logits", logits_arg), token_ids("decode: token_ids", token_ids_arg);
  logits.check(Element::f32, {batch, model.lm_head.rows});
  token_ids.check(Element::i64, {batch, most});
  DecodeParams params = given.params;
  if (given.penalty_mask) given.penalty_mask.check(Element::boolean, {batch, model.lm_head.rows});
  params.penalty_mask = given.penalty_mask.data<std::uint8_t>();
  // The last token is chosen and not fed in.
  const KVCache kv = cache.cache_for(model, std::vector<std::int64_t>(batch, std::max<std::int64_t>(most - 1, 0)));
  const StepCallback on_step = callback_of(on_token);
  py::gil_scoped_release release;
  runner.decode(kv, cache.rows, logits.data<const float>(), params, token_ids.data<std::int64_t>(), on_step);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of latentmas_kernels on torch tensors; what does not fit raises a LatentMASError that names it.";
  const auto none = py::none();

  // What a user can mend has one type in Python. pybind11 would make a plain ValueError of it, which is a bug to the callers.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> user_error;
  user_error.call_once_and_store_result([] { return py::module_::import("latentmas_kernels.errors").attr("LatentMASError"); });
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::invalid_argument& error) {
      py::set_error(user_error.get_stored(), error.what());
    }
  });

  m.attr("KV_SPLIT_SLOTS") = kKVSplitSlots;
  m.attr("MIN_NORM") = kMinNorm;
  m.attr("NEVER_COSINE") = kNeverCosine;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("MAX_SOFT_TOKENS") = kMaxSoftTokens;

  m.def("realign", &realign, "ops/realign.py; writes `out`.", py::kw_only(), py::arg("hidden"), py::arg("weight"),
        py::arg("target_norm"), py::arg("out"));
  py::class_<Sampling>(m, "Sampling", "How a token is chosen; see ops/sample.py.")
      .def(py::init([](bool do_sample, float temperature, std::int64_t top_k, float top_p, float min_p,
                       float repetition_penalty, std::uint64_t seed) {
             return Sampling{do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed};
           }),
           py::kw_only(), py::arg("do_sample"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
           py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f, py::arg("seed") = 0);
  m.def("sample", &sample_rows, "Token ids of logits float32 [rows, vocabulary].", py::arg("logits"), py::arg("sampling"),
        py::arg("draw"));

  py::class_<LinearArgs>(m, "Linear", "weight [out, in] and bias [out] in the model's dtype; with scales [out] int8.")
      .def(py::init<py::object, py::object, py::object>(), py::arg("weight"), py::kw_only(), py::arg("bias") = none,
           py::arg("scales") = none);
  py::class_<LayerArgs>(m, "Layer", "models/packed_weights.py:Layer.")
      .def(py::init([](py::object input_norm, LinearArgs qkv, py::object query_norm, py::object key_norm, LinearArgs output,
                       py::object mlp_norm, LinearArgs gate_up, LinearArgs down, std::optional<std::int64_t> window,
                       std::int64_t slot) {
             return LayerArgs{input_norm, query_norm, key_norm, mlp_norm, qkv, output, gate_up, down, window, slot};
           }),
           py::kw_only(), py::arg("input_norm"), py::arg("qkv"), py::arg("query_norm"), py::arg("key_norm"), py::arg("output"),
           py::arg("mlp_norm"), py::arg("gate_up"), py::arg("down"), py::arg("window"), py::arg("slot"));
  py::class_<ModelArgs>(m, "Model", "models/packed_weights.py:Weights.")
      .def(py::init([](py::object embedding, std::vector<LayerArgs> layers, py::object final_norm, LinearArgs lm_head,
                       py::object inv_freq, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t head_dim,
                       std::int64_t intermediate_size, float eps, float scale, float attention_scaling) {
             return ModelArgs{embedding, final_norm, inv_freq,          lm_head, layers, query_heads,
                              kv_heads,  head_dim,   intermediate_size, eps,     scale,  attention_scaling};
           }),
           py::kw_only(), py::arg("embedding"), py::arg("layers"), py::arg("final_norm"), py::arg("lm_head"),
           py::arg("inv_freq"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("intermediate_size"),
           py::arg("eps"), py::arg("scale"), py::arg("attention_scaling"));

  py::class_<CacheArgs>(m, "KVCache", "The tensors of a LatentCache: keys and values [layers, B, kv_heads, slots, head_dim].")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&>(),
           py::kw_only(), py::arg("keys"), py::arg("values"), py::arg("positions"), py::arg("lengths"),
           py::arg("next_position"), py::arg("prefix_row"), py::arg("prefix_len"));
  py::class_<FeedbackArgs>(m, "Feedback", "From a latent step to the next: W_a transposed, or the soft_top_k likeliest tokens.")
      .def(py::init([](float target_norm, const py::object& aligner, std::int64_t soft_top_k) {
             check(soft_top_k >= 0 && soft_top_k <= kMaxSoftTokens,
                   "Feedback: soft_top_k must be up to " + std::to_string(kMaxSoftTokens));
             return FeedbackArgs{target_norm, Tensor::optional("Feedback: aligner", aligner), soft_top_k};
           }),
           py::kw_only(), py::arg("target_norm"), py::arg("aligner") = none, py::arg("soft_top_k") = 0);
  py::class_<LatentParams>(m, "LatentParams", "engines' LatentParams: steps int64 [B], and the cosine that ends a row.")
      .def(py::init([](const py::object& steps, std::optional<double> stop_cosine) {
             return LatentParams{numbers_of(Tensor("LatentParams: steps", steps), kAny), stop_cosine.value_or(kNeverCosine)};
           }),
           py::kw_only(), py::arg("steps"), py::arg("stop_cosine") = none);
  py::class_<DecodeArgs>(m, "DecodeParams", "How to choose tokens and when to stop; penalty_mask: bool [B, vocabulary].")
      .def(py::init([](const Sampling& sampling, std::int64_t max_new_tokens, std::int64_t min_new_tokens,
                       std::vector<std::int64_t> eos_token_ids, const py::object& penalty_mask) {
             return DecodeArgs{{sampling, max_new_tokens, min_new_tokens, std::move(eos_token_ids)},
                               Tensor::optional("DecodeParams: penalty_mask", penalty_mask)};
           }),
           py::kw_only(), py::arg("sampling"), py::arg("max_new_tokens"), py::arg("min_new_tokens"), py::arg("eos_token_ids"),
           py::arg("penalty_mask") = none);

  py::class_<Runner>(m, "Runner", "The steps of a model, as in csrc/cpu/runner.h. Holds addresses of the weights, not tensors.")
      .def(py::init(&make_runner), py::arg("model"))
      .def("extend", &extend, py::arg("cache"), py::kw_only(), py::arg("counts"), py::arg("token_ids"), py::arg("embeds"),
           py::arg("states"), py::arg("logits"))
      .def("run_latent", &run_latent, py::arg("cache"), py::kw_only(), py::arg("seed"), py::arg("feedback"), py::arg("params"),
           py::arg("latents"), py::arg("last_hidden"), py::arg("states"), py::arg("on_step"))
      .def("decode", &decode, py::arg("cache"), py::kw_only(), py::arg("logits"), py::arg("params"), py::arg("token_ids"),
           py::arg("on_token"))
      .def_property_readonly("scratch_bytes", &Runner::scratch_bytes);

  m.def("checksum", &checksum_of, py::arg("tensor"), "csrc/cpu/checksum.h describes it.");
  m.def("available_isas", [] { return std::string(available_isas()); });
  m.def("active_isa", [] { return std::string(active_isa()); });
  m.def("threads", &team_size, "Threads that the kernels run on.");
}
