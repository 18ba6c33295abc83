// Two ways to lay out a head. 16-bit heads of 64, which is every CLIP text tower in half precision, go through tensor
// cores in tiles of 16 rows; all others through lanes.
//
// In tiles a warp works on three neighbouring classes and one head: twelve or thirteen queries, their own keys, and
// those of the prefix, 16 of each at a time. Nothing is staged in shared memory: an operand is loaded straight into the
// places where the instructions want it, or within four lanes of them, and what has to be transposed is so in registers
// (movmatrix). A block's four warps have the same head, so three of them find the prefix in L1. What would be rounded
// to 16 bits between two products goes in as two terms, so that a result is float32's, rounded once.
//
// In lanes a warp works on one class and four heads: eight lanes, a group, hold one head of a row, eight elements each,
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
// sums over blocks of classes land in `partial`, and a last launch adds the blocks. In tiles one launch does all but
// that. In lanes another one writes `partial`, a warp a key, whose groups take every fourth query and are added up by
// two shuffles. Order is fixed, so the bits never change.
//
// Counted, not timed: none of this has run on a GPU. Compiled for 9.0, a row of a head of ImageNet's names takes about
// 75 instructions of a warp in tiles and 175 in lanes forward, 230 and 700 backward. An H100's multiprocessor can issue
// about 140 and 250 in the time in which its share of the memory moves the row's bytes, so lanes are bound by
// instructions; in tiles forward should be bound by memory, and backward by both. What the backward pass could still
// save: it computes the scores three times (for the statistics, for q, for the keys), which classes of more rows than a
// tile need and shorter ones do not.
//
// Dangers: heads over 128, and strides whose offsets within an image would leave 32 bits, are refused before the launch
// (fits), heads also by name in Python. Staged prefixes take 20 KB of shared memory at most, so nothing is asked for.
// Vectors and tiles only where all pointers and strides are aligned. No counters and no fences: what one launch leaves
// to the next goes by the order of the stream. Before 8.0 a product of tiles is two of half the depth, and bfloat16,
// which has none there, is refused by the binding.
#include <algorithm>

#include "prefix_attention.h"
#include "prefix_attention_lanes.cuh"
#include "prefix_attention_tiles.cuh"

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

// Blocks that a multiprocessor must have registers for: as many as spill nothing.
constexpr int resident_blocks(int per) { return per > 8 ? 2 : 3; }
constexpr int partial_blocks(int per) { return per > 8 ? 1 : 2; }
constexpr int kTileBlocks = 3, kTileBackwardBlocks = 2;

template <int kPer>
constexpr int kForwardQueries = kPer == 8 ? 4 : 1;
template <int kPer>
constexpr int kBackwardQueries = kPer == 8 ? 2 : 1;

// Grid: (items / warps, heads / 4, batch).
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kPer))
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
__global__ void __launch_bounds__(kThreads, resident_blocks(kPer))
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
__global__ void __launch_bounds__(kPartialWarps* kWarp, partial_blocks(kPer))
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

// Grid: (blocks of classes and of the prefix's rows, heads, batch).
template <class T>
__global__ void __launch_bounds__(kThreads, kTileBlocks)
    prefix_attention_tiles_kernel(const __grid_constant__ Attention<T> p) {
  const TileHead<T> head(p, blockIdx.z, blockIdx.y);
  head.attend(head.item(blockIdx.x, threadIdx.x / kWarp));
}

