// Argument checks and dispatch: plain addresses come in from Python, which has checked devices, dtypes and shapes.
// No torch header is used, so that one build serves every version of torch.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/kernels.h"
#include "cpu/runner.h"
#include "cpu/sample.h"

namespace py = pybind11;
using namespace latentmas;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

DType parse_dtype(const std::string& op, const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  throw std::invalid_argument(op + ": got dtype " + name + "; supported are float32 and bfloat16");
}

void realign(Address hidden, const std::string& hidden_dtype, std::int64_t hidden_row_stride, Address weight,
             float target_norm, Address out, const std::string& out_dtype, std::int64_t out_row_stride, std::int64_t rows,
             std::int64_t cols_in, std::int64_t cols_out) {
  if (rows < 0 || cols_in <= 0 || cols_out <= 0) throw std::invalid_argument("realign: sizes must be positive");
  if (!weight && cols_in != cols_out) throw std::invalid_argument("realign: without a weight the widths must be equal");
  if (hidden_row_stride < cols_in || out_row_stride < cols_out)
    throw std::invalid_argument("realign: a row stride is smaller than the row");
  if (rows == 0) return;
  if (!hidden || !out) throw std::invalid_argument("realign: null pointer");
  const ConstMatrix from{pointer<const void>(hidden), parse_dtype("realign", hidden_dtype), rows, cols_in, hidden_row_stride};
  const Matrix to{pointer<void>(out), parse_dtype("realign", out_dtype), rows, cols_out, out_row_stride};
  const Kernels& kernels = active();
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> scratch(new float[realign_scratch(rows, cols_in, cols_out)]);
  kernels.realign(from, pointer<const float>(weight), target_norm, scratch.get(), to);
}

// Token ids of rows of logits that lie one behind the other.
std::vector<std::int64_t> sample_rows(Address logits, std::int64_t rows, std::int64_t vocabulary, const Sampling& how,
                                      std::int64_t draw) {
  if (!logits || vocabulary <= 0) throw std::invalid_argument("sample: there are no logits");
  py::gil_scoped_release release;
  std::vector<std::int64_t> tokens;
  std::vector<float> scratch;
  for (std::int64_t row = 0; row < rows; ++row)
    tokens.push_back(sample(pointer<const float>(logits) + row * vocabulary, vocabulary, how,
                            static_cast<std::uint32_t>(draw * 65536 + row), {}, nullptr, scratch));
  return tokens;
}

std::uint64_t checksum_of(Address address, std::int64_t bytes) {
  py::gil_scoped_release release;
  return checksum(pointer<const void>(address), bytes);
}

// (address, out, in, address of the scales): scales make it int8.
using WeightTuple = std::tuple<Address, std::int64_t, std::int64_t, Address>;

Weight weight_of(const WeightTuple& given, DType dtype) {
  const auto [data, rows, cols, scales] = given;
  if (!data || rows <= 0 || cols <= 0) throw std::invalid_argument("Runner: an empty weight");
  return {pointer<const void>(data), scales ? DType::i8 : dtype, rows, cols, pointer<const float>(scales)};
}

void check(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("Runner: " + what);
}

