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
