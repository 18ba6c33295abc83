// The CUDA half of a binding: the tensor's device for as long as this lives, and torch's current stream on it.
#pragma once

#ifdef TPT_FAST_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace tpt_fast {

class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::BFloat16 || attribute(cudaDevAttrComputeCapabilityMajor) >= 8,
                    "bfloat16: CUDA device ", index_,
                    " has no instructions for it (compute capability 8.0 and later do); ", "use float16 or float32");
  }

  cudaStream_t stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                    "no current stream on CUDA device ", index_);
    return static_cast<cudaStream_t>(stream);
  }
  int32_t index() const { return index_; }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index_);
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", index_, ": ", cudaGetErrorString(error));
    return value;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(cudaError_t error, const char* op) {
  if (error != cudaSuccess) cudaGetLastError();  // the next launch would find it
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Every tensor argument of an op has to be on one device; the dispatcher has only looked for one on CUDA.
inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": expected a tensor on CUDA device ", like.get_device_index());
}

}  // namespace tpt_fast
#endif
