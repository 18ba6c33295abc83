// Argument checks for the bindings: the message names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace tpt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// `shape` gives the expected sizes; -1 stands for any.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t i = 0;
  for (int64_t size : shape) {
    expected += (i ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
    same = same && (size < 0 || t.size(i) == size);
    ++i;
  }
  STD_TORCH_CHECK(same, name, ": expected shape [", expected, "], got ", shape_string(t));
}

inline void check_dtype(const Tensor& t, const char* name, std::initializer_list<ScalarType> dtypes) {
  std::string expected;
  for (ScalarType dtype : dtypes) {
    if (t.scalar_type() == dtype) return;
    expected += (expected.empty() ? "" : " or ") + std::string(torch::headeronly::toString(dtype));
  }
  STD_TORCH_CHECK(false, name, ": expected ", expected, ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline void check_range(int64_t value, const char* name, int64_t low, int64_t high) {
  STD_TORCH_CHECK(low <= value && value <= high, name, ": expected ", low, " to ", high, ", got ", value);
}

// The type that arithmetic on `dtype` is done in.
inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype;
}

// A tensor on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace tpt_fast
