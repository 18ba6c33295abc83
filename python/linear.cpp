#include "../csrc/linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>

#include "checks.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;

// Whether torch is told to leave AVX-512 alone, by the variable that its own kernels go by.
bool is_limited() {
  static const bool limited = [] {
    const char* given = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string capability = given ? given : "";
    return capability == "avx2" || capability == "default";
  }();
  return limited;
}

template <class T>
Tensor linear(const Tensor& x_in, const Tensor& panels_in, const std::optional<Tensor>& bias_in, int64_t width,
              int64_t activation) {
  constexpr int64_t kPanel = kLinearPanel<T>, kTogether = kLinearTogether<T>;
  const int64_t rows = x_in.size(0), depth = x_in.size(1), parts = depth / kTogether;
  STD_TORCH_CHECK(depth % kTogether == 0, "depth: expected a multiple of ", kTogether, ", got ", depth);
  if constexpr (kTogether == 1)
    check_shape(panels_in, "panels", {ceil_div(width, kPanel), parts, kPanel});
  else
    check_shape(panels_in, "panels", {ceil_div(width, kPanel), parts, kPanel, kTogether});
  check_dtype(panels_in, "panels", {x_in.scalar_type()});
  bool in_place = panels_in.stride(1) == kPanel * kTogether && panels_in.stride(2) == kTogether;
  if constexpr (kTogether > 1) in_place = in_place && panels_in.stride(3) == 1;
  const Tensor x = contiguous(x_in), panels = in_place ? panels_in : contiguous(panels_in);
  Tensor out = empty(x, {rows, width}, x.scalar_type()), bias;
  LinearParams<T> p{static_cast<const T*>(x.const_data_ptr()),
                    static_cast<const T*>(panels.const_data_ptr()),
                    panels.stride(0),
                    nullptr,
                    static_cast<T*>(out.mutable_data_ptr()),
                    rows,
                    depth,
                    width,
                    LinearActivation(activation),
                    is_limited()};
  if (bias_in) {
    check_shape(*bias_in, "bias", {width});
    check_dtype(*bias_in, "bias", {ScalarType::Float});
    bias = contiguous(*bias_in);
    p.bias = bias.const_data_ptr<float>();
  }
  const int64_t groups = ceil_div(rows, kLinearRows);
  const int64_t at_once = grain(kOperation * 2 * kLinearRows * depth * width);
  const int64_t ranges = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(groups, at_once));
  const Tensor scratch = empty(x, {ranges * kLinearScratch<T>}, ScalarType::Float);
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t range, int64_t end) {
    for (; range < end; ++range)
      linear_forward(p, scratch.mutable_data_ptr<float>() + range * kLinearScratch<T>, range * groups / ranges,
                     (range + 1) * groups / ranges);
  });
  return out;
}

Tensor linear_cpu(const Tensor& x, const Tensor& panels, std::optional<Tensor> bias, int64_t width,
                  int64_t activation) {
  check_dtype(x, "x", {ScalarType::Float, ScalarType::BFloat16});
  STD_TORCH_CHECK(x.dim() == 2, "x: expected [rows, depth], got ", shape_string(x));
  check_range(x.size(1), "depth", 1, INT32_MAX);
  check_range(width, "width", 0, INT32_MAX);
  check_range(activation, "activation", 0, 2);
  return x.scalar_type() == ScalarType::Float ? linear<float>(x, panels, bias, width, activation)
                                              : linear<BFloat16>(x, panels, bias, width, activation);
}

}  // namespace
}  // namespace tpt_fast

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) { m.impl("linear", TORCH_BOX(&tpt_fast::linear_cpu)); }
