// One 16-byte vector a thread; memory bounds it. The bias row stays in L1.
//
// Dangers: vectors only where rows and pointers are aligned; at most 2^31 - 1 of them, checked before the launch, so
// that their index fits 32 bits, and offsets of elements are 64 bits wide. No shuffles, no shared memory.
#include "bias_act.h"
#include "common.cuh"
#include "half.h"

namespace tpt_fast {
namespace {

constexpr int kThreads = 256;

template <bool kBackward, int kVector, class T>
__global__ void __launch_bounds__(kThreads) bias_act_kernel(const BiasActParams<T> p, unsigned vectors) {
  using A = Accumulate<T>;
  const unsigned vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= vectors) return;
  const int64_t at = static_cast<int64_t>(vector) * kVector;
  const auto x = load_vector<kVector>(p.x + at);
  Vector<A, kVector> bias{};
  if (p.bias) bias = load_vector<kVector>(p.bias + vector % static_cast<unsigned>(p.width / kVector) * kVector);
  Vector<T, kVector> grad{}, out;
  if constexpr (kBackward) grad = load_vector<kVector>(p.grad + at);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const A value = widen(x.values[i]) + bias.values[i];
    if constexpr (kBackward) {
      const A slope = p.quick ? quick_gelu_slope(value) : gelu_slope(value);
      out.values[i] = narrow<T>(widen(grad.values[i]) * slope);
    } else {
      out.values[i] = narrow<T>(p.quick ? quick_gelu(value) : gelu(value));
    }
  }
  store_vector(p.out + at, out);
}

template <bool kBackward, class T>
cudaError_t launch_either(const BiasActParams<T>& p, cudaStream_t stream) {
  const int64_t elements = p.rows * p.width;
  if (elements == 0) return cudaSuccess;
  const auto run = [&](auto kernel, int64_t vector) -> cudaError_t {
    const int64_t vectors = elements / vector;
    if (vectors > kMaxGridX) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(ceil_div(vectors, kThreads)));
    return launch(kernel, grid, dim3(kThreads), 0, stream, p, static_cast<unsigned>(vectors));
  };
  constexpr int kVector = 16 / sizeof(T);
  const bool fits = vectors_fit<kVector>(p.width, p.x, p.out, p.bias, p.grad);
  return fits ? run(bias_act_kernel<kBackward, kVector, T>, kVector) : run(bias_act_kernel<kBackward, 1, T>, 1);
}

}  // namespace

template <class T>
cudaError_t launch_bias_act_forward(const BiasActParams<T>& p, cudaStream_t stream) {
  return launch_either<false, T>(p, stream);
}

template <class T>
cudaError_t launch_bias_act_backward(const BiasActParams<T>& p, cudaStream_t stream) {
  return launch_either<true, T>(p, stream);
}

#define TPT_FAST_INSTANTIATE(T)                                                           \
  template cudaError_t launch_bias_act_forward<T>(const BiasActParams<T>&, cudaStream_t); \
  template cudaError_t launch_bias_act_backward<T>(const BiasActParams<T>&, cudaStream_t);
TPT_FAST_INSTANTIATE(float)
TPT_FAST_INSTANTIATE(double)
TPT_FAST_INSTANTIATE(Half)
TPT_FAST_INSTANTIATE(BFloat16)
#undef TPT_FAST_INSTANTIATE

}  // namespace tpt_fast
