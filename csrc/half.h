// 16-bit storage types. Arithmetic is done in float: convert where a value is loaded and where it is stored.
#pragma once

#include <cstring>

#include "common.h"

namespace tpt_fast {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type to compute in.
template <class T>
struct AccumulateOf {
  using type = T;
};
template <>
struct AccumulateOf<Half> {
  using type = float;
};
template <>
struct AccumulateOf<BFloat16> {
  using type = float;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

TPT_FAST_HOST_DEVICE float widen(float x) { return x; }
TPT_FAST_HOST_DEVICE double widen(double x) { return x; }

TPT_FAST_HOST_DEVICE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TPT_FAST_HOST_DEVICE float widen(Half x) {
  float value;
#if defined(__CUDA_ARCH__)
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
#else
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  value = static_cast<float>(half);
#endif
  return value;
}

// Rounds to nearest, ties to even.
template <class T>
TPT_FAST_HOST_DEVICE T narrow(Accumulate<T> x) {
  return x;
}

template <>
TPT_FAST_HOST_DEVICE Half narrow<Half>(float x) {
  Half result;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&result.bits, &half, sizeof half);
#endif
  return result;
}

template <>
TPT_FAST_HOST_DEVICE BFloat16 narrow<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

}  // namespace tpt_fast
