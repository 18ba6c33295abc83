// Large outputs of the CPU's kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tpt_fast {

// Asks for huge pages under a fresh tensor: 64 views at 224 px are 38 MB, and taking 9,262 page faults to write them
// costs as much time again as computing them. Only a hint, so its failure does not matter.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 1 << 21;
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = address + t.numel() * t.element_size();
  if (end > begin + kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace tpt_fast
