// The product of bfloat16 rows, summed in float32 and rounded once. A tile of 6 x 64 results stays in registers for the
// whole depth, so nothing is written twice and no row of x is rearranged: a pair of its elements, one word, meets 64
// pairs of a panel. The panel (98 KB of a tower 768 wide) stays in the second cache while all rows meet it.
//
// Where the processor has avx512_bf16, found out when the first product runs, one instruction multiplies 32 pairs and
// adds them up. Elsewhere the two halves of each word are floats but for a shift, for loops that any compiler
// vectorises.
#include <algorithm>
#include <cstring>

#include "elementary.h"
#include "linear.h"

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define TPT_FAST_DOT_PRODUCTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#include <immintrin.h>
#endif

namespace tpt_fast {
namespace {

using Params = LinearParams<BFloat16>;

constexpr int64_t kPanel = kLinearPanel<BFloat16>;

// Elements k and k + 1 of a row, the first one in the lower half.
uint32_t pair_at(const BFloat16* row, int64_t k) {
  uint32_t pair;
  std::memcpy(&pair, row + k, sizeof pair);
  return pair;
}

// Rows of x, `stride` apart, by a panel [pairs, kPanel] of words -> out [rows, kPanel].
using Tile = void (*)(const BFloat16* x, int64_t stride, int64_t depth, const uint32_t* panel, float* out);

constexpr int kLanes = 8, kVectors = 2;
using Floats [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using Words [[gnu::vector_size(kLanes * sizeof(float))]] = uint32_t;

// The lower and the upper half of each word.
struct Pairs {
  Floats first, second;
};

Pairs widened(Words words) {
  const Words low = words << 16, high = words & 0xffff0000u;
  return {reinterpret_cast<const Floats&>(low), reinterpret_cast<const Floats&>(high)};
}

template <int kRows>
void plain_tile(const BFloat16* x, int64_t stride, int64_t depth, const uint32_t* panel, float* out) {
  for (int64_t column = 0; column < kPanel; column += kLanes * kVectors) {
    Floats sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      Pairs weights[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        Words words;
        std::memcpy(&words, panel + k / 2 * kPanel + column + j * kLanes, sizeof words);
        weights[j] = widened(words);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const Pairs pairs = widened(Words{} + pair_at(x + i * stride, k));
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] += pairs.first * weights[j].first;
          sums[i][j] += pairs.second * weights[j].second;
        }
      }
    }
    for (int i = 0; i < kRows; ++i) std::memcpy(out + i * kPanel + column, sums[i], sizeof sums[i]);
  }
}

#ifdef TPT_FAST_DOT_PRODUCTS
template <int kRows>
TPT_FAST_DOT_PRODUCTS void dot_tile(const BFloat16* x, int64_t stride, int64_t depth, const uint32_t* panel,
                                    float* out) {
  constexpr int kWide = kPanel / 16;
  __m512 sums[kRows][kWide];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 2, panel += kPanel) {
    __m512i words[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) words[j] = _mm512_loadu_si512(panel + 16 * j);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(pair_at(x + i * stride, k)));
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)pair, (__m512bh)words[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) _mm512_storeu_ps(out + i * kPanel + 16 * j, sums[i][j]);
  }
}

bool has_dot_products() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq"); }
#endif

// For 1 to kLinearRows rows.
const Tile* tiles([[maybe_unused]] bool plain) {
  static_assert(kLinearRows == 6);
#ifdef TPT_FAST_DOT_PRODUCTS
  static constexpr Tile kDots[] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>, dot_tile<5>, dot_tile<6>};
  if (!plain && has_dot_products()) return kDots;
#endif
  static constexpr Tile kPlain[] = {plain_tile<1>, plain_tile<2>, plain_tile<3>,
                                    plain_tile<4>, plain_tile<5>, plain_tile<6>};
  return kPlain;
}

// f(sums + bias), rounded, of a row of a tile.
template <class F>
void finish(const float* sums, const float* bias, BFloat16* out, int64_t columns, F f) {
  if (columns == kPanel) {
#pragma omp simd
    for (int64_t j = 0; j < kPanel; ++j) out[j] = narrow<BFloat16>(f(sums[j] + bias[j]));
  } else {
    for (int64_t j = 0; j < columns; ++j) out[j] = narrow<BFloat16>(f(sums[j] + bias[j]));
  }
}

}  // namespace

void linear_forward(const Params& p, float*, int64_t begin, int64_t end) {
  const Tile* tile = tiles(p.plain);
  const int64_t first = begin * kLinearRows, last = std::min(end * kLinearRows, p.rows);
  for (int64_t column = 0; column < p.width; column += kPanel) {
    const int64_t columns = std::min(kPanel, p.width - column);
    const auto* panel = reinterpret_cast<const uint32_t*>(p.panels + column / kPanel * p.panel_stride);
    float bias[kPanel] = {}, sums[kLinearRows * kPanel];
    if (p.bias) std::copy_n(p.bias + column, columns, bias);
    for (int64_t i = first; i < last; i += kLinearRows) {
      const int64_t rows = std::min(kLinearRows, last - i);
      tile[rows - 1](p.x + i * p.depth, p.depth, p.depth, panel, sums);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = sums + r * kPanel;
        BFloat16* out = p.out + (i + r) * p.width + column;
        if (p.activation == LinearActivation::kGelu)
          finish(from, bias, out, columns, [](float x) { return gelu(x); });
        else if (p.activation == LinearActivation::kQuickGelu)
          finish(from, bias, out, columns, [](float x) { return quick_gelu(x); });
        else
          finish(from, bias, out, columns, [](float x) { return x; });
      }
    }
  }
}

}  // namespace tpt_fast
