// Between NumPy arrays and a launcher's parameter struct.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace py = pybind11;

// Arrays arrive as they are: another dtype or order is an error, never a silent copy that would be written to.
template <class T>
T* data(const py::array& array, const char* name) {
  if (!(array.flags() & py::array::c_style)) throw py::type_error(std::string(name) + ": expected a contiguous array");
  if (static_cast<size_t>(array.itemsize()) != sizeof(T)) throw py::type_error(std::string(name) + ": wrong item size");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

inline void check(cudaError_t error) {
  const std::string detail = cuda_on_cpu::take_error();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorString(error)) + (detail.empty() ? "" : ": " + detail));
  }
}
