// Runs the threads of a CUDA block as fibers of one host thread. See ../README.md.
//
// This header is the machinery: fibers meet in barriers and in warp collectives, and a scheduler picks who runs next.
// cuda_runtime.h, beside it, gives it CUDA's names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

namespace cuda_on_cpu {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// A thread of the block, as far as the collectives below need to see it.
struct Thread {
  uint64_t in = 0, out = 0;  // what it brought to a warp collective, and what it takes away
  int arg = 0, width = 32;   // lane, delta or mask of a shuffle; width of its segments
};

// Computes `out` of every lane in `mask` from what those lanes brought. `present` leaves out lanes that have returned.
using Complete = void (*)(Thread* const* lanes, unsigned mask, unsigned present);

enum class Vote { kNone, kAnd, kOr, kCount };

// --- what a kernel calls, through cuda_runtime.h ---

// Waits until every thread of the block is at this call; the vote over all predicates comes back.
int barrier(Vote vote, int predicate, const std::source_location& where);

// Waits until every lane named in `mask` that has not returned brings the same collective with the same mask.
uint64_t collective(const char* name, unsigned mask, Complete complete, uint64_t in, int arg, int width,
                    const std::source_location& where);

// The block's dynamic shared memory, and a static shared array: both hold the poison pattern when a block starts.
unsigned char* dynamic_shared();

class StaticShared {  // one for each declaration, and for each instantiation of a template
 public:
  explicit StaticShared(size_t bytes);
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// Reports an error of the running kernel, which then ends; never returns to the caller.
[[noreturn]] void fail(const std::string& what);

unsigned lane_id();

// --- what a host program calls ---

// Runs the grid, one block after the other; an error number of cuda_runtime.h. `kernel` is only used as a key, to find
// the dynamic shared memory it was allowed.
int launch(const void* kernel, Index3 grid, Index3 block, size_t shared_bytes, const std::function<void()>& body);
void allow_shared(const void* kernel, size_t bytes);

// 0 runs blocks and threads in order; any other seed shuffles blocks, and threads anew at each step.
void set_seed(uint64_t seed);
// What the last failed launch said; empty when there was none since the last call.
std::string take_error();
// Counts since the program began, to see that a test has run what it means to run.
uint64_t launches();

// How shared memory starts: a NaN in every floating-point format, -1 in every integer.
constexpr int kPoison = 0xFF;

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "warp collectives carry at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

// A static __shared__ array: CUDA_ON_CPU_SHARED(float, partial, [32]);
#define CUDA_ON_CPU_SHARED(type, name, extent)                                  \
  static const ::cuda_on_cpu::StaticShared name##_storage(sizeof(type extent)); \
  auto& name = *static_cast<type(*) extent>(name##_storage.get())
