// Rows of any storage type as rows to compute with, on the CPU. A float row is read and written where it lies; one of
// 16 bits passes through a buffer on the stack, piece by piece, because gcc vectorises no loop that converts _Float16.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "half.h"

namespace tpt_fast {

void widen_row(const Half* from, float* to, int64_t n);
void widen_row(const BFloat16* from, float* to, int64_t n);
void narrow_row(const float* from, Half* to, int64_t n);
void narrow_row(const float* from, BFloat16* to, int64_t n);

// One of the rows of a loop over pieces of at most kSize elements.
template <class T>
class Piece {
 public:
  using A = Accumulate<T>;
  static constexpr bool kInPlace = std::is_same_v<T, A>;
  static constexpr int64_t kSize = kInPlace ? std::numeric_limits<int64_t>::max() : 512;

  // The n elements at `from`, for as long as this piece is neither read nor written again.
  const A* read(const T* from, int64_t n) {
    if constexpr (kInPlace) {
      return from;
    } else {
      widen_row(from, held_, n);
      return held_;
    }
  }

  // Where to compute what `write` then stores at `to`.
  A* target(T* to) {
    if constexpr (kInPlace)
      return to;
    else
      return held_;
  }

  void write(T* to, int64_t n) {
    if constexpr (!kInPlace) narrow_row(held_, to, n);
  }

 private:
  A held_[kInPlace ? 1 : kSize];
};

// Calls visit(first element, number of elements) for each piece of a row.
template <class T, class Visit>
void for_pieces(int64_t width, Visit visit) {
  for (int64_t at = 0; at < width; at += Piece<T>::kSize) visit(at, std::min(width - at, Piece<T>::kSize));
}

}  // namespace tpt_fast