std::unique_ptr<Runner> make_runner(const py::dict& model, const py::list& layer_list) {
  const auto number = [&](const char* key) { return model[key].cast<std::int64_t>(); };
  const auto address = [&](const char* key) { return pointer<const void>(model[key].cast<Address>()); };
  Decoder d{};
  d.dtype = parse_dtype("Runner", model["dtype"].cast<std::string>());
  d.width = number("width");
  d.query_heads = number("query_heads");
  d.kv_heads = number("kv_heads");
  d.head_dim = number("head_dim");
  d.intermediate = number("intermediate");
  d.embedding = address("embedding");
  d.embedding_rows = model["embedding_rows"].cast<std::int64_t>();
  d.final_gain = address("final_gain");
  d.lm_head = weight_of(model["lm_head"].cast<WeightTuple>(), d.dtype);
  d.lm_head_bias = address("lm_head_bias");
  d.eps = model["eps"].cast<float>();
  d.scale = model["scale"].cast<float>();
  d.attention_scaling = model["attention_scaling"].cast<float>();
  auto inv_freq = model["inv_freq"].cast<std::vector<float>>();
  check(d.head_dim > 0 && d.head_dim <= kMostHeadDim && d.head_dim % 2 == 0, "heads must be even and up to 256 wide");
  check(d.kv_heads > 0 && d.query_heads % d.kv_heads == 0, "query heads must be a multiple of key heads");
  check(static_cast<std::int64_t>(inv_freq.size()) * 2 == d.head_dim, "inv_freq must be half as long as a head is wide");
  check(d.embedding && d.final_gain && d.lm_head.cols == d.width, "the ends of the decoder do not fit its width");
  std::vector<Layer> layers;
  for (const py::handle& item : layer_list) {
    const auto given = py::reinterpret_borrow<py::dict>(item);
    const auto vector = [&](const char* key) { return pointer<const void>(given[key].cast<Address>()); };
    const auto weight = [&](const char* key) { return weight_of(given[key].cast<WeightTuple>(), d.dtype); };
    Layer layer{};
    layer.input_gain = vector("input_gain");
    layer.qkv = weight("qkv");
    layer.qkv_bias = vector("qkv_bias");
    layer.query_gain = vector("query_gain");
    layer.key_gain = vector("key_gain");
    layer.output = weight("output");
    layer.output_bias = vector("output_bias");
    layer.mlp_gain = vector("mlp_gain");
    layer.gate_up = weight("gate_up");
    layer.gate_up_bias = vector("gate_up_bias");
    layer.down = weight("down");
    layer.down_bias = vector("down_bias");
    layer.window = given["window"].cast<std::int64_t>();
    layer.slot = given["slot"].cast<std::int64_t>();
    const auto fits = [](const Weight& w, std::int64_t rows, std::int64_t cols) { return w.rows == rows && w.cols == cols; };
    check(layer.input_gain && layer.mlp_gain && fits(layer.qkv, (d.query_heads + 2 * d.kv_heads) * d.head_dim, d.width) &&
              fits(layer.output, d.width, d.query_heads * d.head_dim) &&
              fits(layer.gate_up, 2 * d.intermediate, d.width) && fits(layer.down, d.width, d.intermediate),
          "a layer's weights do not fit the sizes of the decoder");
    layers.push_back(layer);
  }
  return std::make_unique<Runner>(d, std::move(layers), std::move(inv_freq));
}

// (keys, values, layer stride, row stride, head stride, positions, stride of positions, prefix_row, prefix_len)
using MemoryTuple =
    std::tuple<Address, Address, std::int64_t, std::int64_t, std::int64_t, Address, std::int64_t, Address, Address>;

Memory memory_of(const MemoryTuple& given) {
  const auto [keys, values, layer, row, head, positions, positions_stride, prefix_row, prefix_len] = given;
  return {pointer<void>(keys),
          pointer<void>(values),
          layer,
          row,
          head,
          pointer<std::int64_t>(positions),
          positions_stride,
          pointer<const std::int64_t>(prefix_row),
          pointer<const std::int64_t>(prefix_len)};
}

// What happens between two steps: the caller's function, and Ctrl-C.
Between between_of(const py::object& callback) {
  return [&callback](std::int64_t step) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!callback.is_none()) callback(step);
  };
}

using Numbers = std::vector<std::int64_t>;

void extend(Runner& runner, const MemoryTuple& memory, const Numbers& lengths, const Numbers& positions,
            const Numbers& counts, std::int64_t columns, Address tokens, Address embeds, Address states, Address logits) {
  const py::object nobody = py::none();
  const Between between = between_of(nobody);
  py::gil_scoped_release release;
  runner.extend(memory_of(memory), {lengths, positions}, counts, columns, pointer<const std::int64_t>(tokens),
                pointer<const void>(embeds), pointer<void>(states), pointer<float>(logits), between);
}

