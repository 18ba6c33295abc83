// How the CPU's work is divided among threads: by its time, not by its number of items.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tpt_fast {

// The least number of items that a thread gets, from the nanoseconds that one takes on one core (a rough count: of the
// machines at hand, half or double). Less than 50 microseconds of work is not worth a second thread: threads wait for
// each other by spinning, and where something else keeps the cores busy, for the scheduler.
inline int64_t grain(double nanoseconds) {
  return std::max<int64_t>(1, static_cast<int64_t>(50e3 / std::max(nanoseconds, 0.1)));
}

// What one element of a row costs, and one operation of a product.
constexpr double kExponential = 1.0, kNormalise = 0.5, kOperation = 0.02;

}  // namespace tpt_fast
