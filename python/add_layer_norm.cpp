#include "../csrc/add_layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "device.h"
#include "dispatch.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Contiguous memory of an argument that has to be of type `dtype`; `held` keeps it alive.
template <class T>
const T* data(const Tensor& t, const char* name, ScalarType dtype, std::vector<Tensor>& held) {
  check_dtype(t, name, {dtype});
  held.push_back(contiguous(t));
  return static_cast<const T*>(held.back().const_data_ptr());
}

// Rows of the type of x, and a row of the type that x is computed in.
template <class T>
const T* rows_like(const Tensor& t, const char* name, const Tensor& x, std::vector<Tensor>& held) {
  STD_TORCH_CHECK(t.sizes().equals(x.sizes()), name, ": expected shape ", shape_string(x), ", got ", shape_string(t));
  return data<T>(t, name, x.scalar_type(), held);
}

template <class T>
const Accumulate<T>* row_of(const Tensor& t, const char* name, const Tensor& x, std::vector<Tensor>& held) {
  check_shape(t, name, {x.size(-1)});
  return data<Accumulate<T>>(t, name, accumulate_type(x.scalar_type()), held);
}

// Checks, allocates and fills the parameters; `run` computes.
template <class T, class Run>
Outputs forward(const Tensor& x_in, const std::optional<Tensor>& delta, const std::optional<Tensor>& delta_bias,
                const Tensor& weight, const Tensor& bias, double eps, Run run) {
  using A = Accumulate<T>;
  const Tensor x = contiguous(x_in);
  const int64_t width = x.size(-1), rows = x.numel() / width;
  STD_TORCH_CHECK(delta || !delta_bias, "delta_bias: expected none without delta");
  std::vector<Tensor> held;
  const auto statistics = x.sizes().slice(0, x.dim() - 1);
  const ScalarType wide = accumulate_type(x.scalar_type());
  Tensor sum = delta ? torch::stable::empty_like(x) : empty(x, {0}, x.scalar_type());
  Tensor normed = torch::stable::empty_like(x), mean = torch::stable::new_empty(x, statistics, wide),
         rstd = torch::stable::new_empty(x, statistics, wide);
  run(AddLayerNormParams<T>{static_cast<const T*>(x.const_data_ptr()),
                            delta ? rows_like<T>(*delta, "delta", x, held) : nullptr,
                            delta_bias ? row_of<T>(*delta_bias, "delta_bias", x, held) : nullptr,
                            row_of<T>(weight, "weight", x, held), row_of<T>(bias, "bias", x, held),
                            static_cast<T*>(sum.mutable_data_ptr()), static_cast<T*>(normed.mutable_data_ptr()),
                            mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>(), rows, width, eps});
  return {sum, normed, mean, rstd};
}

template <class T, class Run>
Tensor backward(const Tensor& grad_normed, const std::optional<Tensor>& grad_sum, const Tensor& sum_in,
                const Tensor& mean, const Tensor& rstd, const Tensor& weight, Run run) {
  using A = Accumulate<T>;
  const Tensor sum = contiguous(sum_in);
  const int64_t width = sum.size(-1), rows = sum.numel() / width;
  const ScalarType wide = accumulate_type(sum.scalar_type());
  for (const auto& [t, name] : {std::pair{&mean, "mean"}, std::pair{&rstd, "rstd"}})
    STD_TORCH_CHECK(t->numel() == rows, name, ": expected ", rows, " values, one a row, got ", shape_string(*t));
  std::vector<Tensor> held;
  Tensor grad = torch::stable::empty_like(sum);
  run(AddLayerNormBackwardParams<T>{rows_like<T>(grad_normed, "grad_normed", sum, held),
                                    grad_sum ? rows_like<T>(*grad_sum, "grad_sum", sum, held) : nullptr,
                                    static_cast<const T*>(sum.const_data_ptr()), data<A>(mean, "mean", wide, held),
                                    data<A>(rstd, "rstd", wide, held), row_of<T>(weight, "weight", sum, held),
                                    static_cast<T*>(grad.mutable_data_ptr()), rows, width});
  return grad;
}

void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, name, ": expected [..., width], got ", shape_string(x));
}

#ifndef TPT_FAST_CUDA
Outputs forward_cpu(const Tensor& x, std::optional<Tensor> delta, std::optional<Tensor> delta_bias,
                    const Tensor& weight, const Tensor& bias, double eps) {
  check_rows(x, "x");
  const auto run = [](const auto& p) {
    torch::stable::parallel_for(0, p.rows, grain(kNormalise * p.width),
                                [&](int64_t begin, int64_t end) { add_layer_norm_forward(p, begin, end); });
  };
  return with_type(x, "x", [&]<class T>(T) { return forward<T>(x, delta, delta_bias, weight, bias, eps, run); });
}

Tensor backward_cpu(const Tensor& grad_normed, std::optional<Tensor> grad_sum, const Tensor& sum, const Tensor& mean,
                    const Tensor& rstd, const Tensor& weight) {
  check_rows(sum, "sum");
  const auto run = [](const auto& p) {
    torch::stable::parallel_for(0, p.rows, grain(kNormalise * p.width),
                                [&](int64_t begin, int64_t end) { add_layer_norm_backward(p, begin, end); });
  };
  return with_type(sum, "sum",
                   [&]<class T>(T) { return backward<T>(grad_normed, grad_sum, sum, mean, rstd, weight, run); });
}

#else
Outputs forward_cuda(const Tensor& x, std::optional<Tensor> delta, std::optional<Tensor> delta_bias,
                     const Tensor& weight, const Tensor& bias, double eps) {
  check_rows(x, "x");
  const OnDevice device(x);
  for (const Tensor* t : {&weight, &bias}) check_device(*t, "weight and bias", x);
  for (const auto* t : {&delta, &delta_bias})
    if (*t) check_device(**t, "delta and delta_bias", x);
  const auto run = [&](const auto& p) { check_launch(launch_add_layer_norm(p, device.stream()), "add_layer_norm"); };
  return with_type(x, "x", [&]<class T>(T) { return forward<T>(x, delta, delta_bias, weight, bias, eps, run); });
}

Tensor backward_cuda(const Tensor& grad_normed, std::optional<Tensor> grad_sum, const Tensor& sum, const Tensor& mean,
                     const Tensor& rstd, const Tensor& weight) {
  check_rows(sum, "sum");
  const OnDevice device(sum);
  for (const Tensor* t : {&grad_normed, &mean, &rstd, &weight})
    check_device(*t, "grad_normed, mean, rstd, weight", sum);
  if (grad_sum) check_device(*grad_sum, "grad_sum", sum);
  const auto run = [&](const auto& p) {
    check_launch(launch_add_layer_norm_backward(p, device.stream()), "add_layer_norm_backward");
  };
  return with_type(sum, "sum",
                   [&]<class T>(T) { return backward<T>(grad_normed, grad_sum, sum, mean, rstd, weight, run); });
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&tpt_fast::forward_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&tpt_fast::backward_cpu));
}
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) {
  m.impl("add_layer_norm", TORCH_BOX(&tpt_fast::forward_cuda));
  m.impl("add_layer_norm_backward", TORCH_BOX(&tpt_fast::backward_cuda));
}
#endif
