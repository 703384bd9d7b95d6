// Tensor: a torch tensor that is an argument from Python, and its checks. A wrong one is an error that names the argument.
//
// Read through its Python attributes, which takes about half a microsecond: no torch header is used, so that one build serves
// every version of torch, and no DLPack capsule, which costs several times as much and refuses tensors that require a gradient.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/kernels.h"

namespace latentmas {

namespace py = pybind11;

// Dtypes that arguments may have; `other` stands for all other dtypes of torch.
enum class Element { f32, bf16, i8, i64, boolean, other };
// contiguous: all elements follow each other. rows: those along the last dimension do.
enum class Strides { contiguous, rows };
constexpr std::int64_t kAny = -1;  // a size that is not checked

// Objects of torch, looked up once in a process.
struct TorchNames {
  py::object tensor, dtypes[static_cast<int>(Element::other)];
  py::str data_ptr{"data_ptr"}, dtype{"dtype"}, shape{"shape"}, stride{"stride"}, is_cpu{"is_cpu"};
  TorchNames() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    const char* names[] = {"float32", "bfloat16", "int8", "int64", "bool"};
    for (int i = 0; i < static_cast<int>(Element::other); ++i) dtypes[i] = torch.attr(names[i]);
  }
  static const TorchNames& get() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TorchNames> names;
    return names.call_once_and_store_result([] { return TorchNames(); }).get_stored();
  }
};

class Tensor {
 public:
  static constexpr int kMaxDims = 5;

  // None, where an argument is optional.
  Tensor() = default;
  // Throws std::invalid_argument for anything but a torch tensor on the CPU. `name` is that of the argument.
  Tensor(std::string name, py::object tensor) : name_(std::move(name)), tensor_(std::move(tensor)) {
    const TorchNames& torch = TorchNames::get();
    if (PyObject_IsInstance(tensor_.ptr(), torch.tensor.ptr()) != 1)
      throw std::invalid_argument(name_ + " must be a torch tensor; got " + Py_TYPE(tensor_.ptr())->tp_name);
    const auto dtype = get(torch.dtype);
    int element = 0;
    while (element < static_cast<int>(Element::other) && !dtype.is(torch.dtypes[element])) ++element;
    element_ = static_cast<Element>(element);
    const auto shape = get(torch.shape), stride = call(torch.stride);
    dims_ = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (get(torch.is_cpu).ptr() != Py_True) fail("on the CPU");
    if (dims_ > kMaxDims) fail("of at most 5 dimensions");
    for (int i = 0; i < dims_; ++i) {
      sizes_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      strides_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    data_ = PyLong_AsVoidPtr(call(torch.data_ptr).ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  // The tensor, or none where Python gave None.
  static Tensor optional(std::string name, py::object tensor) {
    return tensor.is_none() ? Tensor() : Tensor(std::move(name), std::move(tensor));
  }

  explicit operator bool() const { return static_cast<bool>(tensor_); }
  Element element() const { return element_; }
  int dims() const { return dims_; }
  std::int64_t size(int i) const { return sizes_[i]; }
  std::int64_t stride(int i) const { return strides_[i]; }
  std::int64_t bytes() const { return tensor_.attr("nbytes").cast<std::int64_t>(); }
  const std::string& name() const { return name_; }
  // Null where there is no tensor.
  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }

  // Throws std::invalid_argument unless the tensor has this dtype, these sizes (kAny is not checked) and these strides.
  const Tensor& check(Element element, std::initializer_list<std::int64_t> sizes, Strides strides = Strides::contiguous) const {
    bool fits = element_ == element && dims_ == static_cast<int>(sizes.size());
    for (int i = 0; fits && i < dims_; ++i) fits = sizes.begin()[i] == kAny || sizes.begin()[i] == sizes_[i];
    if (fits && has_strides(strides)) return *this;
    std::string wanted = name_of(element) + " [";
    for (const std::int64_t size : sizes)
      wanted += (wanted.back() == '[' ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
    fail(wanted + (strides == Strides::rows ? "] with contiguous rows" : "], contiguous"));
  }
  bool has_strides(Strides strides) const {
    std::int64_t expected = 1;
    for (int i = dims_ - 1; i >= 0; --i) {
      if (sizes_[i] == 0) return true;
      if (sizes_[i] != 1 && strides_[i] != expected) return false;
      expected *= sizes_[i];
      if (strides == Strides::rows) return true;
    }
    return true;
  }
  // Throws std::invalid_argument: "<name> must be <wanted>; got <the tensor>".
  [[noreturn]] void fail(const std::string& wanted) const {
    const auto text = [&](const char* attribute) { return py::str(tensor_.attr(attribute)).cast<std::string>(); };
    const std::string shape = py::repr(py::list(tensor_.attr("shape"))).cast<std::string>();
    const std::string strides = py::repr(py::list(tensor_.attr("stride")())).cast<std::string>();
    throw std::invalid_argument(name_ + " must be " + wanted + "; got " + text("dtype").substr(6) + " " + shape +
                                " with strides " + strides + " on " + text("device"));
  }

 private:
  py::object get(const py::str& name) const { return checked(PyObject_GetAttr(tensor_.ptr(), name.ptr())); }
  py::object call(const py::str& name) const { return checked(PyObject_CallMethodNoArgs(tensor_.ptr(), name.ptr())); }
  static py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  static std::string name_of(Element element) {
    const char* names[] = {"float32", "bfloat16", "int8", "int64", "bool", "other"};
    return names[static_cast<int>(element)];
  }

  std::string name_;
  py::object tensor_;  // keeps the memory
  void* data_ = nullptr;
  Element element_ = Element::other;
  int dims_ = 0;
  std::int64_t sizes_[kMaxDims] = {}, strides_[kMaxDims] = {};
};

inline Element element_of(DType dtype) { return dtype == DType::f32 ? Element::f32 : Element::bf16; }

}  // namespace latentmas
