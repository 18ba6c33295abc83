// 16-bit storage types. Arithmetic is done in float: convert where a value is loaded and where it is stored.
#pragma once

#include <cstring>
#include <type_traits>

#include "common.h"

namespace tpt_fast {

// Whether the device has the instructions for bfloat16, and for two values at once: from 8.0 on. Before that device
// code does as the host does, and the bindings refuse bfloat16, whose products (tiles.cuh) have no such way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define TPT_FAST_CONVERTS_BFLOAT16
#endif

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

// On the host in integers, since _Float16 is C++ for new compilers only; rows.cpp has the processor's instructions.
TPT_FAST_HOST_DEVICE float widen(Half x) {
  float value;
#if defined(__CUDA_ARCH__)
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;  // from the exponents of one format to those of the other, subnormal numbers included
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // infinity, NaN
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
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
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) {  // from 2^16 on
    bits = bits > 0x7f800000u ? 0x7e00u | (bits >> 13 & 0x3ffu) : 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: one half has its last bit where those have theirs, and so rounds them
    float sum;
    std::memcpy(&sum, &bits, sizeof sum);
    sum += 0.5f;
    std::memcpy(&bits, &sum, sizeof bits);
    bits -= 0x3f000000u;
  } else {  // another bias of the exponent; half of the last bit, less where that is even, rounds
    bits = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
  }
  result.bits = static_cast<uint16_t>(sign | bits);
#endif
  return result;
}

template <>
TPT_FAST_HOST_DEVICE BFloat16 narrow<BFloat16>(float x) {
#if defined(TPT_FAST_CONVERTS_BFLOAT16)
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

// Two values in one word, the first one in its lower half.
template <class T>
TPT_FAST_HOST_DEVICE uint32_t narrow_pair(float first, float second) {
  static_assert(sizeof(T) == 2);
#if defined(TPT_FAST_CONVERTS_BFLOAT16)
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  }
  return pair;
#else
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
#endif
}

template <class T>
TPT_FAST_HOST_DEVICE float widen_first(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair)});
}

template <class T>
TPT_FAST_HOST_DEVICE float widen_second(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace tpt_fast
