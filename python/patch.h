// The option of both ops that make views: to write them cut into square patches.
#pragma once

#include <optional>

#include "../csrc/patches.h"
#include "checks.h"

namespace tpt_fast {

inline void check_patch(int64_t height, int64_t width, std::optional<int64_t> patch) {
  STD_TORCH_CHECK(!patch || (*patch >= 1 && height % *patch == 0 && width % *patch == 0),
                  "patch: expected a divisor of the size ", height, " x ", width, ", got ", patch.value_or(0));
}

inline PatchLayout layout_of(int64_t height, int64_t width, std::optional<int64_t> patch) {
  return {width, static_cast<uint32_t>(patch.value_or(height)), static_cast<uint32_t>(patch.value_or(width))};
}

}  // namespace tpt_fast
