// A linear layer whose weight W stays as it is, so that it is laid out once: y = activation(x W^T + bias), in float32
// or bfloat16, on the CPU; a GPU has its libraries' products.
#pragma once

#include "common.h"
#include "half.h"

namespace tpt_fast {

constexpr int64_t kLinearRows = 6;  // rows of x that are read together

// Columns of y that lie together in `panels`, and elements of one column that do.
template <class T>
constexpr int64_t kLinearPanel = sizeof(T) == 2 ? 64 : 16;
template <class T>
constexpr int64_t kLinearTogether = sizeof(T) == 2 ? 2 : 1;

enum class LinearActivation { kNone, kGelu, kQuickGelu };

template <class T>
struct LinearParams {
  const T* x;            // [rows, depth]
  const T* panels;       // [ceil(width / panel), depth / together, panel, together]: W^T cut by columns, zeros behind
                         // the last
  int64_t panel_stride;  // elements from one panel to the next
  const float* bias;     // [width], or null
  T* out;                // [rows, width] y
  int64_t rows;
  int64_t depth;  // at least 1, a multiple of kLinearTogether
  int64_t width;
  LinearActivation activation;
  bool plain;  // bfloat16: without the processor's dot products even where it has them
};

template <class T>  // floats: a block of rows, as deep as a part; none for bfloat16
constexpr int64_t kLinearScratch = sizeof(T) == 2 ? 0 : 24 * kLinearRows * 384;

// Items: groups of kLinearRows rows. `scratch` [kLinearScratch<T>], aligned to 64 bytes, is the range's own.
void linear_forward(const LinearParams<float>& p, float* scratch, int64_t begin, int64_t end);
void linear_forward(const LinearParams<BFloat16>& p, float* scratch, int64_t begin, int64_t end);

}  // namespace tpt_fast
