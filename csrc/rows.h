// Rows of any storage type as rows to compute with, on the CPU. A float row is read and written where it lies; one of
// 16 bits passes through a buffer, because gcc vectorises no loop that converts halves. It does where bfloat16 is
// converted, so loops over S = BFloat16 need no buffer either.
#pragma once

#include <type_traits>
#include <vector>

#include "half.h"

namespace tpt_fast {

void widen_row(const Half* from, float* to, int64_t n);
void widen_row(const BFloat16* from, float* to, int64_t n);
void narrow_row(const float* from, Half* to, int64_t n);
void narrow_row(const float* from, BFloat16* to, int64_t n);

template <class T, class S = Accumulate<T>>
class Row {
 public:
  explicit Row(int64_t width) : width_(width), held_(kInPlace ? 0 : width) {}

  // The elements at `from`, for as long as this row is neither read nor written again.
  const S* read(const T* from) {
    if constexpr (kInPlace) {
      return from;
    } else {
      widen_row(from, held_.data(), width_);
      return held_.data();
    }
  }

  // Where to compute what `write` then stores at `to`.
  S* target(T* to) {
    if constexpr (kInPlace)
      return to;
    else
      return held_.data();
  }

  void write(T* to) {
    if constexpr (!kInPlace) narrow_row(held_.data(), to, width_);
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<T, S>;
  int64_t width_;
  std::vector<S> held_;
};

// f(0) + ... + f(n - 1), in partial sums that fill several vectors: with one, each addition would wait for the last.
template <class A, class F>
A sum_over(int64_t n, F f) {
  constexpr int64_t kParts = 32;
  A parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
#pragma omp simd
    for (int64_t j = 0; j < kParts; ++j) parts[j] += f(i + j);
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kParts; ++j) sum += parts[j];
  for (; i < n; ++i) sum += f(i);
  return sum;
}

}  // namespace tpt_fast
