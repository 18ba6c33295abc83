// From a tensor's type to a template's: what the ops of a tower do for every type that a tower may hold.
#pragma once

#include "../csrc/half.h"
#include "checks.h"

namespace tpt_fast {

// Calls run(T()) with the storage type of `t`: [&]<class T>(T) { return op<T>(...); }.
template <class Run>
auto with_type(const Tensor& t, const char* name, Run run) {
  check_dtype(t, name, {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16});
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return run(Half());
    case ScalarType::BFloat16:
      return run(BFloat16());
    case ScalarType::Double:
      return run(double());
    default:
      return run(float());
  }
}

// The same for ops that no tower holds its rows for: float, or double.
template <class Run>
auto with_wide_type(const Tensor& t, const char* name, Run run) {
  check_dtype(t, name, {ScalarType::Float, ScalarType::Double});
  return t.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

}  // namespace tpt_fast
