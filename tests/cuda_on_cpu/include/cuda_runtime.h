// CUDA's names for what cuda_on_cpu.h does: a stand-in for the toolkit's header of the same name, for host compilers.
// What is not here is not supported; a kernel that needs it does not compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda_on_cpu.h"
#include "cuda_runtime_api.h"

#define CUDA_ON_CPU 1

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
// __shared__ is left undefined on purpose: a plain static would start with zeros or with the last block's values, and
// hide reads of what was never written. Use CUDA_ON_CPU_SHARED and cuda_on_cpu::dynamic_shared().

// --- indices and vectors ---

struct Index3View {
  unsigned x = 0, y = 0, z = 0;
};
extern Index3View threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define CUDA_ON_CPU_VECTOR(type, name)                                                        \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float)
CUDA_ON_CPU_VECTOR(int, int)
CUDA_ON_CPU_VECTOR(unsigned, uint)
CUDA_ON_CPU_VECTOR(unsigned char, uchar)
#undef CUDA_ON_CPU_VECTOR

// --- barriers and votes of a block ---

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::barrier(cuda_on_cpu::Vote::kNone, 0, where);
}
inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::barrier(cuda_on_cpu::Vote::kOr, predicate, where);
}
inline int __syncthreads_and(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::barrier(cuda_on_cpu::Vote::kAnd, predicate, where);
}
inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::barrier(cuda_on_cpu::Vote::kCount, predicate, where);
}
// Blocks run one after the other, so memory is always in order: a missing fence is not found here.
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- warp collectives ---

namespace cuda_on_cpu {

// One shuffle: `source` says which lane each lane reads, or -1 for its own.
template <int (*source)(int lane, int arg, int width)>
void shuffle(Thread* const* lanes, unsigned, unsigned present) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(present >> lane & 1)) continue;
    const int from = source(lane, lanes[lane]->arg, lanes[lane]->width);
    if (from < 0) {
      lanes[lane]->out = lanes[lane]->in;
    } else if (present >> from & 1) {
      lanes[lane]->out = lanes[from]->in;
    } else {
      fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(from) +
           ", which is not in the mask or has returned");
    }
  }
}

inline int shuffle_up(int lane, int delta, int width) { return lane % width < delta ? -1 : lane - delta; }
inline int shuffle_down(int lane, int delta, int width) { return lane % width + delta >= width ? -1 : lane + delta; }
inline int shuffle_xor(int lane, int mask, int width) {
  const int from = lane ^ mask;
  return from / width > lane / width ? -1 : from;
}
inline int shuffle_index(int lane, int index, int width) { return lane / width * width + (index & (width - 1)); }

template <class T, class Fold>
void fold_lanes(Thread* const* lanes, unsigned present, Fold fold) {
  bool first = true;
  T total{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(present >> lane & 1)) continue;
    const T value = from_bits<T>(lanes[lane]->in);
    total = first ? value : static_cast<T>(fold(total, value));
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (present >> lane & 1) lanes[lane]->out = to_bits(total);
  }
}

inline void ballot(Thread* const* lanes, unsigned, unsigned present) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (present >> lane & 1) && lanes[lane]->in ? 1u << lane : 0u;
  for (int lane = 0; lane < 32; ++lane) {
    if (present >> lane & 1) lanes[lane]->out = votes;
  }
}

inline void meet(Thread* const*, unsigned, unsigned) {}

}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location where = std::source_location::current()) {
  cuda_on_cpu::collective("__syncwarp", mask, cuda_on_cpu::meet, 0, 0, 32, where);
}

#define CUDA_ON_CPU_SHUFFLE(name, source, argument)                                                                  \
  template <class T>                                                                                                 \
  T name(unsigned mask, T value, argument arg, int width = 32,                                                       \
         std::source_location where = std::source_location::current()) {                                             \
    const uint64_t bits = cuda_on_cpu::to_bits(value);                                                               \
    return cuda_on_cpu::from_bits<T>(cuda_on_cpu::collective(#name, mask, cuda_on_cpu::shuffle<cuda_on_cpu::source>, \
                                                             bits, static_cast<int>(arg), width, where));            \
  }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, shuffle_index, int)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, shuffle_up, unsigned)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, shuffle_down, unsigned)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, shuffle_xor, int)
#undef CUDA_ON_CPU_SHUFFLE

