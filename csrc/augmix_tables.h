// What Pillow's point operations make of one byte, and where its bilinear transform reads: to the bit.
#pragma once

#include "elementary.h"

namespace tpt_fast {

// `low` and `high` are the least and the greatest byte of the channel.
TPT_FAST_HOST_DEVICE uint8_t autocontrast(int32_t low, int32_t high, int32_t byte) {
  if (high <= low) return static_cast<uint8_t>(byte);
  const double scale = 255.0 / (high - low), offset = rounded_product(-low, scale);
  const double value = rounded_product(byte, scale) + offset;
  return static_cast<uint8_t>(value < 0.0 ? 0.0 : value > 255.0 ? 255.0 : value);
}

// `pixels` of the channel in all, of which `below` are darker than the byte and `brightest` share its greatest one.
TPT_FAST_HOST_DEVICE uint8_t equalize(int32_t pixels, int32_t brightest, int32_t below, int32_t byte) {
  const int32_t step = (pixels - brightest) / 255;
  if (step == 0) return static_cast<uint8_t>(byte);
  const int32_t value = (step / 2 + below) / step;
  return static_cast<uint8_t>(value > 255 ? 255 : value);
}

TPT_FAST_HOST_DEVICE uint8_t posterize(double bits, int32_t byte) {
  const int32_t kept = bits > 8.0 ? 8 : bits > 0.0 ? static_cast<int32_t>(bits) : 0;
  return static_cast<uint8_t>(byte & (0xff00 >> kept));
}

TPT_FAST_HOST_DEVICE uint8_t solarize(double threshold, int32_t byte) {
  return static_cast<uint8_t>(byte < threshold ? byte : 255 - byte);
}

}  // namespace tpt_fast
