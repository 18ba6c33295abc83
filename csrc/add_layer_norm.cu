// A warp a row, four rows a block, no shared memory: reductions are shuffles. Memory bounds it: each element is read
// once and written once. A lane holds its part of the row in registers, in storage type, for widths up to 1536 (all
// CLIP text towers); wider or unaligned rows are read again instead, from L1.
#include "add_layer_norm.h"
#include "common.cuh"
#include "half.h"

namespace tpt_fast {
namespace {

constexpr int kRowsPerBlock = 4;
constexpr int kThreads = kRowsPerBlock * kWarp;

// A lane's part of a row: kHeld vectors kept in registers, or none and read again each time.
template <int kHeld, int kVector, class T>
struct RowPart {
  Vector<T, kVector> held[kHeld > 0 ? kHeld : 1];
  const T* row;
  int width, lane;

  __device__ __forceinline__ RowPart(const T* row, int width, int lane) : row(row), width(width), lane(lane) {}

  // Calls visit(element's index, vector, vector's number) for each vector; `fetch` reads them from memory first.
  template <bool kFetch, class Visit>
  __device__ __forceinline__ void each(Visit visit) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int i = (j * kWarp + lane) * kVector;
        if (i >= width) continue;
        if constexpr (kFetch) held[j] = load_vector<kVector>(row + i);
        visit(i, held[j], j);
      }
    } else {
      for (int i = lane * kVector; i < width; i += kWarp * kVector) {
        held[0] = load_vector<kVector>(row + i);
        visit(i, held[0], 0);
      }
    }
  }
};

// Blocks that a multiprocessor must have registers for: few enough that no row part is spilled.
constexpr int resident_blocks(int held_values) { return held_values == 0 ? 10 : held_values <= 24 ? 8 : 5; }

