#include "../csrc/add_layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kElementsAtOnce = 1 << 14;

// Contiguous memory of an argument that has to have the type of x; `held` keeps it alive.
template <class T>
const T* data(const Tensor& t, const char* name, const Tensor& x, std::vector<Tensor>& held) {
  check_dtype(t, name, {x.scalar_type()});
  held.push_back(contiguous(t));
  return held.back().const_data_ptr<T>();
}

template <class T>
const T* rows_like(const Tensor& t, const char* name, const Tensor& x, std::vector<Tensor>& held) {
  STD_TORCH_CHECK(t.sizes().equals(x.sizes()), name, ": expected shape ", shape_string(x), ", got ", shape_string(t));
  return data<T>(t, name, x, held);
}

template <class T>
const T* row_of(const Tensor& t, const char* name, const Tensor& x, std::vector<Tensor>& held) {
  check_shape(t, name, {x.size(-1)});
  return data<T>(t, name, x, held);
}

template <class T>
Outputs forward(const Tensor& x_in, const std::optional<Tensor>& delta, const std::optional<Tensor>& delta_bias,
                const Tensor& weight, const Tensor& bias, double eps) {
  const Tensor x = contiguous(x_in);
  const int64_t width = x.size(-1), rows = x.numel() / width;
  STD_TORCH_CHECK(delta || !delta_bias, "delta_bias: expected none without delta");
  std::vector<Tensor> held;
  const auto statistics = x.sizes().slice(0, x.dim() - 1);
  Tensor sum = delta ? torch::stable::empty_like(x) : empty(x, {0}, x.scalar_type());
  Tensor normed = torch::stable::empty_like(x), mean = torch::stable::new_empty(x, statistics),
         rstd = torch::stable::new_empty(x, statistics);
  const AddLayerNormParams<T> p{x.const_data_ptr<T>(),
                                delta ? rows_like<T>(*delta, "delta", x, held) : nullptr,
                                delta_bias ? row_of<T>(*delta_bias, "delta_bias", x, held) : nullptr,
                                row_of<T>(weight, "weight", x, held),
                                row_of<T>(bias, "bias", x, held),
                                sum.mutable_data_ptr<T>(),
                                normed.mutable_data_ptr<T>(),
                                mean.mutable_data_ptr<T>(),
                                rstd.mutable_data_ptr<T>(),
                                rows,
                                width,
                                eps};
  torch::stable::parallel_for(0, rows, 1 + kElementsAtOnce / width,
                              [&](int64_t begin, int64_t end) { add_layer_norm_forward(p, begin, end); });
  return {sum, normed, mean, rstd};
}

template <class T>
Tensor backward(const Tensor& grad_normed, const std::optional<Tensor>& grad_sum, const Tensor& sum_in,
                const Tensor& mean, const Tensor& rstd, const Tensor& weight) {
  const Tensor sum = contiguous(sum_in);
  const int64_t width = sum.size(-1), rows = sum.numel() / width;
  for (const auto& [t, name] : {std::pair{&mean, "mean"}, std::pair{&rstd, "rstd"}})
    STD_TORCH_CHECK(t->numel() == rows, name, ": expected ", rows, " values, one a row, got ", shape_string(*t));
  std::vector<Tensor> held;
  Tensor grad = torch::stable::empty_like(sum);
  const AddLayerNormBackwardParams<T> p{rows_like<T>(grad_normed, "grad_normed", sum, held),
                                        grad_sum ? rows_like<T>(*grad_sum, "grad_sum", sum, held) : nullptr,
                                        sum.const_data_ptr<T>(),
                                        data<T>(mean, "mean", sum, held),
                                        data<T>(rstd, "rstd", sum, held),
                                        row_of<T>(weight, "weight", sum, held),
                                        grad.mutable_data_ptr<T>(),
                                        rows,
                                        width};
  torch::stable::parallel_for(0, rows, 1 + kElementsAtOnce / width,
                              [&](int64_t begin, int64_t end) { add_layer_norm_backward(p, begin, end); });
  return grad;
}

void check_rows(const Tensor& x, const char* name) {
  check_dtype(x, name, {ScalarType::Float, ScalarType::Double});
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, name, ": expected [..., width], got ", shape_string(x));
}

Outputs forward_cpu(const Tensor& x, std::optional<Tensor> delta, std::optional<Tensor> delta_bias,
                    const Tensor& weight, const Tensor& bias, double eps) {
  check_rows(x, "x");
  return x.scalar_type() == ScalarType::Float ? forward<float>(x, delta, delta_bias, weight, bias, eps)
                                              : forward<double>(x, delta, delta_bias, weight, bias, eps);
}

Tensor backward_cpu(const Tensor& grad_normed, std::optional<Tensor> grad_sum, const Tensor& sum, const Tensor& mean,
                    const Tensor& rstd, const Tensor& weight) {
  check_rows(sum, "sum");
  return sum.scalar_type() == ScalarType::Float ? backward<float>(grad_normed, grad_sum, sum, mean, rstd, weight)
                                                : backward<double>(grad_normed, grad_sum, sum, mean, rstd, weight);
}

}  // namespace
}  // namespace tpt_fast

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&tpt_fast::forward_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&tpt_fast::backward_cpu));
}
