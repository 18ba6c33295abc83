// Products of small matrices on tensor cores. The operands lie spread over the registers of a warp: lane 4 g + t has of
// a Tile, 16 rows of 64 elements, in rows g and g + 8 the elements 8 t .. 8 t + 7 and 32 + 8 t .. 32 + 8 t + 7, so each
// is loaded and stored 16 bytes at a time. The instructions want other places, but a sum over the 64 elements may take
// them in any order, and the columns of a result may stand anywhere.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "half.h"

namespace tpt_fast {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;

struct Tile {
  uint32_t words[2][8];  // of rows g and g + 8: two elements a word
};

// 16 x 16. Of rows g and g + 8, lane 4 g + t has columns 2 t, 2 t + 1 (values[0]) and 8 + 2 t, 8 + 2 t + 1 (values[1]).
struct Square {
  float values[2][4];
};

// What a Tile may be rounded from: values[i][0], [1] become words[0][i], and values[i][2], [3] words[1][i].
struct TileSums {
  float values[8][4];

  // Rows g and g + 8 by one factor each.
  __device__ __forceinline__ void scale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] *= factor[j / 2];
    }
  }
};

// Where value `i` of values[n] stands in a Square.
__device__ __forceinline__ int square_row(int i) { return threadIdx.x % kWarp / 4 + i / 2 * 8; }
__device__ __forceinline__ int square_column(int n, int i) { return threadIdx.x % 4 * 2 + i % 2 + n * 8; }

// Where rows lie, as this lane sees them.
template <class T>
struct Rows {
  T* start;   // of its eight elements, of those before column 32, in row 0
  int pitch;  // bytes from row to row

  __device__ __forceinline__ Rows(T* row, int64_t elements)
      : start(row + threadIdx.x % 4 * 8), pitch(static_cast<int>(elements * sizeof(T))) {
#if defined(__CUDA_ARCH__)  // computed once: what the compiler knows of them it computes anew for each load
    asm("" : "+l"(start), "+r"(pitch));
#endif
  }
  __device__ __forceinline__ T* at(int row) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(start) + static_cast<int64_t>(row) * pitch);
  }
};

// Rows first .. first + 15, `shift` elements on; zero from row `end` on.
template <class T>
__device__ __forceinline__ Tile load_tile(const Rows<const T>& from, int first, int end, int shift = 0) {
  Tile tile{};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + square_row(2 * half);
    if (row >= end) continue;
    const auto* quads = reinterpret_cast<const uint4*>(from.at(row) + shift);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 quad = __ldg(quads + 4 * i);
      uint32_t* const to = tile.words[half] + 4 * i;
      to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
    }
  }
  return tile;
}

template <class T>
__device__ __forceinline__ void store_tile(const Rows<T>& to, int first, int end, const TileSums& sums) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + square_row(2 * half);
    if (row >= end) continue;
    auto* words = reinterpret_cast<uint32_t*>(to.at(row));
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint32_t four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        four[j] = narrow_pair<T>(sums.values[i + j][2 * half], sums.values[i + j][2 * half + 1]);
      store_words(words + 4 * i, four);
    }
  }
}

// sums += a b of a 16 x 16 and a 16 x 8 matrix of T: row i of `a` and column i of `b` are held by lanes 4 i .. 4 i + 3.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CUDA_ON_CPU)
  cuda_on_cpu::multiply_16x8x16(sums, a, b, [](uint16_t bits) { return widen(T{bits}); });
#else
#define TPT_FAST_MULTIPLY(type)                                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                          \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                      \
               : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(sums[0]), "f"(sums[1]), \
                 "f"(sums[2]), "f"(sums[3]))
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // 7.5 has half of the instruction, and none for bfloat16
  if constexpr (std::is_same_v<T, Half>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
          : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]),
            "f"(sums[3]));
    }
  } else {
    __trap();  // the bindings refuse it
  }
#else
  if constexpr (std::is_same_v<T, Half>) {
    TPT_FAST_MULTIPLY("f16");
  } else {
    TPT_FAST_MULTIPLY("bf16");
  }
#endif
#undef TPT_FAST_MULTIPLY
#endif
}

// Of an 8 x 8 matrix whose row i is held by lanes 4 i .. 4 i + 3, two elements each, the transpose in the same places.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
#if defined(CUDA_ON_CPU)
  return cuda_on_cpu::transpose_8x8(pair);
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
#endif
}

// x y^T: the product of every row of x with every row of y.
template <class T>
__device__ __forceinline__ Square products(const Tile& x, const Tile& y) {
  Square result{};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const uint32_t a[4] = {x.words[0][i], x.words[1][i], x.words[0][i + 1], x.words[1][i + 1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) multiply<T>(result.values[n], a, {y.words[n][i], y.words[n][i + 1]});
  }
  return result;
}

struct Larger {  // one instruction; of a number and NaN the number
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A power of two that brings the largest of 256 values of a warp to 2^12, or near it, and its inverse.
struct Scale {
  float up, down;
};
__device__ __forceinline__ Scale scale_of(const Square& x) {
  float largest = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = Larger()(largest, fabsf(x.values[n][i]));
  }
  const int exponent = __float_as_int(warp_reduce(largest, Larger())) >> 23;  // 127 more than that of the number
  const int up = max(1, min(253, 127 + 12 + 127 - exponent));
  return {__int_as_float(up << 23), __int_as_float((254 - up) << 23)};
}

// sums += x y. What rounding to T leaves of x is multiplied too: as if x were a float, or nearly. `kAnyRange`: x may be
// too small for float16.
template <class T, bool kAnyRange = false>
__device__ __forceinline__ void add_product(TileSums& sums, const Square& x, const Tile& y) {
  constexpr bool kScaled = kAnyRange && std::is_same_v<T, Half>;
  const Scale scale = kScaled ? scale_of(x) : Scale{1, 1};
  uint32_t first[4], rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = x.values[i / 2][i % 2 * 2] * scale.up, b = x.values[i / 2][i % 2 * 2 + 1] * scale.up;
    first[i] = narrow_pair<T>(a, b);
    rest[i] = narrow_pair<T>(a - widen_first<T>(first[i]), b - widen_second<T>(first[i]));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t b[2] = {transposed(y.words[0][i]), transposed(y.words[1][i])};
    if constexpr (kScaled) {
      float part[4] = {};
      multiply<T>(part, rest, b);
      multiply<T>(part, first, b);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.values[i][j] += part[j] * scale.down;
    } else {
      multiply<T>(sums.values[i], rest, b);
      multiply<T>(sums.values[i], first, b);
    }
  }
}

}  // namespace tpt_fast
