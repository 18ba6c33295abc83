// Forward, a warp works on one class and four heads: eight lanes, a group, hold one head of a row, eight elements each,
// so a load of the warp is 512 dense bytes of a row. It takes four queries of the class at a time (two in the backward
// pass), so that a key or value is read and widened once for all four. Softmax goes by four keys at a time, and a lane
// keeps the score of one of them: one exponential a score, and sums are distributed over the lanes while they are
// formed (group_sums). The four heads see the same keys, so a warp does not diverge and its shuffles name all lanes; in
// code for a diverged warp, as with a class for each group, there is a WARPSYNC before each shuffle. So a block has not
// one head's keys and values of the prefix in shared memory but four; prefixes over 20 KB are read through L1. Rows of
// the prefix that ask are items of their own, four at a time: no warp has a long chain of them.
//
// The backward pass sums nothing in memory. It goes first by query (statistics of the softmax, gradient of q), then by
// key (a key's gradient is a sum over the queries that see it, in registers). A prefix key is seen by all classes: its
// sums over blocks of classes land in `partial`, a warp a key, whose groups take every fourth query and are added up by
// two shuffles; a last launch adds the blocks, split in the same way. Order is fixed, so the bits never change.
//
// Counted, not timed: none of this has run on a GPU. Compiled for 9.0 in half precision, the forward loop takes 660
// instructions for four queries, keys and heads, 64 products: 8 loads, 38 shuffles, 256 multiply-adds and 64
// conversions among them, 215 in all for the softmax and to load values. A warp a (class, head) with two elements a
// lane, as it was before, took 66 a product besides the softmax: for 64 products 4224, with 256 loads and 384 shuffles.
// What may still cost time: registers are so short that the loads of four values partly wait for each other.
#include "prefix_attention.h"
#include "prefix_attention_warp.cuh"

namespace tpt_fast {
namespace {

constexpr int kPartialWarps = 5;           // at most; SOS and four words are the usual prefix
constexpr size_t kPrefixBytes = 20 << 10;  // of shared memory: four blocks leave the smallest L1 some room

// A warp's item of work is a class, or kQueries rows of the prefix, for four heads.
template <int kQueries, class T>
TPT_FAST_HOST_DEVICE int items(const Attention<T>& p) {
  return static_cast<int>(p.classes) + (p.last_only ? 0 : (static_cast<int>(p.prefix) + kQueries - 1) / kQueries);
}

// Calls run(queries) with the queries of an item.
template <int kQueries, class T, class Run>
__device__ __forceinline__ void for_queries(const Attention<T>& p, int item, Run run) {
  const bool is_class = item < p.classes;
  const int start = is_class ? static_cast<int>(p.offsets[item]) : 0;
  const int stop = static_cast<int>(is_class ? p.offsets[item + 1] : p.prefix);
  const int shared = is_class ? static_cast<int>(p.prefix) : 0;
  int first = is_class ? p.last_only ? stop - 1 : start : (item - static_cast<int>(p.classes)) * kQueries;
  const int last = is_class ? stop : min(first + kQueries, stop);
  for (; first < last; first += kQueries)
    run(Queries{p.last_only ? item : first, first, start, min(last - first, kQueries), shared});
}

// Blocks that a multiprocessor must have registers for: as many as spill nothing. With four of half types, all warps of
// 1000 classes and eight heads are resident at once on 132 multiprocessors.
template <class T>
constexpr int resident_blocks(int per) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return per > 8 ? 2 : sizeof(T) == 2 ? 4 : 3;
#else
  return per > 8 ? 2 : 3;
#endif
}
// With four on 9.0, the blocks of 1000 classes and eight heads are all resident at once.
template <class T>
constexpr int partial_blocks(int per) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return per > 8 ? 1 : sizeof(T) == 2 ? 4 : 2;
#else
  return per > 8 ? 1 : sizeof(T) == 2 ? 3 : 2;
#endif
}

template <int kPer>
constexpr int kForwardQueries = kPer == 8 ? 4 : 1;
template <int kPer>
constexpr int kBackwardQueries = kPer == 8 ? 2 : 1;

// Grid: (items / warps, heads / 4, batch).
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(kPer))
    prefix_attention_kernel(const __grid_constant__ Attention<T> p) {
  constexpr int kQueries = kForwardQueries<kPer>;
  const Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y * kGroups + threadIdx.x % kWarp / kLanes);
  const int item = blockIdx.x * kWarps + threadIdx.x / kWarp;
  head.stage();
  if (item >= items<kQueries>(p)) return;  // a whole warp
  for_queries<kQueries>(p, item, [&](const Queries& queries) { head.template attend<kQueries>(queries); });
}

