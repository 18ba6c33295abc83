// Kernels that show what the shim does, right ones and wrong ones. Bound in module.cpp, run by
// test_cuda_on_cpu_shim.py.
#include "../../csrc/common.cuh"
#include "shim_test.h"

namespace shim_test {
namespace {

using tpt_fast::kAllLanes;
using tpt_fast::kWarp;

// Reverses each block's part of the array through shared memory; with kBarrier = false, without waiting for the others.
template <bool kBarrier>
__global__ void reverse_kernel(const int* in, int* out) {
  TPT_FAST_SHARED(int, part, [64]);
  const unsigned n = blockDim.x;
  part[threadIdx.x] = in[blockIdx.x * n + threadIdx.x];
  if (kBarrier) __syncthreads();
  out[blockIdx.x * n + threadIdx.x] = part[n - 1 - threadIdx.x];
}

// A warp hands values round a ring, twice, in one array; with kBarrier = false the second write may come too early.
template <bool kBarrier>
__global__ void ring_kernel(const int* in, int* out) {
  TPT_FAST_DYNAMIC_SHARED(memory);
  int* ring = reinterpret_cast<int*>(memory);
  const unsigned lane = threadIdx.x;
  ring[lane] = in[lane];
  __syncwarp();
  const int next = ring[(lane + 1) % kWarp];
  if (kBarrier) __syncwarp();
  ring[lane] = next;
  __syncwarp();
  out[lane] = ring[(lane + 1) % kWarp];
}

// Element 0 of the block is never written.
__global__ void poison_kernel(const int*, int* out) {
  TPT_FAST_SHARED(int, part, [64]);
  TPT_FAST_DYNAMIC_SHARED(memory);
  int* dynamic = reinterpret_cast<int*>(memory);
  if (threadIdx.x > 0) part[threadIdx.x] = dynamic[threadIdx.x] = 7;
  __syncthreads();
  out[2 * threadIdx.x] = part[threadIdx.x];
  out[2 * threadIdx.x + 1] = dynamic[threadIdx.x];
}

// The last block to arrive writes the sum of what all brought.
__global__ void arrive_kernel(const int* in, int* out) {
  const unsigned order = atomicInc(reinterpret_cast<unsigned*>(out), gridDim.x - 1);
  atomicAdd(out + 1, in[blockIdx.x]);
  if (order == gridDim.x - 1) out[2] = atomicAdd(out + 1, 0);
}

// One collective a row of the result; 32 lanes.
__global__ void collectives_kernel(const int* in, int* out) {
  const int lane = static_cast<int>(threadIdx.x), value = in[lane];
  int row = 0;
  const auto put = [&](int result) { out[row++ * kWarp + lane] = result; };
  put(__shfl_sync(kAllLanes, value, 5));
  put(__shfl_sync(kAllLanes, value, lane + 1, 8));
  put(__shfl_up_sync(kAllLanes, value, 3u));
  put(__shfl_down_sync(kAllLanes, value, 2u, 16));
  put(__shfl_xor_sync(kAllLanes, value, 9));
  put(static_cast<int>(__ballot_sync(kAllLanes, value & 1)));
  put(__any_sync(kAllLanes, value == in[3]));
  put(__all_sync(kAllLanes, value == in[3]));
  put(__reduce_add_sync(kAllLanes, value));
  put(__reduce_max_sync(kAllLanes, value));
  put(lane < 16 ? __reduce_min_sync(0x0000ffffu, value) : __reduce_xor_sync(0xffff0000u, value));
  put(__syncthreads_count(value & 1));
  put(__syncthreads_or(value == in[3]));
  put(__syncthreads_and(value == in[3]));
}

// Elements lie as the PTX manual draws them: in pairs, a lane's place in its group of four is that of the pair.
__global__ void multiply_kernel(const int* in, int* out) {
  const int group = static_cast<int>(threadIdx.x) / 4, pair = static_cast<int>(threadIdx.x) % 4;
  const int *a = in, *b = in + 16 * 16;  // [16, 16], [16, 8]
  uint32_t first[4], second[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const int* two = a + (group + i % 2 * 8) * 16 + pair * 2 + i / 2 * 8;
    first[i] = static_cast<uint32_t>(two[0]) | static_cast<uint32_t>(two[1]) << 16;
    sums[i] = static_cast<float>((group + i / 2 * 8) * 8 + pair * 2 + i % 2);  // the place in out
  }
  for (int i = 0; i < 2; ++i) {
    const int* two = b + (pair * 2 + i * 8) * 8 + group;
    second[i] = static_cast<uint32_t>(two[0]) | static_cast<uint32_t>(two[8]) << 16;
  }
  cuda_on_cpu::multiply_16x8x16(sums, first, second, [](uint16_t bits) { return static_cast<float>(bits); });
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + pair * 2 + i % 2] = static_cast<int>(sums[i]);
}

__global__ void transpose_kernel(const int* in, int* out) {
  const int group = static_cast<int>(threadIdx.x) / 4, pair = static_cast<int>(threadIdx.x) % 4;
  const int* two = in + group * 8 + pair * 2;
  const uint32_t both = static_cast<uint32_t>(two[0]) | static_cast<uint32_t>(two[1]) << 16;
  const uint32_t turned = cuda_on_cpu::transpose_8x8(both);
  out[group * 8 + pair * 2] = static_cast<int>(turned & 0xffff);
  out[group * 8 + pair * 2 + 1] = static_cast<int>(turned >> 16);
}

__global__ void returned_before_multiply_kernel(const int*, int* out) {
  if (threadIdx.x == 31) return;
  out[threadIdx.x] = static_cast<int>(cuda_on_cpu::transpose_8x8(threadIdx.x));
}

__global__ void returned_before_barrier_kernel(const int*, int* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void different_barriers_kernel(const int* in, int* out) {
  if (in[threadIdx.x] > 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void returned_before_shuffle_kernel(const int* in, int* out) {
  if (threadIdx.x == 31) return;
  out[threadIdx.x] = __shfl_down_sync(kAllLanes, in[threadIdx.x], 1u);
}

__global__ void alone_in_a_vote_kernel(const int*, int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __any_sync(kAllLanes, 1);
  __syncthreads();
}

__global__ void out_of_bounds_kernel(const int*, int* out) {
  TPT_FAST_DYNAMIC_SHARED(memory);
  memory[32 * sizeof(int) + threadIdx.x] = 1;
  out[threadIdx.x] = 1;
}

}  // namespace

cudaError_t launch_shim_test(const std::string& name, const int* in, int* out, int blocks, int threads,
                             int shared_bytes) {
  using Kernel = void (*)(const int*, int*);
  const std::map<std::string, Kernel> kernels = {
      {"reverse", reverse_kernel<true>},
      {"reverse_race", reverse_kernel<false>},
      {"ring", ring_kernel<true>},
      {"ring_race", ring_kernel<false>},
      {"poison", poison_kernel},
      {"arrive", arrive_kernel},
      {"collectives", collectives_kernel},
      {"multiply", multiply_kernel},
      {"transpose", transpose_kernel},
      {"returned_before_multiply", returned_before_multiply_kernel},
      {"returned_before_barrier", returned_before_barrier_kernel},
      {"different_barriers", different_barriers_kernel},
      {"returned_before_shuffle", returned_before_shuffle_kernel},
      {"alone_in_a_vote", alone_in_a_vote_kernel},
      {"out_of_bounds", out_of_bounds_kernel},
  };
  return tpt_fast::launch(kernels.at(name), dim3(blocks), dim3(threads), shared_bytes, nullptr, in, out);
}

}  // namespace shim_test
