// Formulas that host and device share.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common.h"

namespace tpt_fast {

// a * b, rounded by itself. A compiler that fuses the product into a following addition would change the last bit of
// what has to equal Pillow's or PyTorch's to the bit, and flags against that differ between compilers; a volatile does
// not.
TPT_FAST_HOST_DEVICE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  volatile double product = a * b;
  return product;
#endif
}

TPT_FAST_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

// exp(x) for x <= 0, written so that a compiler can vectorise it: Cody-Waite reduction and a polynomial of degree 6,
// within 2 ulp of the true value. Below the range of normal numbers it returns 0; exp_nonpositive(-inf) = 0 and
// exp_nonpositive(NaN) = NaN.
TPT_FAST_HOST_DEVICE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // The comparison keeps NaN: it is false for NaN, which then flows through the polynomial.
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000000e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;  // without sign: those of a NaN overflow
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold n; the shift drops the rest
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
#endif
}

TPT_FAST_HOST_DEVICE double exp_nonpositive(double x) { return ::exp(x); }

// Upper tail 1 - Phi(|x|) of the standard normal distribution, from `gauss` = exp(-x^2 / 2): a polynomial in
// t = 1 / (1 + 0.45 |x| / sqrt 2), fitted to exp(z^2) erfc(z) with an error below 5e-9 in erf. In float the absolute
// error is that of rounding, below 1e-7. It vectorises, and GELU's derivative needs the same exponential.
TPT_FAST_HOST_DEVICE float normal_tail(float x, float gauss) {
  const float t = 1.0f / (1.0f + 0.318198052f * (x < 0.0f ? -x : x));
  float p = 0.0921808032f;
  p = p * t - 0.492352957f;
  p = p * t + 0.853918585f;
  p = p * t - 0.372627492f;
  p = p * t + 0.458448458f;
  p = p * t + 0.201500273f;
  p = p * t + 0.258932325f;
  return 0.5f * p * t * gauss;
}

TPT_FAST_HOST_DEVICE double normal_tail(double x, double) { return 0.5 * ::erfc(::fabs(x) * 0.70710678118654752440); }

// GELU(x) = x Phi(x), and its derivative Phi(x) + x phi(x).
template <class T>
TPT_FAST_HOST_DEVICE T gelu(T x) {
  const T tail = normal_tail(x, exp_nonpositive(T(-0.5) * x * x));
  return x * (x < T(0) ? tail : T(1) - tail);
}

template <class T>
TPT_FAST_HOST_DEVICE T gelu_slope(T x) {
  const T gauss = exp_nonpositive(T(-0.5) * x * x), tail = normal_tail(x, gauss);
  return (x < T(0) ? tail : T(1) - tail) + x * gauss * T(0.39894228040143267794);
}

// 1 / (1 + exp(-x)) without overflow.
template <class T>
TPT_FAST_HOST_DEVICE T sigmoid(T x) {
  const T e = exp_nonpositive(x < T(0) ? x : -x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

// QuickGELU(x) = x sigmoid(1.702 x), and its derivative.
template <class T>
TPT_FAST_HOST_DEVICE T quick_gelu(T x) {
  return x * sigmoid(T(1.702) * x);
}

template <class T>
TPT_FAST_HOST_DEVICE T quick_gelu_slope(T x) {
  const T s = sigmoid(T(1.702) * x);
  return s + T(1.702) * x * s * (T(1) - s);
}

}  // namespace tpt_fast