// Grid: the same. Writes stats, grad_q, and grad_kv of the suffixes.
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(kPer))
    prefix_attention_backward_kernel(const __grid_constant__ Attention<T> p) {
  constexpr int kQueries = kBackwardQueries<kPer>;
  const Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y * kGroups + threadIdx.x % kWarp / kLanes);
  const int item = blockIdx.x * kWarps + threadIdx.x / kWarp;
  head.stage();
  if (item >= items<kQueries>(p)) return;
  for_queries<kQueries>(p, item, [&](const Queries& queries) { head.template query_backward<kQueries>(queries); });
  if (item >= p.classes) return;
  __syncwarp();  // one lane of each group wrote the statistics
  const int stop = static_cast<int>(p.offsets[item + 1]);
  for (int key = static_cast<int>(p.offsets[item]); key < stop; ++key) {
    const Keys<T> from = head.keys(key);
    const auto k = head.load(from.first), v = head.load(from.first + from.value);
    auto grad_k = k, grad_v = v;
    grad_k.clear();
    grad_v.clear();
#pragma unroll(kPer == 8 ? 2 : 1)
    for (int row = p.last_only ? stop - 1 : key; row < stop; ++row)
      head.key_backward(p.last_only ? item : row, true, k, v, grad_k, grad_v);
    head.store_key(key, grad_k, grad_v);
  }
}

// Grid: (blocks of classes, heads, batch); a warp a prefix key, whose queries its groups share. Writes partial.
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kPartialWarps* kWarp, partial_blocks<T>(kPer))
    prefix_attention_partial_kernel(const __grid_constant__ Attention<T> p) {
  Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y);
  const int64_t first = blockIdx.x * kPrefixAttentionClassesAtOnce;
  const int64_t last = min(first + kPrefixAttentionClassesAtOnce, p.classes);
  const int64_t begin = p.last_only ? first : p.offsets[first], end = p.last_only ? last : p.offsets[last];
  for (int64_t key = threadIdx.x / kWarp; key < p.prefix; key += blockDim.x / kWarp) {
    const Keys<T> from = head.keys(key);
    const auto k = head.load(from.first), v = head.load(from.first + from.value);
    auto grad_k = k, grad_v = v;
    grad_k.clear();
    grad_v.clear();
    head.key_backward_of_groups(begin, end, k, v, grad_k, grad_v);
    grad_k.add_groups();
    grad_v.add_groups();
    auto* to = p.partial + ((head.b * p.blocks() + blockIdx.x) * p.prefix + key) * 2 * p.width;
    if (threadIdx.x % kWarp >= kLanes) continue;
    head.store(to, grad_k);
    head.store(to + p.width, grad_v);
  }
}

// Grid: (prefix, heads, batch); a warp, whose groups share the blocks of classes. Writes grad_kv of the prefix.
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kWarp) prefix_attention_prefix_kernel(const __grid_constant__ Attention<T> p) {
  using A = Accumulate<T>;
  const Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y);
  const int64_t key = blockIdx.x;
  const Keys<T> from = head.keys(key);
  const auto k = head.load(from.first), v = head.load(from.first + from.value);
  Part<kPer, A> grads[2];
  grads[0].clear();
  grads[1].clear();
  const A* sums = p.partial + (head.b * p.blocks() * p.prefix + key) * 2 * p.width + head.begin;
#pragma unroll 4
  for (int64_t block = threadIdx.x / kLanes; block < p.blocks(); block += kGroups) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int j = 0; j < kPer / kVector; ++j) {
        const int at = (j * kLanes + head.lane) * kVector;
        if (at >= head.dim) continue;
        const auto vector = load_vector<kVector>(sums + (2 * block * p.prefix + which) * p.width + at);
#pragma unroll
        for (int i = 0; i < kVector; ++i) grads[which].values[j * kVector + i] += vector.values[i];
      }
    }
  }
  if (!p.last_only) head.key_backward_of_groups(key, p.prefix, k, v, grads[0], grads[1]);
  grads[0].add_groups();
  grads[1].add_groups();
  if (threadIdx.x < kLanes) head.store_key(key, grads[0], grads[1]);
}

template <class T>
bool fits(const PrefixAttentionParams<T>& p) {
  return p.width / p.heads <= 128 && p.rows <= kMaxGridX && p.kv_row <= kMaxGridX && p.batch <= kMaxGridY &&
         p.heads <= kMaxGridY;
}

