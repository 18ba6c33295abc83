// Weights of Pillow's 8-bit resampling, to the bit: double arithmetic, rounded to integers of 22 fractional bits.
#pragma once

#include "elementary.h"

namespace tpt_fast {

constexpr int kWeightBits = 22;

enum ViewFilter : int32_t { kBilinear = 0, kBicubic = 1 };

// The triangle of support 1, or Keys' cubic with a = -1/2 of support 2.
TPT_FAST_HOST_DEVICE double filter_value(int32_t filter, double x) {
  x = x < 0.0 ? -x : x;
  if (filter == kBilinear) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) {
    const double inner = rounded_product(1.5, x) - 2.5;
    return rounded_product(rounded_product(inner, x), x) + 1.0;
  }
  if (x < 2.0) {
    const double inner = rounded_product(x - 5.0, x) + 8.0;
    return (rounded_product(inner, x) - 4.0) * -0.5;
  }
  return 0.0;
}

// One axis of a resize from `length` source pixels to `out_length`.
struct ResizeAxis {
  int32_t filter;
  int32_t length;
  double scale;    // source pixels an output pixel
  double support;  // half the filter's width, in source pixels
  double inverse;  // 1 / max(1, scale)
};

TPT_FAST_HOST_DEVICE ResizeAxis resize_axis(int32_t filter, int32_t length, int32_t out_length) {
  const double scale = static_cast<double>(length) / out_length;
  const double widening = scale < 1.0 ? 1.0 : scale;
  return {filter, length, scale, filter == kBicubic ? 2.0 * widening : widening, 1.0 / widening};
}

// No output pixel of the axis has more taps.
TPT_FAST_HOST_DEVICE int32_t most_taps(const ResizeAxis& axis) {
  const double taps = 2.0 * axis.support + 2.0;
  return taps < axis.length ? static_cast<int32_t>(taps) : axis.length;
}

// The source pixels [first, first + count) under output pixel `index`.
struct Taps {
  int32_t first, count;
  double centre;
};

TPT_FAST_HOST_DEVICE Taps taps_at(const ResizeAxis& axis, int32_t index) {
  const double centre = rounded_product(index + 0.5, axis.scale);
  const int32_t low = static_cast<int32_t>(centre - axis.support + 0.5);
  const int32_t high = static_cast<int32_t>(centre + axis.support + 0.5);
  const int32_t first = low < 0 ? 0 : low;
  const int32_t end = high > axis.length ? axis.length : high;
  return {first, end - first, centre};
}

TPT_FAST_HOST_DEVICE double raw_weight(const ResizeAxis& axis, const Taps& taps, int32_t k) {
  return filter_value(axis.filter, rounded_product(k + taps.first - taps.centre + 0.5, axis.inverse));
}

TPT_FAST_HOST_DEVICE double sum_of_weights(const ResizeAxis& axis, const Taps& taps) {
  double sum = 0.0;
  for (int32_t k = 0; k < taps.count; ++k) sum += raw_weight(axis, taps, k);
  return sum;
}

// Weight of tap k, 0 <= k < taps.count, given sum_of_weights.
TPT_FAST_HOST_DEVICE int32_t fixed_weight(const ResizeAxis& axis, const Taps& taps, double sum, int32_t k) {
  const double raw = raw_weight(axis, taps, k);
  const double scaled = (sum != 0.0 ? raw / sum : raw) * (1 << kWeightBits);  // a power of two: fusing is harmless
  return static_cast<int32_t>(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5);
}

// Whether Pillow resizes the height before the width. Each pass rounds to bytes, so the order shows. From Pillow 13 on
// (`when_taller`) the height comes first where it shrinks by more than twice what the width does; before that only for
// slivers over a hundred times as tall as wide.
TPT_FAST_HOST_DEVICE bool vertical_first(bool when_taller, int64_t height, int64_t width, int64_t out_height,
                                         int64_t out_width) {
  if (height <= out_height) return false;
  return when_taller ? height - out_height > 2 * (width - out_width) : height > 100 * width;
}

// Rounds, shifts and clamps an accumulated sum of weight * pixel.
TPT_FAST_HOST_DEVICE uint8_t pixel_of_sum(int32_t sum) {
  const int32_t value = (sum + (1 << (kWeightBits - 1))) >> kWeightBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

}  // namespace tpt_fast
