// A product that leaves nothing to be rearranged but rows of x. A tile of 6 x 16 results stays in registers while
// `depth` is walked in parts: a part of a panel (up to 24 KB) stays in the first cache while all rows of a block meet
// it, and the block (up to 216 KB, its rows interleaved by sixes) in the second. A tile's place in `out` is fetched
// before its products begin: between two parts it has left the near caches, and waiting for it took a fifth of the
// time. The next panel is fetched a little beside every tile, and bias and activation are applied to a tile while it is
// near.
//
// On 2 cores of a Zen 3, whose multiply-adds end at 194 GFLOP/s, it takes 0.7 to 0.95 times as long as torch's product
// (MKL) at the sizes of ViT-B's towers, taking turns with it; on a Zen 4, whose wider registers do no more at once,
// about 0.87. Where they do, half of them lie idle, and models/products.py finds torch's the faster one.
#include "linear.h"

#include <algorithm>

#include "elementary.h"

namespace tpt_fast {
namespace {

using Params = LinearParams<float>;

constexpr int64_t kPanel = kLinearPanel<float>;
constexpr int kLanes = 8, kVectors = kPanel / kLanes;
constexpr int64_t kBlockRows = 24 * kLinearRows, kPartDepth = kLinearScratch<float> / kBlockRows;

using Vector [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float))]] = float;

Vector& at(float* p) { return *reinterpret_cast<Vector*>(p); }
const Vector& at(const float* p) { return *reinterpret_cast<const Vector*>(p); }

// A tile of results: `base` + rows [depth, kLinearRows] by panel [depth, kPanel] -> out. Rows of base lie
// `base_stride` apart (0: all are one).
void tile(const float* rows, const float* panel, int64_t depth, const float* base, int64_t base_stride, float* out,
          int64_t stride) {
#pragma GCC unroll 6
  for (int64_t i = 0; i < kLinearRows; ++i) {  // a row may lie across two lines
    __builtin_prefetch(out + i * stride, 1);
    __builtin_prefetch(out + i * stride + kPanel - 1, 1);
  }
  Vector sums[kLinearRows][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, rows += kLinearRows, panel += kPanel) {
#pragma GCC unroll 6
    for (int64_t i = 0; i < kLinearRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sums[i][j] += rows[i] * at(panel + j * kLanes);
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kLinearRows; ++i) {
    for (int j = 0; j < kVectors; ++j)
      at(out + i * stride + j * kLanes) = at(base + i * base_stride + j * kLanes) + sums[i][j];
  }
}

template <class F>
void apply(float* out, int64_t rows, int64_t columns, int64_t stride, F f) {
  for (int64_t i = 0; i < rows; ++i, out += stride) {
    if (columns == kPanel) {
#pragma omp simd
      for (int64_t j = 0; j < kPanel; ++j) out[j] = f(out[j]);
    } else {
      for (int64_t j = 0; j < columns; ++j) out[j] = f(out[j]);
    }
  }
}

void activate(LinearActivation activation, float* out, int64_t rows, int64_t columns, int64_t stride) {
  if (activation == LinearActivation::kGelu)
    apply(out, rows, columns, stride, [](float x) { return gelu(x); });
  else if (activation == LinearActivation::kQuickGelu)
    apply(out, rows, columns, stride, [](float x) { return quick_gelu(x); });
}

// x[first : first + rows, begin : begin + depth] -> [groups, depth, kLinearRows]; the last row stands for missing ones.
void interleave(const Params& p, int64_t first, int64_t rows, int64_t begin, int64_t depth, float* to) {
  for (int64_t i = 0; i < rows; i += kLinearRows, to += depth * kLinearRows) {
    const float* from[kLinearRows];
    for (int64_t r = 0; r < kLinearRows; ++r) from[r] = p.x + (first + std::min(i + r, rows - 1)) * p.depth + begin;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t r = 0; r < kLinearRows; ++r) to[k * kLinearRows + r] = from[r][k];
    }
  }
}

// Everything that `count` rows from `first` on contribute from x[:, begin : begin + depth].
void multiply(const Params& p, int64_t first, int64_t count, int64_t begin, int64_t depth, const float* block) {
  const bool is_last = begin + depth == p.depth;
  for (int64_t column = 0; column < p.width; column += kPanel) {
    const int64_t columns = std::min(kPanel, p.width - column);
    const float* panel = p.panels + column / kPanel * p.panel_stride + begin * kPanel;
    alignas(32) float bias[kPanel] = {};
    if (p.bias) std::copy_n(p.bias + column, columns, bias);
    const float* next = column + kPanel < p.width ? panel + p.panel_stride : panel;
    for (int64_t i = 0; i < count; i += kLinearRows) {
      for (int64_t k = i * depth / count, stop = std::min(depth, (i + kLinearRows) * depth / count); k < stop; ++k)
        __builtin_prefetch(next + k * kPanel, 0, 2);
      const int64_t rows = std::min(kLinearRows, count - i);
      const float* some = block + i * depth;
      float* out = p.out + (first + i) * p.width + column;
      if (rows == kLinearRows && columns == kPanel) {
        begin ? tile(some, panel, depth, out, p.width, out, p.width) : tile(some, panel, depth, bias, 0, out, p.width);
      } else {  // at an edge: in a tile of its own
        alignas(32) float whole[kLinearRows * kPanel] = {};
        for (int64_t r = 0; begin && r < rows; ++r) std::copy_n(out + r * p.width, columns, whole + r * kPanel);
        tile(some, panel, depth, begin ? whole : bias, begin ? kPanel : 0, whole, kPanel);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(whole + r * kPanel, columns, out + r * p.width);
      }
      if (is_last) activate(p.activation, out, rows, columns, p.width);
    }
  }
}

}  // namespace

void linear_forward(const Params& p, float* rows, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin * kLinearRows, last = std::min(end * kLinearRows, p.rows);
  // Blocks and parts of about one size: a short last one would use the caches badly.
  const int64_t groups = ceil_div(end - begin, ceil_div(end - begin, kBlockRows / kLinearRows));
  const int64_t step = groups * kLinearRows, part = ceil_div(p.depth, ceil_div(p.depth, kPartDepth));
  for (int64_t i = first; i < last; i += step) {
    const int64_t count = std::min(step, last - i);
    for (int64_t k = 0; k < p.depth; k += part) {
      const int64_t depth = std::min(part, p.depth - k);
      interleave(p, i, count, k, depth, rows);
      multiply(p, i, count, k, depth, rows);
    }
  }
}

}  // namespace tpt_fast
