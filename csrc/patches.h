// Where a pixel of a view lies in the output: images whole, or cut into the patches of a vision transformer.
#pragma once

#include "common.h"

namespace tpt_fast {

// Of views of `width` pixels a row, in patches of patch_height x patch_width (the view's own leave it whole): the
// offset of a pixel is the sum of what its channel and row, and its column, add. Divisions are slow on a GPU, those of
// 64 bits several times more: so there are none where images stay whole, else of 32 bits.
struct PatchLayout {
  int64_t width;
  uint32_t patch_height, patch_width;

  TPT_FAST_HOST_DEVICE int64_t of_row(uint32_t channel, uint32_t y) const {
    const uint32_t above = y < patch_height ? 0 : y / patch_height;
    return above * (width * 3 * patch_height) +
           (static_cast<int64_t>(channel) * patch_height + y - above * patch_height) * patch_width;
  }
  TPT_FAST_HOST_DEVICE int64_t of_column(uint32_t x) const {
    const uint32_t left = x < patch_width ? 0 : x / patch_width;
    return left * (int64_t{3} * patch_height * patch_width) + x - left * patch_width;
  }
};

}  // namespace tpt_fast
