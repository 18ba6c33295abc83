#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace shim_test {

// Runs one of the kernels of shim_test.cu.
cudaError_t launch_shim_test(const std::string& name, const int* in, int* out, int blocks, int threads,
                             int shared_bytes);

}  // namespace shim_test