// Grid: the same. Writes stats, grad_q, grad_kv of the suffixes, and partial.
template <class T>
__global__ void __launch_bounds__(kThreads, kTileBackwardBlocks)
    prefix_attention_tiles_backward_kernel(const __grid_constant__ Attention<T> p) {
  const TileHead<T> head(p, blockIdx.z, blockIdx.y);
  const Item item = head.item(blockIdx.x, threadIdx.x / kWarp);
  head.query_backward(item);
  if (blockIdx.x >= p.blocks()) return;  // all of them
  __syncwarp();                          // one lane of four wrote the statistics
  head.own_keys_backward(item);
  head.prefix_keys_backward(item, blockIdx.x);
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
  return p.width / p.heads <= 128 && p.batch <= kMaxGridY && p.heads <= kMaxGridY &&
         std::max({p.rows, p.width, p.q_row, p.kv_row, p.grad_q_row, p.grad_kv_row}) <=
             kMaxGridX / 8;  // four of them, in bytes too
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

// How the elements of a head lie: spread over the eight lanes of a group, or in tiles.
template <int kPerLane, int kVectorOfLane>
struct Lanes {
  static constexpr int kPer = kPerLane, kVector = kVectorOfLane;
};
struct Tiles : Lanes<8, 8> {};  // of the last launch

template <class T>
cudaError_t launch_tiles(void (*kernel)(Attention<T>), const Attention<T>& p, cudaStream_t stream) {
  const int64_t blocks = p.blocks() + (p.last_only ? 0 : ceil_div(p.prefix, kWarps * kTileRows));
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  return launch(kernel, grid, dim3(kThreads), 0, stream, p);
}

template <class T, class Layout>
cudaError_t launch_forward(const Attention<T>& p, Layout, cudaStream_t stream) {
  if constexpr (std::is_same_v<Layout, Tiles>) {
    return launch_tiles(prefix_attention_tiles_kernel<T>, p, stream);
  } else {
    constexpr int kPer = Layout::kPer;
    return launch_items<kForwardQueries<kPer>, kPer>(prefix_attention_kernel<kPer, Layout::kVector, T>, p, stream);
  }
}

// All but the gradients of the prefix's keys, of which it leaves the parts.
template <class T, class Layout>
cudaError_t launch_parts(const Attention<T>& p, Layout, cudaStream_t stream) {
  if constexpr (std::is_same_v<Layout, Tiles>) {
    return launch_tiles(prefix_attention_tiles_backward_kernel<T>, p, stream);
  } else {
    constexpr int kPer = Layout::kPer, kVector = Layout::kVector;
    const auto kernel = prefix_attention_backward_kernel<kPer, kVector, T>;
    const cudaError_t error = launch_items<kBackwardQueries<kPer>, kPer>(kernel, p, stream);
    if (error != cudaSuccess || p.prefix == 0 || p.classes == 0) return error;
    const dim3 grid(static_cast<unsigned>(p.blocks()), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
    const int64_t rounds = ceil_div(p.prefix, kPartialWarps);
    const dim3 block(static_cast<unsigned>(ceil_div(p.prefix, rounds)) * kWarp);
    return launch(prefix_attention_partial_kernel<kPer, kVector, T>, grid, block, 0, stream, p);
  }
}

template <class T, class Layout>
cudaError_t launch_backward(const Attention<T>& p, Layout layout, cudaStream_t stream) {
  const cudaError_t error = launch_parts(p, layout, stream);
  if (error != cudaSuccess || p.prefix == 0) return error;
  const dim3 grid(static_cast<unsigned>(p.prefix), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  const auto kernel = prefix_attention_prefix_kernel<Layout::kPer, Layout::kVector, T>;
  return launch(kernel, grid, dim3(kWarp), 0, stream, p);
}

// Calls run(p, layout): tiles for 16-bit heads of 64, as every CLIP text tower has them; vectors for float32 and up to
// 64; single elements for all others, for unaligned rows, and for float64, which is for checking gradients only.
template <class T, class Run>
cudaError_t with_layout(const PrefixAttentionParams<T>& p, Run run) {
  if (p.batch == 0) return cudaSuccess;
  if (!fits(p)) return cudaErrorInvalidValue;
  const int dim = static_cast<int>(p.width / p.heads);
  const auto with = [&](auto layout) {
    const auto scaling = Accumulate<T>(1) / std::sqrt(static_cast<Accumulate<T>>(dim));
    return run(Attention<T>{p, dim, scaling, prefix_bytes<layout.kPer>(p) <= kPrefixBytes}, layout);
  };
  if constexpr (sizeof(T) <= 4) {
    constexpr int kVector = 16 / sizeof(T);
    const int64_t strides =
        p.q_batch | p.q_row | p.kv_batch | p.kv_row | p.grad_q_batch | p.grad_q_row | p.grad_kv_batch | p.grad_kv_row;
    const bool fit = vectors_fit<kVector>(strides | dim, p.q, p.kv, p.grad, p.out, p.grad_q, p.grad_kv, p.partial);
    if constexpr (sizeof(T) == 2) {
      if (fit && dim == kTileColumns) return with(Tiles());
    } else {
      if (fit && dim <= 64) return with(Lanes<8, kVector>());
    }
  }
  return with(Lanes<16, 1>());
}

}  // namespace

template <class T>
cudaError_t launch_prefix_attention(const PrefixAttentionParams<T>& params, cudaStream_t stream) {
  return with_layout(params, [&](const Attention<T>& p, auto layout) { return launch_forward(p, layout, stream); });
}

template <class T>
cudaError_t launch_prefix_attention_backward(const PrefixAttentionParams<T>& params, cudaStream_t stream) {
  return with_layout(params, [&](const Attention<T>& p, auto layout) { return launch_backward(p, layout, stream); });
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
