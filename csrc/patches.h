// Where a pixel of a view lies in the output: images whole, or cut into the patches of a vision transformer.
#pragma once

#include "common.h"

namespace tpt_fast {

// Of views of size x size in patches of patch x patch (patch = size leaves them whole): the offset of a pixel is the
// sum of what its channel and row, and its column, add. Divisions are slow on a GPU, those of 64 bits several times
// more: so there are none where images stay whole, else of 32 bits.
TPT_FAST_HOST_DEVICE int64_t offset_of_row(int64_t size, uint32_t patch, uint32_t channel, uint32_t y) {
  const uint32_t above = y < patch ? 0 : y / patch;
  return above * (size * 3 * patch) + (channel * patch + y - above * patch) * patch;
}
TPT_FAST_HOST_DEVICE int64_t offset_of_column(uint32_t patch, uint32_t x) {
  const uint32_t left = x < patch ? 0 : x / patch;
  return left * (int64_t{3} * patch * patch) + x - left * patch;
}

}  // namespace tpt_fast
