#include "../csrc/linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;

Tensor linear_cpu(const Tensor& x_in, const Tensor& panels_in, std::optional<Tensor> bias_in, int64_t width,
                  int64_t activation) {
  check_dtype(x_in, "x", {ScalarType::Float});
  STD_TORCH_CHECK(x_in.dim() == 2, "x: expected [rows, depth], got ", shape_string(x_in));
  const int64_t rows = x_in.size(0), depth = x_in.size(1);
  check_range(depth, "depth", 1, INT32_MAX);
  check_range(width, "width", 0, INT32_MAX);
  check_range(activation, "activation", 0, 2);
  check_shape(panels_in, "panels", {ceil_div(width, kLinearPanel), depth, kLinearPanel});
  check_dtype(panels_in, "panels", {ScalarType::Float});
  const bool in_place = panels_in.stride(1) == kLinearPanel && panels_in.stride(2) == 1;
  const Tensor x = contiguous(x_in), panels = in_place ? panels_in : contiguous(panels_in);
  Tensor out = empty(x, {rows, width}, ScalarType::Float), bias;
  LinearParams p{x.const_data_ptr<float>(),
                 panels.const_data_ptr<float>(),
                 panels.stride(0),
                 nullptr,
                 out.mutable_data_ptr<float>(),
                 rows,
                 depth,
                 width,
                 LinearActivation(activation)};
  if (bias_in) {
    check_shape(*bias_in, "bias", {width});
    check_dtype(*bias_in, "bias", {ScalarType::Float});
    bias = contiguous(*bias_in);
    p.bias = bias.const_data_ptr<float>();
  }
  const int64_t groups = ceil_div(rows, kLinearRows);
  const int64_t at_once = grain(kOperation * 2 * kLinearRows * depth * width);
  const int64_t ranges = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(groups, at_once));
  const Tensor scratch = empty(x, {ranges * kLinearScratch}, ScalarType::Float);
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t range, int64_t end) {
    for (; range < end; ++range)
      linear_forward(p, scratch.mutable_data_ptr<float>() + range * kLinearScratch, range * groups / ranges,
                     (range + 1) * groups / ranges);
  });
  return out;
}

}  // namespace
}  // namespace tpt_fast

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) { m.impl("linear", TORCH_BOX(&tpt_fast::linear_cpu)); }
