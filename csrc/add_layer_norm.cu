// A warp a row, four rows a block, no shared memory: reductions are shuffles. Memory bounds it: each element is read
// once and written once. A lane holds its part of the row in registers, in storage type, for widths up to 1536 (all
// CLIP text towers), and reads all of them before it writes any: a load behind a store, which might be to the same
// memory, would wait for it. Wider or unaligned rows are read again instead, from L1.
//
// Dangers: a warp without a row leaves as a whole, so shuffles name all lanes; vectors only where every row is aligned;
// grid and widths are checked before the launch, and offsets are 64 bits wide.
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

  // Reads the vectors that are kept.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (first(j) < width) held[j] = load_vector<kVector>(row + first(j));
  }
  // The vector at element i, number j of the lane.
  __device__ __forceinline__ Vector<T, kVector> at(int i, int j) const {
    if constexpr (kHeld > 0)
      return held[j];
    else
      return load_vector<kVector>(row + i);
  }
  // Calls visit(element's index, vector, vector's number) for each vector; what it changes stays changed if it is kept.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (first(j) < width) visit(first(j), held[j], j);
    } else {
      for (int i = lane * kVector; i < width; i += kWarp * kVector) {
        held[0] = load_vector<kVector>(row + i);
        visit(i, held[0], 0);
      }
    }
  }
  __device__ __forceinline__ int first(int j) const { return (j * kWarp + lane) * kVector; }
};

// Blocks that a multiprocessor must have registers for: few enough that no row part is spilled.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMaxBlocks = 1024 / kThreads;  // 7.5 has room for no more threads
#else
constexpr int kMaxBlocks = 10;
#endif
constexpr int resident_blocks(size_t held_bytes) { return held_bytes == 0 ? kMaxBlocks : held_bytes <= 48 ? 8 : 4; }

template <int kHeld, int kVector, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kHeld * kVector * sizeof(T)))
    add_layer_norm_kernel(const AddLayerNormParams<T> p) {
  using A = Accumulate<T>;
  const int64_t row = blockIdx.x * int64_t{kRowsPerBlock} + threadIdx.x / kWarp;
  if (row >= p.rows) return;  // a whole warp
  const int width = static_cast<int>(p.width), lane = threadIdx.x % kWarp;
  const int64_t at = row * p.width;
  const A inverse_width = A(1) / static_cast<A>(width);

  RowPart<kHeld, kVector, T> part(p.x + at, width, lane), deltas(p.delta ? p.delta + at : nullptr, width, lane);
  part.hold();
  if (p.delta) deltas.hold();
  A total = 0;
  part.each([&](int i, Vector<T, kVector>& x, int j) {
    if (p.delta) {
      const auto delta = deltas.at(i, j);
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
  part.each([&](int, const Vector<T, kVector>& x, int) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) squares += (widen(x.values[v]) - mean) * (widen(x.values[v]) - mean);
  });
  const A rstd = A(1) / std::sqrt(warp_reduce(squares, Sum()) * inverse_width + static_cast<A>(p.eps));

  part.each([&](int i, const Vector<T, kVector>& x, int) {
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

  RowPart<kHeld, kVector, T> grads(p.grad_normed + at, width, lane), sums(p.sum + at, width, lane),
      throughs(p.grad_sum ? p.grad_sum + at : nullptr, width, lane);
  grads.hold();
  sums.hold();
  if (p.grad_sum) throughs.hold();
  A total = 0, along = 0;  // of the gradient of the normalised values, and of its part along them
  grads.each([&](int i, const Vector<T, kVector>& grad, int j) {
    const auto sum = sums.at(i, j);
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

  grads.each([&](int i, const Vector<T, kVector>& grad, int j) {
    const auto sum = sums.at(i, j);
    const auto weight = load_vector<kVector>(p.weight + i);
    Vector<T, kVector> through{}, result;
    if (p.grad_sum) through = throughs.at(i, j);
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
