#include "../csrc/bias_act.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;

constexpr int64_t kElementsAtOnce = 1 << 14;

// `grad` is null in the forward pass.
template <class T>
Tensor bias_act(const Tensor& x_in, const std::optional<Tensor>& bias_in, bool quick, const Tensor* grad_in) {
  const Tensor x = contiguous(x_in);
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected [..., width], got ", shape_string(x));
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  BiasActParams<T> p{x.const_data_ptr<T>(), nullptr, nullptr, nullptr, rows, width, quick};
  Tensor bias, grad, out = torch::stable::empty_like(x);
  if (bias_in) {
    check_shape(*bias_in, "bias", {width});
    check_dtype(*bias_in, "bias", {x.scalar_type()});
    bias = contiguous(*bias_in);
    p.bias = bias.const_data_ptr<T>();
  }
  if (grad_in) {
    STD_TORCH_CHECK(grad_in->sizes().equals(x.sizes()), "grad: expected the shape of x, ", shape_string(x), ", got ",
                    shape_string(*grad_in));
    check_dtype(*grad_in, "grad", {x.scalar_type()});
    grad = contiguous(*grad_in);
    p.grad = grad.const_data_ptr<T>();
  }
  p.out = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, rows, 1 + kElementsAtOnce / (width + 1), [&](int64_t begin, int64_t end) {
    grad_in ? bias_act_backward(p, begin, end) : bias_act_forward(p, begin, end);
  });
  return out;
}

Tensor run(const Tensor& x, const std::optional<Tensor>& bias, bool quick, const Tensor* grad) {
  check_dtype(x, "x", {ScalarType::Float, ScalarType::Double});
  return x.scalar_type() == ScalarType::Float ? bias_act<float>(x, bias, quick, grad)
                                              : bias_act<double>(x, bias, quick, grad);
}

Tensor forward_cpu(const Tensor& x, std::optional<Tensor> bias, bool quick) { return run(x, bias, quick, nullptr); }

Tensor backward_cpu(const Tensor& grad, const Tensor& x, std::optional<Tensor> bias, bool quick) {
  return run(x, bias, quick, &grad);
}

}  // namespace
}  // namespace tpt_fast

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&tpt_fast::forward_cpu));
  m.impl("bias_act_backward", TORCH_BOX(&tpt_fast::backward_cpu));
}
