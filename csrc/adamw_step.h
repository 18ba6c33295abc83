// One step of AdamW (Loshchilov and Hutter, 2019) as torch.optim.AdamW takes it, on a context a batch item.
#pragma once

#include <cmath>

#include "common.h"

namespace tpt_fast {

template <class T>
struct AdamwStepParams {
  const T* context;     // [B, n], n = n_ctx * width
  const T* grad;        // [B, n]
  const T* exp_avg;     // [B, n], or null: zero, the state of a fresh optimizer; then exp_avg_sq and step are null too
  const T* exp_avg_sq;  // [B, n]
  const int64_t* step;  // [B] steps taken
  T* context_out;       // [B, n]; any output may be its input
  T* exp_avg_out;       // [B, n]
  T* exp_avg_sq_out;    // [B, n]
  int64_t* step_out;    // [B] one more, except where the gradient is not finite and skip_nonfinite is set
  int64_t batch;        // B
  int64_t n;
  double lr, beta1, beta2, eps, weight_decay;
  bool skip_nonfinite;  // an item whose gradient is not finite everywhere keeps context and state
};

// Items: the B contexts.
template <class T>
void adamw_step(const AdamwStepParams<T>& p, int64_t begin, int64_t end);

// What the elements of one item share; computed in double, applied in T, as torch does.
template <class T>
struct AdamwScalars {
  T decay, weight1, beta2, weight2, step_size, root2, eps;
};

template <class T>
TPT_FAST_HOST_DEVICE AdamwScalars<T> adamw_scalars(const AdamwStepParams<T>& p, int64_t step) {
  // The first step is the usual one, and a power in double the most of what a GPU has to do in it.
  const auto power = [step](double base) { return step == 1 ? base : ::pow(base, static_cast<double>(step)); };
  const double correction1 = 1.0 - power(p.beta1), correction2 = 1.0 - power(p.beta2);
  return {static_cast<T>(1.0 - p.lr * p.weight_decay),
          static_cast<T>(1.0 - p.beta1),
          static_cast<T>(p.beta2),
          static_cast<T>(1.0 - p.beta2),
          static_cast<T>(p.lr / correction1),
          static_cast<T>(::sqrt(correction2)),
          static_cast<T>(p.eps)};
}

// One element; `m` and `v` are updated.
template <class T>
TPT_FAST_HOST_DEVICE T adamw_element(const AdamwScalars<T>& s, T context, T grad, T& m, T& v) {
  m = s.weight1 < T(0.5) ? m + s.weight1 * (grad - m) : grad - (grad - m) * (T(1) - s.weight1);  // torch's lerp
  v = s.beta2 * v + s.weight2 * grad * grad;
  return context * s.decay - s.step_size * (m / (std::sqrt(v) / s.root2 + s.eps));
}

#ifdef TPT_FAST_CUDA
// One launch, a block a context; decides on the device whether to skip.
template <class T>
cudaError_t launch_adamw_step(const AdamwStepParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