Numbers run_latent(Runner& runner, const MemoryTuple& memory, const Numbers& lengths, const Numbers& positions, Address seed,
              Address aligner, float target_norm, std::int64_t likely, const Numbers& steps, double settle, Address latents,
              Address states, Address recorded, const py::object& on_step) {
  check(!steps.empty() && steps.size() == lengths.size() && *std::min_element(steps.begin(), steps.end()) > 0,
        "latent steps must be 1 or more for each row");
  check(likely >= 0 && likely <= kMostLikely, "soft feedback mixes up to " + std::to_string(kMostLikely) + " tokens");
  const Between between = between_of(on_step);
  py::gil_scoped_release release;
  return runner.run_latent(memory_of(memory), {lengths, positions}, pointer<const void>(seed),
                      {pointer<const float>(aligner), target_norm, likely}, {steps, settle}, pointer<void>(latents),
                      pointer<void>(states), pointer<void>(recorded), between);
}

void decode(Runner& runner, const MemoryTuple& memory, const Numbers& lengths, const Numbers& positions, Address logits,
           const Sampling& sampling, std::int64_t max_new_tokens, std::int64_t min_new_tokens, const Numbers& ends,
           Address seen, Address tokens, const py::object& on_token) {
  const Between between = between_of(on_token);
  py::gil_scoped_release release;
  runner.decode(memory_of(memory), {lengths, positions}, pointer<const float>(logits),
               {sampling, max_new_tokens, min_new_tokens, ends, pointer<std::uint8_t>(seen)},
               pointer<std::int64_t>(tokens), between);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of latentmas_kernels. Addresses are of row-major memory that the caller keeps alive.";
  m.def("realign", &realign, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_row_stride"), py::arg("weight"),
        py::arg("target_norm"), py::arg("out"), py::arg("out_dtype"), py::arg("out_row_stride"), py::arg("rows"),
        py::arg("cols_in"), py::arg("cols_out"));
  py::class_<Sampling>(m, "Sampling", "How a token is chosen; see ops/sample.py.")
      .def(py::init([](bool draw, float temperature, std::int64_t top_k, float top_p, float min_p, float penalty,
                       std::uint64_t seed) { return Sampling{draw, temperature, top_k, top_p, min_p, penalty, seed}; }),
           py::arg("draw"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p") = 0.0f,
           py::arg("penalty") = 1.0f, py::arg("seed") = 0);
  m.def("sample", &sample_rows, py::arg("logits"), py::arg("rows"), py::arg("vocabulary"), py::arg("sampling"),
        py::arg("draw"));
  py::class_<Runner>(m, "Runner", "A decoder's steps; csrc/cpu/runner.h says what the calls do.")
      .def(py::init(&make_runner), py::arg("model"), py::arg("layers"))
      .def("extend", &extend, py::arg("memory"), py::arg("lengths"), py::arg("positions"), py::arg("counts"),
           py::arg("columns"), py::arg("tokens"), py::arg("embeds"), py::arg("states"), py::arg("logits"))
      .def("run_latent", &run_latent, py::arg("memory"), py::arg("lengths"), py::arg("positions"), py::arg("seed"),
           py::arg("aligner"), py::arg("target_norm"), py::arg("likely"), py::arg("steps"), py::arg("settle"),
           py::arg("latents"), py::arg("states"), py::arg("recorded"), py::arg("on_step"))
      .def("decode", &decode, py::arg("memory"), py::arg("lengths"), py::arg("positions"), py::arg("logits"),
           py::arg("sampling"), py::arg("max_new_tokens"), py::arg("min_new_tokens"), py::arg("ends"), py::arg("seen"),
           py::arg("tokens"), py::arg("on_token"))
      .def_property_readonly("scratch_bytes", &Runner::scratch_bytes);
  m.def("checksum", &checksum_of, py::arg("address"), py::arg("bytes"), "csrc/cpu/checksum.h says of what.");
  m.def("available_isas", [] { return std::string(available_isas()); });
  m.def("active_isa", [] { return std::string(active_isa()); });
  m.def("threads", &team_size, "Threads that the kernels run on.");
}