template <int kPer, class T>
size_t prefix_bytes(const PrefixAttentionParams<T>& p) {
  return static_cast<size_t>(p.prefix) * 2 * kWarp * kPer * sizeof(T);
}

template <int kQueries, int kPer, class T>
cudaError_t launch_items(void (*kernel)(Attention<T>), const Attention<T>& p, cudaStream_t stream) {
  if (items<kQueries>(p) == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(items<kQueries>(p), kWarps)),
                  static_cast<unsigned>(ceil_div(p.heads, kGroups)), static_cast<unsigned>(p.batch));
  return launch(kernel, grid, dim3(kThreads), p.staged ? prefix_bytes<kPer>(p) : 0, stream, p);
}

template <int kPer, int kVector, class T>
cudaError_t launch_backward(const Attention<T>& p, cudaStream_t stream) {
  const cudaError_t error =
      launch_items<kBackwardQueries<kPer>, kPer>(prefix_attention_backward_kernel<kPer, kVector, T>, p, stream);
  if (error != cudaSuccess || p.prefix == 0) return error;
  dim3 grid(static_cast<unsigned>(p.blocks()), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  if (p.classes > 0) {
    const int64_t rounds = ceil_div(p.prefix, kPartialWarps);
    const dim3 block(static_cast<unsigned>(ceil_div(p.prefix, rounds)) * kWarp);
    const cudaError_t error = launch(prefix_attention_partial_kernel<kPer, kVector, T>, grid, block, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  grid.x = static_cast<unsigned>(p.prefix);
  return launch(prefix_attention_prefix_kernel<kPer, kVector, T>, grid, dim3(kWarp), 0, stream, p);
}

// Calls run(p, elements of a lane, elements of a vector): vectors for heads of up to 64 (every CLIP text tower), single
// elements for longer or unaligned ones, and for float64, which is for checking gradients only.
template <class T, class Run>
cudaError_t with_head(const PrefixAttentionParams<T>& p, Run run) {
  if (p.batch == 0) return cudaSuccess;
  if (!fits(p)) return cudaErrorInvalidValue;
  const int dim = static_cast<int>(p.width / p.heads);
  const auto with = [&](auto per, auto vector) {
    const auto scaling = Accumulate<T>(1) / std::sqrt(static_cast<Accumulate<T>>(dim));
    return run(Attention<T>{p, dim, scaling, prefix_bytes<per.value>(p) <= kPrefixBytes}, per, vector);
  };
  if constexpr (sizeof(T) <= 4) {
    constexpr int kVector = 16 / sizeof(T);
    const int64_t strides =
        p.q_batch | p.q_row | p.kv_batch | p.kv_row | p.grad_q_batch | p.grad_q_row | p.grad_kv_batch | p.grad_kv_row;
    const bool fit = vectors_fit<kVector>(strides | dim, p.q, p.kv, p.grad, p.out, p.grad_q, p.grad_kv, p.partial);
    if (fit && dim <= 64) return with(std::integral_constant<int, 8>(), std::integral_constant<int, kVector>());
  }
  return with(std::integral_constant<int, 16>(), std::integral_constant<int, 1>());
}

}  // namespace

template <class T>
cudaError_t launch_prefix_attention(const PrefixAttentionParams<T>& params, cudaStream_t stream) {
  return with_head(params, [&](const Attention<T>& p, auto per, auto vector) {
    constexpr int kPer = per.value;
    return launch_items<kForwardQueries<kPer>, kPer>(prefix_attention_kernel<kPer, vector.value, T>, p, stream);
  });
}

template <class T>
cudaError_t launch_prefix_attention_backward(const PrefixAttentionParams<T>& params, cudaStream_t stream) {
  return with_head(params, [&](const Attention<T>& p, auto per, auto vector) {
    return launch_backward<per.value, vector.value>(p, stream);
  });
}

#define TPT_FAST_INSTANTIATE(T)                                                                   \
  template cudaError_t launch_prefix_attention<T>(const PrefixAttentionParams<T>&, cudaStream_t); \
  template cudaError_t launch_prefix_attention_backward<T>(const PrefixAttentionParams<T>&, cudaStream_t);
TPT_FAST_INSTANTIATE(float)
TPT_FAST_INSTANTIATE(double)
TPT_FAST_INSTANTIATE(Half)
TPT_FAST_INSTANTIATE(BFloat16)
#undef TPT_FAST_INSTANTIATE

}  // namespace tpt_fast