#define CUDA_ON_CPU_REDUCE(name, fold)                                                                    \
  template <class T, class = std::enable_if_t<std::is_same_v<T, int> || std::is_same_v<T, unsigned>>>     \
  T name(unsigned mask, T value, std::source_location where = std::source_location::current()) {          \
    const auto complete = [](cuda_on_cpu::Thread* const* lanes, unsigned, unsigned present) {             \
      cuda_on_cpu::fold_lanes<T>(lanes, present, [](T a, T b) { return fold; });                          \
    };                                                                                                    \
    const uint64_t bits = cuda_on_cpu::to_bits(value);                                                    \
    return cuda_on_cpu::from_bits<T>(cuda_on_cpu::collective(#name, mask, complete, bits, 0, 32, where)); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CUDA_ON_CPU_REDUCE(__reduce_min_sync, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, a < b ? b : a)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, a& b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, a ^ b)
#undef CUDA_ON_CPU_REDUCE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return static_cast<unsigned>(
      cuda_on_cpu::collective("__ballot_sync", mask, cuda_on_cpu::ballot, predicate != 0, 0, 32, where));
}
inline int __any_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

// --- tensor cores ---
//
// CUDA C++ has no functions for these, a kernel has them as assembly (PTX ISA, "Warp-level matrix instructions"); where
// CUDA_ON_CPU is defined it calls these instead. All 32 lanes have to.

namespace cuda_on_cpu {

inline void all_lanes(const char* name, unsigned present) {
  if (present != 0xffffffffu) fail(std::string(name) + ": a lane has returned");
}

struct Operands {
  float* sums;
  const uint32_t *a, *b;
  float (*widen)(uint16_t);
};

inline void multiply_lanes(Thread* const* lanes, unsigned, unsigned present) {
  all_lanes("multiply_16x8x16", present);
  const auto of = [&](int lane) { return *reinterpret_cast<const Operands*>(lanes[lane]->in); };
  const auto half = [&](uint32_t word, int k) { return of(0).widen(static_cast<uint16_t>(word >> k % 2 * 16)); };
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& sum = of(row % 8 * 4 + column / 2).sums[row / 8 * 2 + column % 2];
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], b = of(column * 4 + k % 8 / 2).b[k / 8];
        sum += half(a, k) * half(b, k);
      }
    }
  }
}

inline void transpose_lanes(Thread* const* lanes, unsigned, unsigned present) {
  all_lanes("transpose_8x8", present);
  const auto element = [&](int row, int column) { return lanes[row * 4 + column / 2]->in >> column % 2 * 16 & 0xffff; };
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    lanes[lane]->out = element(column, row) | element(column + 1, row) << 16;
  }
}

// mma.m16n8k16 with sums in float32; `widen` makes a float of the 16 bits of an element.
inline void multiply_16x8x16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t),
                             std::source_location where = std::source_location::current()) {
  const Operands operands{sums, a, b, widen};
  collective("multiply_16x8x16", 0xffffffffu, multiply_lanes, reinterpret_cast<uint64_t>(&operands), 0, 32, where);
}

// movmatrix.m8n8.trans.b16
inline uint32_t transpose_8x8(uint32_t pair, std::source_location where = std::source_location::current()) {
  return static_cast<uint32_t>(collective("transpose_8x8", 0xffffffffu, transpose_lanes, pair, 0, 32, where));
}

}  // namespace cuda_on_cpu

// --- atomics, on integers only: a sum of floats in no particular order is no result ---

#define CUDA_ON_CPU_ATOMIC(name, expression)                          \
  template <class T, class = std::enable_if_t<std::is_integral_v<T>>> \
  T name(T* address, std::type_identity_t<T> value) {                 \
    const T old = *address;                                           \
    *address = static_cast<T>(expression);                            \
    return old;                                                       \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value))
CUDA_ON_CPU_ATOMIC(atomicSub, static_cast<std::make_unsigned_t<T>>(old) - static_cast<std::make_unsigned_t<T>>(value))
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicExch, value)
#undef CUDA_ON_CPU_ATOMIC
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

// --- arithmetic ---

using std::max;
using std::min;
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __float_as_int(float x) { return cuda_on_cpu::from_bits<int>(cuda_on_cpu::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::from_bits<unsigned>(cuda_on_cpu::to_bits(x)); }
inline float __int_as_float(int x) { return cuda_on_cpu::from_bits<float>(cuda_on_cpu::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::from_bits<float>(cuda_on_cpu::to_bits(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
