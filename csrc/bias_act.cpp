#include "bias_act.h"

#include "math.h"
#include "rows.h"

namespace tpt_fast {
namespace {

// One loop for every case: `f(x + bias, grad)` is inlined into each.
template <bool kBackward, class T, class F>
void each(const BiasActParams<T>& p, int64_t begin, int64_t end, F f) {
  using A = Accumulate<T>;
  Piece<T> xs, grads, outs;
  for (int64_t row = begin; row < end; ++row) {
    for_pieces<T>(p.width, [&](int64_t first, int64_t n) {
      const int64_t at = row * p.width + first;
      const A *x = xs.read(p.x + at, n), *grad = kBackward ? grads.read(p.grad + at, n) : nullptr;
      A* out = outs.target(p.out + at);
      if (p.bias) {
        const A* bias = p.bias + first;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = f(x[i] + bias[i], kBackward ? grad[i] : A(0));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = f(x[i], kBackward ? grad[i] : A(0));
      }
      outs.write(p.out + at, n);
    });
  }
}

}  // namespace

template <class T>
void bias_act_forward(const BiasActParams<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (p.quick)
    each<false>(p, begin, end, [](A x, A) { return quick_gelu(x); });
  else
    each<false>(p, begin, end, [](A x, A) { return gelu(x); });
}

template <class T>
void bias_act_backward(const BiasActParams<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  if (p.quick)
    each<true>(p, begin, end, [](A x, A grad) { return grad * quick_gelu_slope(x); });
  else
    each<true>(p, begin, end, [](A x, A grad) { return grad * gelu_slope(x); });
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
