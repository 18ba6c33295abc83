// A warp a (class, head): lanes share the elements of a head, a dot product ends in five shuffles, and a lane keeps the
// score of one of 32 keys, so that softmax is a warp reduction. Suffixes are a few tokens long, so there are thousands
// of warps with a dozen keys each: latency bounds it, hence loops over keys are unrolled. The prefix's keys and values,
// the same for all warps of a head, are read through L1: shared memory would hold the same bytes and limit the prefix.
//
// The backward pass sums nothing in memory. It goes first by query (statistics of the softmax, gradient of q), then by
// key (a key's gradient is a sum over the queries that see it, in registers). A prefix key is seen by all classes: its
// sums over blocks of classes land in `partial`, and a last launch adds them in order. So the bits never change.
#include "common.cuh"
#include "half.h"
#include "prefix_attention.h"

namespace tpt_fast {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// Blocks that a multiprocessor must have registers for: few enough that nothing is spilled, which the compiler's own
// guess at a good number of registers does here.
constexpr int resident_blocks(int per) { return per == 2 ? 6 : 5; }

// A lane's elements of one head of a row: lane, lane + 32, ...
template <int kPer, class A>
struct Part {
  A values[kPer];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPer; ++i) values[i] = 0;
  }
  __device__ __forceinline__ void add(A factor, const Part& x) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) values[i] += factor * x.values[i];
  }
  __device__ __forceinline__ void scale(A factor) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) values[i] *= factor;
  }
  // All lanes of the warp get the product.
  __device__ __forceinline__ A dot(const Part& x) const {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum += values[i] * x.values[i];
    return warp_reduce(sum, Sum());
  }
};

// The keys of one query: rows 0..shared-1 and start..row, in this order.
struct Keys {
  int64_t shared, start, row;

  __device__ __forceinline__ int count() const { return static_cast<int>(shared + row + 1 - start); }
  __device__ __forceinline__ int64_t at(int j) const { return j < shared ? j : start + j - shared; }
};

// One head of one batch: reads and writes rows, and does what a query or a key does.
template <int kPer, class T>
struct Head {
  using A = Accumulate<T>;
  using Row = Part<kPer, A>;
  const PrefixAttentionParams<T>& p;
  int64_t b;
  int head, dim, lane;
  A scaling;

  __device__ __forceinline__ Head(const PrefixAttentionParams<T>& p, int64_t b, int head)
      : p(p),
        b(b),
        head(head),
        dim(static_cast<int>(p.width / p.heads)),
        lane(threadIdx.x % kWarp),
        scaling(A(1) / std::sqrt(static_cast<A>(dim))) {}

