#include "add_layer_norm.h"

#include <cmath>

#include "rows.h"

namespace tpt_fast {
namespace {

template <class A>
A total_of(const A* x, int64_t n) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

// Writes x + (delta + bias) and returns its total; `bias` may be null.
template <class A>
A add(const A* x, const A* delta, const A* bias, A* to, int64_t n) {
  A total = 0;
  if (bias) {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += to[i] = x[i] + (delta[i] + bias[i]);
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += to[i] = x[i] + delta[i];
  }
  return total;
}

template <class A>
A squares_of(const A* x, A mean, int64_t n) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return squares;
}

template <class A>
void normalise(const A* x, A mean, A rstd, const A* weight, const A* bias, A* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
}

// Sums of the gradient of the normalised values, and of its part along them.
template <class A>
struct Sums {
  A total = 0, along = 0;
};

template <class A>
Sums<A> sums_of(const A* grad_normed, const A* sum, const A* weight, A mean, int64_t n) {
  A total = 0, along = 0;
#pragma omp simd reduction(+ : total, along)
  for (int64_t i = 0; i < n; ++i) {
    const A g = grad_normed[i] * weight[i];
    total += g;
    along += g * (sum[i] - mean);
  }
  return {total, along};
}

// Writes the gradient of `sum`; `grad_sum` may be null.
template <class A>
void gradient(const A* grad_normed, const A* grad_sum, const A* sum, const A* weight, A mean, A rstd, A shift, A slope,
              A* grad, int64_t n) {
  if (grad_sum) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      grad[i] = grad_sum[i] + rstd * (grad_normed[i] * weight[i] - shift - (sum[i] - mean) * slope);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad[i] = rstd * (grad_normed[i] * weight[i] - shift - (sum[i] - mean) * slope);
  }
}

}  // namespace

template <class T>
void add_layer_norm_forward(const AddLayerNormParams<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t width = p.width;
  const A inverse_width = A(1) / static_cast<A>(width);
  Piece<T> one, two;
  for (int64_t row = begin; row < end; ++row) {
    const T *x = p.x + row * width, *sum = p.delta ? p.sum + row * width : x;
    A total = 0;
    for_pieces<T>(width, [&](int64_t at, int64_t n) {
      A added = 0;
      if (p.delta) {
        T* to = p.sum + row * width + at;
        const A *delta = two.read(p.delta + row * width + at, n), *bias = p.delta_bias ? p.delta_bias + at : nullptr;
        added = add(one.read(x + at, n), delta, bias, one.target(to), n);
        one.write(to, n);
      }
      total += p.delta && Piece<T>::kInPlace ? added : total_of(one.read(sum + at, n), n);  // of what is stored
    });
    const A mean = total * inverse_width;
    A squares = 0;  // of the centred values: a second pass over a row in the first cache costs little and loses nothing
    for_pieces<T>(width, [&](int64_t at, int64_t n) { squares += squares_of(one.read(sum + at, n), mean, n); });
    const A rstd = A(1) / std::sqrt(squares * inverse_width + static_cast<A>(p.eps));
    for_pieces<T>(width, [&](int64_t at, int64_t n) {
      T* to = p.normed + row * width + at;
      normalise(one.read(sum + at, n), mean, rstd, p.weight + at, p.bias + at, two.target(to), n);
      two.write(to, n);
    });
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

template <class T>
void add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t width = p.width;
  const A inverse_width = A(1) / static_cast<A>(width);
  Piece<T> grads, sums, throughs;
  for (int64_t row = begin; row < end; ++row) {
    const A mean = p.mean[row], rstd = p.rstd[row];
    Sums<A> row_sums;
    for_pieces<T>(width, [&](int64_t first, int64_t n) {
      const int64_t at = row * width + first;
      const Sums<A> part =
          sums_of(grads.read(p.grad_normed + at, n), sums.read(p.sum + at, n), p.weight + first, mean, n);
      row_sums.total += part.total;
      row_sums.along += part.along;
    });
    const A shift = row_sums.total * inverse_width, slope = row_sums.along * rstd * rstd * inverse_width;
    for_pieces<T>(width, [&](int64_t first, int64_t n) {
      const int64_t at = row * width + first;
      gradient(grads.read(p.grad_normed + at, n), p.grad_sum ? throughs.read(p.grad_sum + at, n) : nullptr,
               sums.read(p.sum + at, n), p.weight + first, mean, rstd, shift, slope, grads.target(p.grad + at), n);
      grads.write(p.grad + at, n);
    });
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
