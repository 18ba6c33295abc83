// How the CPU's work is divided among threads: by its time, not by its number of items.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tpt_fast {

// The least number of items that a thread gets, from the nanoseconds that one takes on one core (a rough count: of the
// machines at hand, half or double). Less than 50 microseconds of work is not worth a second thread: threads wait for
// each other by spinning, and where something else keeps the cores busy, for the scheduler.
inline int64_t grain(double nanoseconds) {
  return std::max<int64_t>(1, static_cast<int64_t>(50e3 / std::max(nanoseconds, 0.1)));
}

// run(worker, item) for every item, each by the next of the workers that is free: for items that differ in cost.
template <class Run>
void take_turns(int64_t workers, int64_t items, Run run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t item; (item = next++) < items;) run(worker, item);
  });
}

// What one element of a row costs, and one operation of a product.
constexpr double kExponential = 1.0, kNormalise = 0.5, kOperation = 0.02;

}  // namespace tpt_fast