  __device__ __forceinline__ Row load(const T* row) const {
    Row result;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int at = lane + i * kWarp;
      result.values[i] = at < dim ? widen(row[head * dim + at]) : A(0);
    }
    return result;
  }
  template <class To>
  __device__ __forceinline__ void store(To* row, const Row& x) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int at = lane + i * kWarp;
      if (at < dim) row[head * dim + at] = narrow<To>(x.values[i]);
    }
  }
  __device__ __forceinline__ Row q(int64_t query) const { return load(p.q + b * p.q_batch + query * p.q_row); }
  __device__ __forceinline__ Row k(int64_t row) const { return load(p.kv + b * p.kv_batch + row * p.kv_row); }
  __device__ __forceinline__ Row v(int64_t row) const { return load(p.kv + b * p.kv_batch + row * p.kv_row + p.width); }
  __device__ __forceinline__ Row grad(int64_t query) const {
    return load(p.grad + (b * p.queries() + query) * p.width);
  }
  __device__ __forceinline__ A* stats(int64_t query) const {
    return p.stats + 2 * ((b * p.heads + head) * p.queries() + query);
  }

  __device__ void attend(int64_t query, Keys keys) const {
    const Row own = q(query);
    Row out;
    out.clear();
    A largest = -kInfinity<A>, sum = 0;
    const int count = keys.count();
    for (int base = 0; base < count; base += kWarp) {
      const int n = min(kWarp, count - base);
      A score = -kInfinity<A>;
#pragma unroll 4
      for (int j = 0; j < n; ++j) {
        const A s = scaling * own.dot(k(keys.at(base + j)));
        if (lane == j) score = s;
      }
      const A before = largest;
      largest = Max()(largest, warp_reduce(score, Max()));
      const A prob = lane < n ? exp_nonpositive(score - largest) : A(0);
      const A shrink = base == 0 ? A(0) : exp_nonpositive(before - largest);
      sum = sum * shrink + warp_reduce(prob, Sum());
      out.scale(shrink);
#pragma unroll 4
      for (int j = 0; j < n; ++j) out.add(__shfl_sync(kAllLanes, prob, j), v(keys.at(base + j)));
    }
    out.scale(A(1) / sum);
    store(p.out + (b * p.queries() + query) * p.width, out);
  }

  // Writes grad_q of the query, and its statistics: log sum exp of the scores, sum_j p_j slope_j.
  __device__ void query_backward(int64_t query, Keys keys) const {
    const Row own = q(query), wanted = grad(query);
    A largest = -kInfinity<A>, sum = 0, along = 0, score = 0, slope = 0;
    const int count = keys.count();
    const auto chunk = [&](int base, int n) {
      score = -kInfinity<A>;
      slope = 0;
#pragma unroll 2
      for (int j = 0; j < n; ++j) {
        const int64_t row = keys.at(base + j);
        const A s = scaling * own.dot(k(row)), d = wanted.dot(v(row));
        if (lane == j) {
          score = s;
          slope = d;
        }
      }
    };
    for (int base = 0; base < count; base += kWarp) {
      const int n = min(kWarp, count - base);
      chunk(base, n);
      const A before = largest;
      largest = Max()(largest, warp_reduce(score, Max()));
      const A prob = lane < n ? exp_nonpositive(score - largest) : A(0);
      const A shrink = base == 0 ? A(0) : exp_nonpositive(before - largest);
      sum = sum * shrink + warp_reduce(prob, Sum());
      along = along * shrink + warp_reduce(prob * slope, Sum());
    }
    along /= sum;
    const A log_sum = largest + std::log(sum);
    Row result;
    result.clear();
    for (int base = 0; base < count; base += kWarp) {
      const int n = min(kWarp, count - base);
      if (count > kWarp) chunk(base, n);
      const A s = lane < n ? scaling * exp_nonpositive(score - log_sum) * (slope - along) : A(0);
#pragma unroll 2
      for (int j = 0; j < n; ++j) result.add(__shfl_sync(kAllLanes, s, j), k(keys.at(base + j)));
    }
    store(p.grad_q + b * p.grad_q_batch + query * p.grad_q_row, result);
    if (lane == 0) {
      stats(query)[0] = log_sum;
      stats(query)[1] = along;
    }
  }

  // Adds what one query gives to the gradient of the key and value of `row`.
  __device__ __forceinline__ void key_backward(int64_t query, const Row& key, const Row& value, Row& grad_k,
                                               Row& grad_v) const {
    const Row own = q(query), wanted = grad(query);
    const A prob = exp_nonpositive(scaling * own.dot(key) - stats(query)[0]);
    grad_k.add(scaling * prob * (wanted.dot(value) - stats(query)[1]), own);
    grad_v.add(prob, wanted);
  }

  __device__ __forceinline__ void store_key(int64_t row, const Row& grad_k, const Row& grad_v) const {
    T* to = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
    store(to, grad_k);
    store(to + p.width, grad_v);
  }
};

// Calls visit(head of this warp, item) with the warps' (item, head); `items` classes, or one more for the prefix.
template <int kPer, class T, class Visit>
__device__ __forceinline__ void for_item(const PrefixAttentionParams<T>& p, int64_t items, Visit visit) {
  const int64_t warp = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (warp >= items * p.heads) return;  // a whole warp
  visit(Head<kPer, T>(p, blockIdx.y, static_cast<int>(warp / items)), warp % items);
}

// Grid: ((classes + 1) * heads / warps, batch).
template <int kPer, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kPer))
    prefix_attention_kernel(const __grid_constant__ PrefixAttentionParams<T> p) {
  for_item<kPer>(p, p.classes + 1, [&](const Head<kPer, T>& head, int64_t c) {
    if (c == p.classes) {
      for (int64_t row = 0; row < p.prefix && !p.last_only; ++row) head.attend(row, {0, 0, row});
      return;
    }
    const int64_t start = p.offsets[c], stop = p.offsets[c + 1];
    for (int64_t row = p.last_only ? stop - 1 : start; row < stop; ++row)
      head.attend(p.last_only ? c : row, {p.prefix, start, row});
  });
}

// Grid: the same. Writes stats, grad_q, and grad_kv of the suffixes.
template <int kPer, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kPer))
    prefix_attention_backward_kernel(const __grid_constant__ PrefixAttentionParams<T> p) {
  for_item<kPer>(p, p.classes + 1, [&](const Head<kPer, T>& head, int64_t c) {
    if (c == p.classes) {
      for (int64_t row = 0; row < p.prefix && !p.last_only; ++row) head.query_backward(row, {0, 0, row});
      return;
    }
    const int64_t start = p.offsets[c], stop = p.offsets[c + 1];
    for (int64_t row = p.last_only ? stop - 1 : start; row < stop; ++row)
      head.query_backward(p.last_only ? c : row, {p.prefix, start, row});
    __syncwarp();  // lane 0 wrote the statistics
    for (int64_t key = start; key < stop; ++key) {
      const auto k = head.k(key), v = head.v(key);
      auto grad_k = k, grad_v = v;
      grad_k.clear();
      grad_v.clear();
      for (int64_t row = p.last_only ? stop - 1 : key; row < stop; ++row)
        head.key_backward(p.last_only ? c : row, k, v, grad_k, grad_v);
      head.store_key(key, grad_k, grad_v);
    }
  });
}

