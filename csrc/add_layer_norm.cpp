#include "add_layer_norm.h"

#include <cmath>
#include <type_traits>

#include "rows.h"

namespace tpt_fast {
namespace {

// What the loops read and write: bfloat16 as it is, halves as floats.
template <class T>
using Held = std::conditional_t<std::is_same_v<T, Half>, float, T>;

// Writes x + (delta + bias); `bias` may be null.
template <class S, class A>
void add(const S* x, const S* delta, const A* bias, S* to, int64_t n) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>(widen(x[i]) + (widen(delta[i]) + bias[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>(widen(x[i]) + widen(delta[i]));
  }
}

template <class S, class A>
void normalise(const S* x, A mean, A rstd, const A* weight, const A* bias, S* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>((widen(x[i]) - mean) * rstd * weight[i] + bias[i]);
}

// Writes the gradient of `sum`; `grad_sum` may be null.
template <class S, class A>
void gradient(const S* grad_normed, const S* grad_sum, const S* sum, const A* weight, A mean, A rstd, A shift, A slope,
              S* grad, int64_t n) {
  if (grad_sum) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      grad[i] = narrow<S>(widen(grad_sum[i]) +
                          rstd * (widen(grad_normed[i]) * weight[i] - shift - (widen(sum[i]) - mean) * slope));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      grad[i] = narrow<S>(rstd * (widen(grad_normed[i]) * weight[i] - shift - (widen(sum[i]) - mean) * slope));
  }
}

}  // namespace

template <class T>
void add_layer_norm_forward(const AddLayerNormParams<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  using S = Held<T>;
  const int64_t width = p.width;
  const A inverse_width = A(1) / static_cast<A>(width);
  Row<T, S> sum(width), delta(width), normed(width);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * width;
    const S* row = sum.read(p.x + at);
    if (p.delta) {
      add(row, delta.read(p.delta + at), p.delta_bias, sum.target(p.sum + at), width);
      sum.write(p.sum + at);
      row = sum.read(p.sum + at);  // statistics are of what is stored
    }
    const A mean = sum_over<A>(width, [=](int64_t j) { return widen(row[j]); }) * inverse_width;
    // Of the centred values: a second pass over a row in the first cache costs little and loses nothing.
    const A squares = sum_over<A>(width, [=](int64_t j) { return (widen(row[j]) - mean) * (widen(row[j]) - mean); });
    const A rstd = A(1) / std::sqrt(squares * inverse_width + static_cast<A>(p.eps));
    normalise(row, mean, rstd, p.weight, p.bias, normed.target(p.normed + at), width);
    normed.write(p.normed + at);
    p.mean[i] = mean;
    p.rstd[i] = rstd;
  }
}

template <class T>
void add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  using S = Held<T>;
  const int64_t width = p.width;
  const A inverse_width = A(1) / static_cast<A>(width);
  Row<T, S> grads(width), sums(width), throughs(width);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * width;
    const A mean = p.mean[i], rstd = p.rstd[i], *weight = p.weight;
    const S *grad = grads.read(p.grad_normed + at), *sum = sums.read(p.sum + at);
    // The gradient of the normalised values summed, and its part along them.
    const A total = sum_over<A>(width, [=](int64_t j) { return widen(grad[j]) * weight[j]; });
    const A along = sum_over<A>(width, [=](int64_t j) { return widen(grad[j]) * weight[j] * (widen(sum[j]) - mean); });
    const A shift = total * inverse_width, slope = along * rstd * rstd * inverse_width;
    gradient(grad, p.grad_sum ? throughs.read(p.grad_sum + at) : nullptr, sum, weight, mean, rstd, shift, slope,
             grads.target(p.grad + at), width);
    grads.write(p.grad + at);
  }
}

#define INSTANTIATE(T)                                                                  \
  template void add_layer_norm_forward(const AddLayerNormParams<T>&, int64_t, int64_t); \
  template void add_layer_norm_backward(const AddLayerNormBackwardParams<T>&, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
#undef INSTANTIATE

}  // namespace tpt_fast
