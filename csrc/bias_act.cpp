#include "bias_act.h"

#include "elementary.h"
#include "rows.h"

namespace tpt_fast {
namespace {

constexpr auto kGelu = [](auto x, auto) { return gelu(x); };
constexpr auto kGeluGrad = [](auto x, auto grad) { return grad * gelu_slope(x); };
constexpr auto kQuickGelu = [](auto x, auto) { return quick_gelu(x); };
constexpr auto kQuickGeluGrad = [](auto x, auto grad) { return grad * quick_gelu_slope(x); };

// One loop for every case: `f(x + bias, grad)` is inlined into each, and it into nothing, so that float and the 16-bit
// types share the code.
template <bool kBackward, class A, class F>
[[gnu::noinline]] void row(const A* x, const A* bias, const A* grad, A* out, int64_t n, F f) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = f(x[i] + bias[i], kBackward ? grad[i] : A(0));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = f(x[i], kBackward ? grad[i] : A(0));
  }
}

template <bool kBackward, class T, class F>
void each(const BiasActParams<T>& p, int64_t begin, int64_t end, F f) {
  using A = Accumulate<T>;
  Row<T> xs(p.width), grads(p.width);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * p.width;
    const A *x = xs.read(p.x + at), *grad = kBackward ? grads.read(p.grad + at) : nullptr;
    row<kBackward>(x, p.bias, grad, xs.target(p.out + at), p.width, f);
    xs.write(p.out + at);
  }
}

}  // namespace

template <class T>
void bias_act_forward(const BiasActParams<T>& p, int64_t begin, int64_t end) {
  p.quick ? each<false>(p, begin, end, kQuickGelu) : each<false>(p, begin, end, kGelu);
}

template <class T>
void bias_act_backward(const BiasActParams<T>& p, int64_t begin, int64_t end) {
  p.quick ? each<true>(p, begin, end, kQuickGeluGrad) : each<true>(p, begin, end, kGeluGrad);
}

#define INSTANTIATE(T)                                                       \
  template void bias_act_forward(const BiasActParams<T>&, int64_t, int64_t); \
  template void bias_act_backward(const BiasActParams<T>&, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
#undef INSTANTIATE

}  // namespace tpt_fast
