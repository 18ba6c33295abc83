// A linear layer whose weight W stays as it is, so that it is laid out once: y = activation(x W^T + bias). float32, on
// the CPU; a GPU has its libraries' products.
#pragma once

#include "common.h"

namespace tpt_fast {

constexpr int64_t kLinearPanel = 16;  // columns of y that lie together in `panels`
constexpr int64_t kLinearRows = 6;    // rows of x that are read together

enum class LinearActivation { kNone, kGelu, kQuickGelu };

struct LinearParams {
  const float* x;        // [rows, depth]
  const float* panels;   // [ceil(width / kLinearPanel), depth, kLinearPanel]: W^T cut by columns, zeros behind the last
  int64_t panel_stride;  // elements from one panel to the next
  const float* bias;     // [width], or null
  float* out;            // [rows, width] y
  int64_t rows;
  int64_t depth;  // at least 1
  int64_t width;
  LinearActivation activation;
};

constexpr int64_t kLinearScratch = 24 * kLinearRows * 384;  // floats: a block of rows, as deep as a part

// Items: groups of kLinearRows rows. `scratch` [kLinearScratch], aligned to 64 bytes, is the range's own.
void linear_forward(const LinearParams& p, float* scratch, int64_t begin, int64_t end);

}  // namespace tpt_fast
