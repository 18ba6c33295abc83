#include "../csrc/adamw_step.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device.h"
#include "dispatch.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using torch::stable::contiguous;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Optional = std::optional<Tensor>;

struct Settings {
  double lr, beta1, beta2, eps, weight_decay;
  bool skip_nonfinite;
};

// Checks, allocates and fills the parameters; `run` computes.
template <class T, class Run>
Outputs step_with(const Tensor& context_in, const Tensor& grad_in, const Optional& exp_avg_in,
                  const Optional& exp_avg_sq_in, const Optional& step_in, const Settings& settings, Run run) {
  STD_TORCH_CHECK(context_in.dim() == 3, "context: expected [B, n_ctx, width], got ", shape_string(context_in));
  const Tensor context = contiguous(context_in);
  const int64_t batch = context.size(0);
  const ScalarType dtype = context.scalar_type();
  const auto same = [&](const Tensor& t, const char* name) {
    check_shape(t, name, {batch, context.size(1), context.size(2)});
    check_dtype(t, name, {dtype});
    return contiguous(t);
  };
  const Tensor grad = same(grad_in, "grad");
  Tensor exp_avg, exp_avg_sq, step;
  Tensor context_out = torch::stable::empty_like(context), exp_avg_out = torch::stable::empty_like(context),
         exp_avg_sq_out = torch::stable::empty_like(context), step_out = empty(context, {batch}, ScalarType::Long);
  AdamwStepParams<T> p{};
  p.context = context.const_data_ptr<T>();
  p.grad = grad.const_data_ptr<T>();
  STD_TORCH_CHECK(exp_avg_in.has_value() == exp_avg_sq_in.has_value() && exp_avg_in.has_value() == step_in.has_value(),
                  "exp_avg: expected exp_avg, exp_avg_sq and step together or not at all");
  if (exp_avg_in) {
    exp_avg = same(*exp_avg_in, "exp_avg");
    exp_avg_sq = same(*exp_avg_sq_in, "exp_avg_sq");
    check_shape(*step_in, "step", {batch});
    check_dtype(*step_in, "step", {ScalarType::Long});
    step = contiguous(*step_in);
    p.exp_avg = exp_avg.const_data_ptr<T>();
    p.exp_avg_sq = exp_avg_sq.const_data_ptr<T>();
    p.step = step.const_data_ptr<int64_t>();
  }
  p.context_out = context_out.mutable_data_ptr<T>();
  p.exp_avg_out = exp_avg_out.mutable_data_ptr<T>();
  p.exp_avg_sq_out = exp_avg_sq_out.mutable_data_ptr<T>();
  p.step_out = step_out.mutable_data_ptr<int64_t>();
  p.batch = batch;
  p.n = context.size(1) * context.size(2);
  p.lr = settings.lr, p.beta1 = settings.beta1, p.beta2 = settings.beta2, p.eps = settings.eps;
  p.weight_decay = settings.weight_decay;
  p.skip_nonfinite = settings.skip_nonfinite;
  run(p);
  return {context_out, exp_avg_out, exp_avg_sq_out, step_out};
}

#ifndef TPT_FAST_CUDA
Outputs adamw_step_cpu(const Tensor& context, const Tensor& grad, Optional exp_avg, Optional exp_avg_sq, Optional step,
                       double lr, double beta1, double beta2, double eps, double weight_decay, bool skip_nonfinite) {
  const Settings settings{lr, beta1, beta2, eps, weight_decay, skip_nonfinite};
  const auto run = [](const auto& p) {
    torch::stable::parallel_for(0, p.batch, grain(kNormalise * p.n),
                                [&](int64_t begin, int64_t end) { adamw_step(p, begin, end); });
  };
  return with_wide_type(context, "context", [&]<class T>(T) {
    return step_with<T>(context, grad, exp_avg, exp_avg_sq, step, settings, run);
  });
}

#else
Outputs adamw_step_cuda(const Tensor& context, const Tensor& grad, Optional exp_avg, Optional exp_avg_sq, Optional step,
                        double lr, double beta1, double beta2, double eps, double weight_decay, bool skip_nonfinite) {
  const Settings settings{lr, beta1, beta2, eps, weight_decay, skip_nonfinite};
  const OnDevice device(context);
  check_device(grad, "grad", context);
  for (const Optional* t : {&exp_avg, &exp_avg_sq, &step})
    if (*t) check_device(**t, "exp_avg, exp_avg_sq and step", context);
  const auto run = [&](const auto& p) { check_launch(launch_adamw_step(p, device.stream()), "adamw_step"); };
  return with_wide_type(context, "context", [&]<class T>(T) {
    return step_with<T>(context, grad, exp_avg, exp_avg_sq, step, settings, run);
  });
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) { m.impl("adamw_step", TORCH_BOX(&tpt_fast::adamw_step_cpu)); }
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) { m.impl("adamw_step", TORCH_BOX(&tpt_fast::adamw_step_cuda)); }
#endif
