// What every kernel uses: launching, reductions of a warp and of a block, vector loads, shared memory.
//
// The .cu files are compiled by nvcc, and by a host compiler against the stand-in for CUDA in tests/cuda_on_cpu. The
// two differ here, in tiles.cuh, and where __CUDA_ARCH__ picks an instruction.
#pragma once

#include <cuda_runtime.h>

#include "common.h"
#include "elementary.h"

#ifdef CUDA_ON_CPU
#define TPT_FAST_SHARED(type, name, extent) CUDA_ON_CPU_SHARED(type, name, extent)
#define TPT_FAST_DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared()
#else
#define TPT_FAST_SHARED(type, name, extent) __shared__ type name extent
#define TPT_FAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace tpt_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLowest = std::numeric_limits<T>::lowest();
constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 65535;

// Launches, and returns what went wrong with the launch. More dynamic shared memory than 48 KB must be allowed first.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
#ifdef CUDA_ON_CPU
  return cuda_on_cpu_launch(kernel, grid, block, shared_bytes, stream, arguments...);
#else
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
#endif
}

// kCount values that one load or store moves.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <int kCount, class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// Four words in one store; of a Vector of four words the compiler may make four.
__device__ __forceinline__ void store_words(uint32_t* to, const uint32_t* words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// Whether every row of `pitch` elements from each pointer on may be read as vectors of kCount; null pointers fit.
template <int kCount, class... T>
bool vectors_fit(int64_t pitch, const T*... pointers) {
  return pitch % kCount == 0 && ((reinterpret_cast<uintptr_t>(pointers) % (sizeof(T) * kCount) == 0) && ...);
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {  // keeps a where b is NaN
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Reduction over kLanes neighbouring lanes (a power of two); all of them get the result, to the same bits, because the
// two partners of a step compute the same commutative sum. All 32 lanes of the warp must call.
template <int kLanes = kWarp, class Op, class T>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Reduction over the block's kThreads threads; all of them get the result, to the same bits. `scratch`: shared, one
// value a warp; free for other use when this returns.
template <int kThreads, class Op, class T>
__device__ __forceinline__ T block_reduce(T value, Op op, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  value = warp_reduce(value, op);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, scratch[warp]);
  __syncthreads();
  return value;
}

}  // namespace tpt_fast
