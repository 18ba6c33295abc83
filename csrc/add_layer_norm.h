// Residual add and LayerNorm in one pass: sum = x + delta + delta_bias, normed = (sum - mean) * rstd * weight + bias.
#pragma once

#include "common.h"
#include "half.h"

namespace tpt_fast {

template <class T>
struct AddLayerNormParams {
  using A = Accumulate<T>;
  const T* x;           // [rows, width]
  const T* delta;       // [rows, width], or null: nothing is added
  const A* delta_bias;  // [width], or null; needs delta
  const A* weight;      // [width]
  const A* bias;        // [width]
  T* sum;               // [rows, width]; null without delta, where it would be x
  T* normed;            // [rows, width]
  A* mean;              // [rows]
  A* rstd;              // [rows] 1 / sqrt(variance + eps)
  int64_t rows;
  int64_t width;  // >= 1
  double eps;
};

// Items: rows. Writes sum, normed, mean and rstd.
template <class T>
void add_layer_norm_forward(const AddLayerNormParams<T>& p, int64_t begin, int64_t end);

template <class T>
struct AddLayerNormBackwardParams {
  using A = Accumulate<T>;
  const T* grad_normed;  // [rows, width]
  const T* grad_sum;     // [rows, width] what reaches sum by other ways, or null
  const T* sum;          // [rows, width]
  const A* mean;         // [rows]
  const A* rstd;         // [rows]
  const A* weight;       // [width]
  T* grad;               // [rows, width] d loss / d sum in all, which is also that of x and of delta
  int64_t rows;
  int64_t width;
};

// Items: rows. Writes grad.
template <class T>
void add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, int64_t begin, int64_t end);

#ifdef TPT_FAST_CUDA
template <class T>
cudaError_t launch_add_layer_norm(const AddLayerNormParams<T>& p, cudaStream_t stream);

template <class T>
cudaError_t launch_add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
