#include "add_layer_norm.h"

#include <cmath>

namespace tpt_fast {

template <class T>
void add_layer_norm_forward(const AddLayerNormParams<T>& p, int64_t begin, int64_t end) {
  const int64_t width = p.width;
  const T inverse_width = T(1) / static_cast<T>(width);
  for (int64_t row = begin; row < end; ++row) {
    const T* sum = p.x + row * width;
    T total = 0;
    if (p.delta) {
      const T *x = sum, *delta = p.delta + row * width, *delta_bias = p.delta_bias;
      T* to = p.sum + row * width;
      if (delta_bias) {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) total += to[i] = x[i] + (delta[i] + delta_bias[i]);
      } else {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) total += to[i] = x[i] + delta[i];
      }
      sum = to;
    } else {
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < width; ++i) total += sum[i];
    }
    const T mean = total * inverse_width;
    T squares = 0;  // of the centred values: a second pass over a row in the first cache costs little and loses nothing
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (sum[i] - mean) * (sum[i] - mean);
    const T rstd = T(1) / std::sqrt(squares * inverse_width + static_cast<T>(p.eps));
    T* normed = p.normed + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) normed[i] = (sum[i] - mean) * rstd * p.weight[i] + p.bias[i];
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

template <class T>
void add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, int64_t begin, int64_t end) {
  const int64_t width = p.width;
  const T inverse_width = T(1) / static_cast<T>(width);
  for (int64_t row = begin; row < end; ++row) {
    const T *grad_normed = p.grad_normed + row * width, *sum = p.sum + row * width, *weight = p.weight;
    const T mean = p.mean[row], rstd = p.rstd[row];
    T total = 0, along = 0;  // of the gradient of the normalised values, and of its part along them
#pragma omp simd reduction(+ : total, along)
    for (int64_t i = 0; i < width; ++i) {
      const T g = grad_normed[i] * weight[i];
      total += g;
      along += g * (sum[i] - mean);
    }
    const T shift = total * inverse_width, slope = along * rstd * rstd * inverse_width;
    T* grad = p.grad + row * width;
    if (p.grad_sum) {
      const T* grad_sum = p.grad_sum + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        grad[i] = grad_sum[i] + rstd * (grad_normed[i] * weight[i] - shift - (sum[i] - mean) * slope);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        grad[i] = rstd * (grad_normed[i] * weight[i] - shift - (sum[i] - mean) * slope);
    }
  }
}

template void add_layer_norm_forward(const AddLayerNormParams<float>&, int64_t, int64_t);
template void add_layer_norm_forward(const AddLayerNormParams<double>&, int64_t, int64_t);
template void add_layer_norm_backward(const AddLayerNormBackwardParams<float>&, int64_t, int64_t);
template void add_layer_norm_backward(const AddLayerNormBackwardParams<double>&, int64_t, int64_t);

}  // namespace tpt_fast
