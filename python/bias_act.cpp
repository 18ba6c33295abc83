#include "../csrc/bias_act.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "device.h"
#include "dispatch.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;

enum class Result { kNew, kInPlace };

// Checks, allocates and fills the parameters; `run` computes. `grad` is null in the forward pass.
template <class T, class Run>
Tensor bias_act(const Tensor& x_in, const std::optional<Tensor>& bias_in, bool quick, const Tensor* grad_in,
                Result result, Run run) {
  const Tensor x = contiguous(x_in);
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected [..., width], got ", shape_string(x));
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  BiasActParams<T> p{static_cast<const T*>(x.const_data_ptr()), nullptr, nullptr, nullptr, rows, width, quick};
  STD_TORCH_CHECK(result == Result::kNew || x_in.is_contiguous(), "x: expected a contiguous tensor");
  Tensor bias, grad, out = result == Result::kNew ? torch::stable::empty_like(x) : x;
  if (bias_in) {
    check_shape(*bias_in, "bias", {width});
    check_dtype(*bias_in, "bias", {accumulate_type(x.scalar_type())});
    bias = contiguous(*bias_in);
    p.bias = bias.const_data_ptr<Accumulate<T>>();
  }
  if (grad_in) {
    STD_TORCH_CHECK(grad_in->sizes().equals(x.sizes()), "grad: expected the shape of x, ", shape_string(x), ", got ",
                    shape_string(*grad_in));
    check_dtype(*grad_in, "grad", {x.scalar_type()});
    grad = contiguous(*grad_in);
    p.grad = static_cast<const T*>(grad.const_data_ptr());
  }
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run(p);
  return out;
}

#ifndef TPT_FAST_CUDA
Tensor on_cpu(const Tensor& x, const std::optional<Tensor>& bias, bool quick, const Tensor* grad,
              Result result = Result::kNew) {
  const auto run = [&](const auto& p) {
    torch::stable::parallel_for(0, p.rows, grain(kExponential * p.width), [&](int64_t begin, int64_t end) {
      grad ? bias_act_backward(p, begin, end) : bias_act_forward(p, begin, end);
    });
  };
  return with_type(x, "x", [&]<class T>(T) { return bias_act<T>(x, bias, quick, grad, result, run); });
}

Tensor forward_cpu(const Tensor& x, std::optional<Tensor> bias, bool quick) { return on_cpu(x, bias, quick, nullptr); }

void in_place_cpu(Tensor x, std::optional<Tensor> bias, bool quick) {
  on_cpu(x, bias, quick, nullptr, Result::kInPlace);
}

Tensor backward_cpu(const Tensor& grad, const Tensor& x, std::optional<Tensor> bias, bool quick) {
  return on_cpu(x, bias, quick, &grad);
}

#else
Tensor on_cuda(const Tensor& x, const std::optional<Tensor>& bias, bool quick, const Tensor* grad,
               Result result = Result::kNew) {
  const OnDevice device(x);
  if (bias) check_device(*bias, "bias", x);
  if (grad) check_device(*grad, "grad", x);
  const auto run = [&](const auto& p) {
    check_launch(grad ? launch_bias_act_backward(p, device.stream()) : launch_bias_act_forward(p, device.stream()),
                 "bias_act");
  };
  return with_type(x, "x", [&]<class T>(T) { return bias_act<T>(x, bias, quick, grad, result, run); });
}

Tensor forward_cuda(const Tensor& x, std::optional<Tensor> bias, bool quick) {
  return on_cuda(x, bias, quick, nullptr);
}

void in_place_cuda(Tensor x, std::optional<Tensor> bias, bool quick) {
  on_cuda(x, bias, quick, nullptr, Result::kInPlace);
}

Tensor backward_cuda(const Tensor& grad, const Tensor& x, std::optional<Tensor> bias, bool quick) {
  return on_cuda(x, bias, quick, &grad);
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&tpt_fast::forward_cpu));
  m.impl("bias_act_", TORCH_BOX(&tpt_fast::in_place_cpu));
  m.impl("bias_act_backward", TORCH_BOX(&tpt_fast::backward_cpu));
}
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&tpt_fast::forward_cuda));
  m.impl("bias_act_", TORCH_BOX(&tpt_fast::in_place_cuda));
  m.impl("bias_act_backward", TORCH_BOX(&tpt_fast::backward_cuda));
}
#endif
