#include "rows.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace tpt_fast {

void widen_row(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}

void narrow_row(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i values = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), values);
  }
#endif
  for (; i < n; ++i) to[i] = narrow<Half>(from[i]);
}

void widen_row(const BFloat16* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

void narrow_row(const float* from, BFloat16* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<BFloat16>(from[i]);
}

}  // namespace tpt_fast
