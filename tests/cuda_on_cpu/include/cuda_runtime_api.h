// The host half of cuda_runtime.h: error numbers, streams, and the few calls a launcher may make.
#pragma once

#include <cstddef>
#include <cstring>

#include "cuda_on_cpu.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

struct cuda_on_cpu_stream;
using cudaStream_t = cuda_on_cpu_stream*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(value));
  return cudaSuccess;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), in words a host compiler understands.
template <class... Parameters, class... Arguments>
cudaError_t cuda_on_cpu_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                               Arguments... arguments) {
  return static_cast<cudaError_t>(cuda_on_cpu::launch(reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z},
                                                      {block.x, block.y, block.z}, shared_bytes,
                                                      [=] { kernel(arguments...); }));
}
