// Bias and activation of a transformer's MLP: GELU (with erf) or QuickGELU (x * sigmoid(1.702 x)).
#pragma once

#include "common.h"
#include "half.h"

namespace tpt_fast {

template <class T>
struct BiasActParams {
  const T* x;                 // [rows, width], before the bias
  const Accumulate<T>* bias;  // [width], or null
  const T* grad;              // [rows, width] d loss / d y; backward only
  T* out;                     // [rows, width] y, or d loss / d x; may be x
  int64_t rows;
  int64_t width;
  bool quick;  // QuickGELU
};

// Items: rows.
template <class T>
void bias_act_forward(const BiasActParams<T>& p, int64_t begin, int64_t end);

template <class T>
void bias_act_backward(const BiasActParams<T>& p, int64_t begin, int64_t end);

#ifdef TPT_FAST_CUDA
template <class T>
cudaError_t launch_bias_act_forward(const BiasActParams<T>& p, cudaStream_t stream);

template <class T>
cudaError_t launch_bias_act_backward(const BiasActParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
