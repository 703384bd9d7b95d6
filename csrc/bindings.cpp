// Argument checks and dispatch: plain addresses come in from Python, which has checked devices, dtypes and shapes.
// No torch header is used, so that one build serves every version of torch.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace latentmas;

namespace {

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  throw std::invalid_argument("realign: got dtype " + name + "; supported are float32 and bfloat16");
}

void realign(std::uintptr_t hidden, const std::string& hidden_dtype, std::int64_t hidden_row_stride, std::uintptr_t weight,
             std::int64_t weight_row_stride, float target_norm, std::uintptr_t out, const std::string& out_dtype,
             std::int64_t out_row_stride, std::int64_t rows, std::int64_t cols_in, std::int64_t cols_out) {
  if (rows < 0 || cols_in <= 0 || cols_out <= 0) throw std::invalid_argument("realign: sizes must be positive");
  if (!weight && cols_in != cols_out) throw std::invalid_argument("realign: without a weight the widths must be equal");
  if (hidden_row_stride < cols_in || out_row_stride < cols_out || (weight && weight_row_stride < cols_in))
    throw std::invalid_argument("realign: a row stride is smaller than the row");
  if (rows == 0) return;
  if (!hidden || !out) throw std::invalid_argument("realign: null pointer");
  const ConstMatrix from{reinterpret_cast<const void*>(hidden), parse_dtype(hidden_dtype), rows, cols_in, hidden_row_stride};
  const Matrix to{reinterpret_cast<void*>(out), parse_dtype(out_dtype), rows, cols_out, out_row_stride};
  const Kernels& kernels = active();
  py::gil_scoped_release release;
  const std::unique_ptr<float[]> scratch(new float[realign_scratch(rows, cols_in, cols_out)]);
  kernels.realign(from, reinterpret_cast<const float*>(weight), weight_row_stride, target_norm, scratch.get(), to);
}

int openmp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of latentmas_kernels. Addresses are of row-major memory that the caller keeps alive.";
  m.def("realign", &realign, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_row_stride"), py::arg("weight"),
        py::arg("weight_row_stride"), py::arg("target_norm"), py::arg("out"), py::arg("out_dtype"),
        py::arg("out_row_stride"), py::arg("rows"), py::arg("cols_in"), py::arg("cols_out"));
  m.def("available_isas", [] { return std::string(available_isas()); });
  m.def("active_isa", [] { return std::string(active_isa()); });
  m.def("openmp_threads", &openmp_threads, "Threads of a parallel region; 0 where the build has no OpenMP.");
}
