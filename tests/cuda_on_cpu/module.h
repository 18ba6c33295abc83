// Between NumPy arrays and a launcher's parameter struct.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

// The keyword arguments of one call. Every function takes them and nothing else, which keeps pybind11's templates, and
// so the time to compile, to one signature.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& values) : values_(values) {}

  // Null for None. Arrays arrive as they are: another item size is an error, never a silent copy that would be written
  // to. Only the item size is compared, since NumPy has no bfloat16; strides are the op's business.
  template <class T>
  T* data(const char* name) {
    const py::object value = take(name);
    if (value.is_none()) return nullptr;
    const auto array = py::cast<py::array>(value);
    if (static_cast<size_t>(array.itemsize()) != sizeof(T)) throw py::type_error(name + std::string(": item size"));
    return static_cast<T*>(const_cast<void*>(array.data()));
  }

  template <class... Integers>
  void integers(const char* name, Integers&... to) {  // of a tuple
    const auto values = py::cast<py::tuple>(take(name));
    size_t i = 0;
    ((to = py::cast<int64_t>(values[i++])), ...);
  }

  double number(const char* name) { return py::cast<double>(take(name)); }
  bool flag(const char* name) { return py::cast<bool>(take(name)); }
  std::string text(const char* name) { return py::cast<std::string>(take(name)); }

  // Raises what went wrong with a launch; every argument has to have been used.
  void check(cudaError_t error) const {
    if (values_.size()) throw py::type_error("not an argument: " + py::cast<std::string>(py::str(values_)));
    const std::string detail = cuda_on_cpu::take_error();
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(cudaGetErrorString(error)) + (detail.empty() ? "" : ": " + detail));
    }
  }

 private:
  py::object take(const char* name) { return values_.attr("pop")(name); }

  py::dict values_;
};