template <int kHeld, int kVector, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kHeld* kVector))
    add_layer_norm_kernel(const AddLayerNormParams<T> p) {
  using A = Accumulate<T>;
  const int64_t row = blockIdx.x * int64_t{kRowsPerBlock} + threadIdx.x / kWarp;
  if (row >= p.rows) return;  // a whole warp
  const int width = static_cast<int>(p.width), lane = threadIdx.x % kWarp;
  const int64_t at = row * p.width;
  const A inverse_width = A(1) / static_cast<A>(width);

  RowPart<kHeld, kVector, T> part(p.x + at, width, lane);
  A total = 0;
  part.template each<true>([&](int i, Vector<T, kVector>& x, int) {
    if (p.delta) {
      const auto delta = load_vector<kVector>(p.delta + at + i);
      Vector<A, kVector> delta_bias{};
      if (p.delta_bias) delta_bias = load_vector<kVector>(p.delta_bias + i);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        x.values[v] = narrow<T>(widen(x.values[v]) + (widen(delta.values[v]) + delta_bias.values[v]));
      }
      store_vector(p.sum + at + i, x);
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) total += widen(x.values[v]);
  });
  if (p.delta) part.row = p.sum + at;  // each lane reads again what it wrote itself
  const A mean = warp_reduce(total, Sum()) * inverse_width;

  A squares = 0;
  part.template each<false>([&](int, const Vector<T, kVector>& x, int) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) squares += (widen(x.values[v]) - mean) * (widen(x.values[v]) - mean);
  });
  const A rstd = A(1) / std::sqrt(warp_reduce(squares, Sum()) * inverse_width + static_cast<A>(p.eps));

  part.template each<false>([&](int i, const Vector<T, kVector>& x, int) {
    const auto weight = load_vector<kVector>(p.weight + i), bias = load_vector<kVector>(p.bias + i);
    Vector<T, kVector> normed;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      normed.values[v] = narrow<T>((widen(x.values[v]) - mean) * rstd * weight.values[v] + bias.values[v]);
    }
    store_vector(p.normed + at + i, normed);
  });
  if (lane == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

template <int kHeld, int kVector, class T>
__global__ void __launch_bounds__(kThreads) add_layer_norm_backward_kernel(const AddLayerNormBackwardParams<T> p) {
  using A = Accumulate<T>;
  const int64_t row = blockIdx.x * int64_t{kRowsPerBlock} + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int width = static_cast<int>(p.width), lane = threadIdx.x % kWarp;
  const int64_t at = row * p.width;
  const A inverse_width = A(1) / static_cast<A>(width), mean = p.mean[row], rstd = p.rstd[row];

  RowPart<kHeld, kVector, T> grads(p.grad_normed + at, width, lane), sums(p.sum + at, width, lane);
  A total = 0, along = 0;  // of the gradient of the normalised values, and of its part along them
  if constexpr (kHeld > 0) sums.template each<true>([](int, const Vector<T, kVector>&, int) {});
  grads.template each<true>([&](int i, const Vector<T, kVector>& grad, int j) {
    if constexpr (kHeld == 0) sums.held[0] = load_vector<kVector>(sums.row + i);
    const auto& sum = sums.held[j];
    const auto weight = load_vector<kVector>(p.weight + i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const A g = widen(grad.values[v]) * weight.values[v];
      total += g;
      along += g * (widen(sum.values[v]) - mean);
    }
  });
  const A shift = warp_reduce(total, Sum()) * inverse_width;
  const A slope = warp_reduce(along, Sum()) * rstd * rstd * inverse_width;

  grads.template each<false>([&](int i, const Vector<T, kVector>& grad, int j) {
    if constexpr (kHeld == 0) sums.held[0] = load_vector<kVector>(sums.row + i);
    const auto& sum = sums.held[j];
    const auto weight = load_vector<kVector>(p.weight + i);
    Vector<T, kVector> through{}, result;
    if (p.grad_sum) through = load_vector<kVector>(p.grad_sum + at + i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const A own = rstd * (widen(grad.values[v]) * weight.values[v] - shift - (widen(sum.values[v]) - mean) * slope);
      result.values[v] = narrow<T>(p.grad_sum ? widen(through.values[v]) + own : own);
    }
    store_vector(p.grad + at + i, result);
  });
}

// Chooses the kernel by width and alignment; `kernel` is called with the two constants.
template <class T, class P, class Run>
cudaError_t choose(const P& p, bool aligned, Run run) {
  if (p.rows == 0) return cudaSuccess;
  if (ceil_div(p.rows, kRowsPerBlock) > kMaxGridX || p.width > (1 << 30)) return cudaErrorInvalidValue;
  constexpr int kVector = 16 / sizeof(T), kNarrow = 768 / (kWarp * kVector);
  if constexpr (sizeof(T) <= 4) {
    if (aligned && p.width <= 768)
      return run(std::integral_constant<int, kNarrow>(), std::integral_constant<int, kVector>());
    if (aligned && p.width <= 1536)
      return run(std::integral_constant<int, 2 * kNarrow>(), std::integral_constant<int, kVector>());
  }
  return run(std::integral_constant<int, 0>(), std::integral_constant<int, 1>());
}

template <class P>
dim3 grid_of(const P& p) {
  return dim3(static_cast<unsigned>(ceil_div(p.rows, kRowsPerBlock)));
}

}  // namespace

template <class T>
cudaError_t launch_add_layer_norm(const AddLayerNormParams<T>& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = vectors_fit<kVector>(p.width, p.x, p.delta, p.sum, p.normed, p.delta_bias, p.weight, p.bias);
  return choose<T>(p, aligned, [&](auto held, auto vector) {
    return launch(add_layer_norm_kernel<held.value, vector.value, T>, grid_of(p), dim3(kThreads), 0, stream, p);
  });
}

template <class T>
cudaError_t launch_add_layer_norm_backward(const AddLayerNormBackwardParams<T>& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = vectors_fit<kVector>(p.width, p.grad_normed, p.grad_sum, p.sum, p.grad, p.weight);
  return choose<T>(p, aligned, [&](auto held, auto vector) {
    return launch(add_layer_norm_backward_kernel<held.value, vector.value, T>, grid_of(p), dim3(kThreads), 0, stream,
                  p);
  });
}

#define TPT_FAST_INSTANTIATE(T)                                                              \
  template cudaError_t launch_add_layer_norm<T>(const AddLayerNormParams<T>&, cudaStream_t); \
  template cudaError_t launch_add_layer_norm_backward<T>(const AddLayerNormBackwardParams<T>&, cudaStream_t);
TPT_FAST_INSTANTIATE(float)
TPT_FAST_INSTANTIATE(double)
TPT_FAST_INSTANTIATE(Half)
TPT_FAST_INSTANTIATE(BFloat16)
#undef TPT_FAST_INSTANTIATE

}  // namespace tpt_fast
