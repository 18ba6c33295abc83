// What every op's header needs: integer types, and the CUDA runtime's types where CUDA is built.
#pragma once

#include <cstdint>

#ifdef TPT_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

// Host functions that device code may call too.
#if defined(__CUDACC__)
#define TPT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TPT_FAST_HOST_DEVICE inline
#endif

namespace tpt_fast {

TPT_FAST_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tpt_fast
