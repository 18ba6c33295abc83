#include "bias_act.h"

#include "math.h"

namespace tpt_fast {
namespace {

// One loop for every case: `f(x + bias, grad)` is inlined into each.
template <bool kBackward, class T, class F>
void each(const BiasActParams<T>& p, int64_t begin, int64_t end, F f) {
  for (int64_t row = begin; row < end; ++row) {
    const T *x = p.x + row * p.width, *grad = kBackward ? p.grad + row * p.width : nullptr, *bias = p.bias;
    T* out = p.out + row * p.width;
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < p.width; ++i) out[i] = f(x[i] + bias[i], kBackward ? grad[i] : T(0));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < p.width; ++i) out[i] = f(x[i], kBackward ? grad[i] : T(0));
    }
  }
}

}  // namespace

template <class T>
void bias_act_forward(const BiasActParams<T>& p, int64_t begin, int64_t end) {
  if (p.quick)
    each<false>(p, begin, end, [](T x, T) { return quick_gelu(x); });
  else
    each<false>(p, begin, end, [](T x, T) { return gelu(x); });
}

template <class T>
void bias_act_backward(const BiasActParams<T>& p, int64_t begin, int64_t end) {
  if (p.quick)
    each<true>(p, begin, end, [](T x, T grad) { return grad * quick_gelu_slope(x); });
  else
    each<true>(p, begin, end, [](T x, T grad) { return grad * gelu_slope(x); });
}

template void bias_act_forward(const BiasActParams<float>&, int64_t, int64_t);
template void bias_act_forward(const BiasActParams<double>&, int64_t, int64_t);
template void bias_act_backward(const BiasActParams<float>&, int64_t, int64_t);
template void bias_act_backward(const BiasActParams<double>&, int64_t, int64_t);

}  // namespace tpt_fast