// Grid: (blocks of classes, heads, batch); a warp a prefix key. Writes partial.
template <int kPer, class T>
__global__ void __launch_bounds__(kThreads, resident_blocks(kPer))
    prefix_attention_partial_kernel(const __grid_constant__ PrefixAttentionParams<T> p) {
  const Head<kPer, T> head(p, blockIdx.z, blockIdx.y);
  const int64_t first = blockIdx.x * kPrefixAttentionClassesAtOnce;
  const int64_t last = min(first + kPrefixAttentionClassesAtOnce, p.classes);
  const int64_t begin = p.last_only ? first : p.offsets[first], end = p.last_only ? last : p.offsets[last];
  for (int64_t key = threadIdx.x / kWarp; key < p.prefix; key += kWarps) {
    const auto k = head.k(key), v = head.v(key);
    auto grad_k = k, grad_v = v;
    grad_k.clear();
    grad_v.clear();
#pragma unroll 2
    for (int64_t query = begin; query < end; ++query) head.key_backward(query, k, v, grad_k, grad_v);
    auto* to = p.partial + ((head.b * p.blocks() + blockIdx.x) * p.prefix + key) * 2 * p.width;
    head.store(to, grad_k);
    head.store(to + p.width, grad_v);
  }
}

// Grid: (prefix * heads / warps, batch). Writes grad_kv of the prefix.
template <int kPer, class T>
__global__ void __launch_bounds__(kThreads)
    prefix_attention_prefix_kernel(const __grid_constant__ PrefixAttentionParams<T> p) {
  using A = Accumulate<T>;
  for_item<kPer>(p, p.prefix, [&](const Head<kPer, T>& head, int64_t key) {
    const auto k = head.k(key), v = head.v(key);
    Part<kPer, A> grads[2];
    for (int which = 0; which < 2; ++which) {
      grads[which].clear();
      const A* from = p.partial + (head.b * p.blocks() * p.prefix + key) * 2 * p.width + which * p.width;
      for (int64_t block = 0; block < p.blocks(); ++block, from += p.prefix * 2 * p.width) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const int at = head.lane + i * kWarp;
          if (at < head.dim) grads[which].values[i] += from[head.head * head.dim + at];
        }
      }
    }
    for (int64_t row = key; row < p.prefix && !p.last_only; ++row) head.key_backward(row, k, v, grads[0], grads[1]);
    head.store_key(key, grads[0], grads[1]);
  });
}

template <class T>
bool fits(const PrefixAttentionParams<T>& p) {
  const int64_t warps = (p.classes + 1 > p.prefix ? p.classes + 1 : p.prefix) * p.heads;
  return p.width / p.heads <= 4 * kWarp && warps <= kMaxGridX && p.batch <= kMaxGridY && p.heads <= kMaxGridY;
}

template <int kPer, class T>
cudaError_t launch_items(void (*kernel)(PrefixAttentionParams<T>), const PrefixAttentionParams<T>& p, int64_t items,
                         cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(items * p.heads, kWarps)), static_cast<unsigned>(p.batch));
  return launch(kernel, grid, dim3(kThreads), 0, stream, p);
}

template <int kPer, class T>
cudaError_t launch_backward(const PrefixAttentionParams<T>& p, cudaStream_t stream) {
  cudaError_t error = launch_items<kPer, T>(prefix_attention_backward_kernel<kPer, T>, p, p.classes + 1, stream);
  if (error == cudaSuccess && p.classes > 0 && p.prefix > 0) {
    const dim3 grid(static_cast<unsigned>(p.blocks()), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
    error = launch(prefix_attention_partial_kernel<kPer, T>, grid, dim3(kThreads), 0, stream, p);
  }
  if (error != cudaSuccess) return error;
  return launch_items<kPer, T>(prefix_attention_prefix_kernel<kPer, T>, p, p.prefix, stream);
}

// Heads of up to 64 elements (every CLIP text tower), or of up to 128; float64 is for checking gradients only.
template <class T, class Run>
cudaError_t with_head(const PrefixAttentionParams<T>& p, Run run) {
  if (p.batch == 0) return cudaSuccess;
  if (!fits(p)) return cudaErrorInvalidValue;
  if constexpr (sizeof(T) <= 4) {
    if (p.width / p.heads <= 2 * kWarp) return run(std::integral_constant<int, 2>());
  }
  return run(std::integral_constant<int, 4>());
}

}  // namespace

template <class T>
cudaError_t launch_prefix_attention(const PrefixAttentionParams<T>& p, cudaStream_t stream) {
  return with_head(p, [&](auto per) {
    return launch_items<per.value, T>(prefix_attention_kernel<per.value, T>, p, p.classes + 1, stream);
  });
}

template <class T>
cudaError_t launch_prefix_attention_backward(const PrefixAttentionParams<T>& p, cudaStream_t stream) {
  return with_head(p, [&](auto per) { return launch_backward<per.value>(p, stream); });
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
