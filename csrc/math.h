// Formulas that host and device share.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common.h"

namespace tpt_fast {

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
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold n; the shift drops the rest
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
#endif
}

TPT_FAST_HOST_DEVICE double exp_nonpositive(double x) { return ::exp(x); }

}  // namespace tpt_fast
