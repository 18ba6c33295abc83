// Residual add and LayerNorm in one pass: sum = x + delta + delta_bias, normed = (sum - mean) * rstd * weight + bias.
#pragma once

#include "common.h"

namespace tpt_fast {

template <class T>
struct AddLayerNormParams {
  const T* x;           // [rows, width]
  const T* delta;       // [rows, width], or null: nothing is added
  const T* delta_bias;  // [width], or null; needs delta
  const T* weight;      // [width]
  const T* bias;        // [width]
  T* sum;               // [rows, width]; null without delta, where it would be x
  T* normed;            // [rows, width]
  T* mean;              // [rows]
  T* rstd;              // [rows] 1 / sqrt(variance + eps)
  int64_t rows;
  int64_t width;  // >= 1
  double eps;
};

// Items: rows. Writes sum, normed, mean and rstd.
template <class T>
void add_layer_norm_forward(const AddLayerNormParams<T>& p, int64_t begin, int64_t end);

template <class T>
struct AddLayerNormBackwardParams {
  const T* grad_normed;  // [rows, width]
  const T* grad_sum;     // [rows, width] what reaches sum by other ways, or null
  const T* sum;          // [rows, width]
  const T* mean;         // [rows]
  const T* rstd;         // [rows]
  const T* weight;       // [width]
  T* grad;               // [rows, width] d loss / d sum in all, which is also that of x and of delta
  int64_t rows;
  int64_t width;
};

// Items: rows. Writes grad.
template <class T>
void add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, int64_t begin, int64_t end);

}  // namespace tpt_fast
