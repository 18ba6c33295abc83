#include "adamw_step.h"

#include <algorithm>

namespace tpt_fast {

template <class T>
void adamw_step(const AdamwStepParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t at = item * p.n;
    const T *context = p.context + at, *grad = p.grad + at;
    T *context_out = p.context_out + at, *exp_avg = p.exp_avg_out + at, *exp_avg_sq = p.exp_avg_sq_out + at;
    const int64_t step = p.step ? p.step[item] : 0;
    if (p.exp_avg) {
      std::copy(p.exp_avg + at, p.exp_avg + at + p.n, exp_avg);
      std::copy(p.exp_avg_sq + at, p.exp_avg_sq + at + p.n, exp_avg_sq);
    } else {
      std::fill(exp_avg, exp_avg + p.n, T(0));
      std::fill(exp_avg_sq, exp_avg_sq + p.n, T(0));
    }
    const bool skip = p.skip_nonfinite && !std::all_of(grad, grad + p.n, [](T g) { return std::isfinite(g); });
    p.step_out[item] = step + !skip;
    if (skip) {
      std::copy(context, context + p.n, context_out);
      continue;
    }
    const AdamwScalars<T> s = adamw_scalars(p, step + 1);
#pragma omp simd
    for (int64_t i = 0; i < p.n; ++i) context_out[i] = adamw_element(s, context[i], grad[i], exp_avg[i], exp_avg_sq[i]);
  }
}

template void adamw_step(const AdamwStepParams<float>&, int64_t, int64_t);
template void adamw_step(const AdamwStepParams<double>&, int64_t, int64_t);

}  // namespace tpt_fast
