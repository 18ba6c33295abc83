// STORY
#include "common.cuh"
#include "half.h"
#include "prefix_attention.h"

namespace tpt_fast {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLanes = 8;                // of a group, which works on one head
constexpr int kGroups = kWarp / kLanes;  // of a warp
constexpr int kChunk = 4;                // keys whose scores are known at once
constexpr int kMaxPartialWarps = 8;
constexpr size_t kPrefixBytes = 20 << 10;  // of shared memory: four blocks leave the smallest L1 some room

// A lane's elements of one head of a row, as they are stored: vectors lane, lane + 8, ... of the head.
template <int kPer, int kVector, class T>
struct Stored {
  Vector<T, kVector> vectors[kPer / kVector];
};

// The same elements to compute with.
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
  // This lane's part of the product.
  __device__ __forceinline__ A dot(const Part& x) const {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum += values[i] * x.values[i];
    return sum;
  }
  // All groups of the warp get the sum over them.
  __device__ __forceinline__ void add_groups() {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int offset = kLanes; offset < kWarp; offset *= 2)
        values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
    }
  }
};

// Sums each of kCount values over the lanes of a group; lane l gets the sum of values[l % kCount]. Two lanes exchange
// halves of what they have, so that four sums take four shuffles, where four of warp_reduce would take twelve.
template <int kCount, class A>
__device__ __forceinline__ A group_sums(A (&values)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  }
  A sum = values[0];
#pragma unroll
  for (int offset = kCount; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

// Where one head's keys lie: the first one, and the steps to the next key and from a key to its value.
template <class T>
struct Keys {
  const T* first;
  int64_t row, value;
};

// The rows first .. first + count - 1 that one warp works on together. Each sees `shared` keys of the prefix, and from
// `start` on the rows up to itself. `query` is the place of the first one in q and out.
struct Queries {
  int64_t query, first, start;
  int count, shared;

  __device__ __forceinline__ int own(int i) const { return i < count ? static_cast<int>(first + i + 1 - start) : 0; }
};

// One head of one batch as one group sees it. A head that is not there (`heads` is no multiple of four, or a query past
// the end) reads zeros and writes nothing, for all lanes of a warp have to take part in its shuffles.
template <int kPer, int kVector, class T>
struct Head {
  using A = Accumulate<T>;
  using Row = Part<kPer, A>;
  using Raw = Stored<kPer, kVector, T>;
  const PrefixAttentionParams<T>& p;
  int64_t b;
  int head, dim, lane;
  bool there;
  A scaling;

  __device__ __forceinline__ Head(const PrefixAttentionParams<T>& p, int64_t b, int head)
      : p(p),
        b(b),
        head(head),
        dim(static_cast<int>(p.width / p.heads)),
        lane(threadIdx.x % kLanes),
        there(head < p.heads),
        scaling(A(1) / std::sqrt(static_cast<A>(dim))) {}

  // Of a head that begins at `from`.
  __device__ __forceinline__ Raw fetch(const T* from, bool wanted = true) const {
    Raw raw{};
#pragma unroll
    for (int j = 0; j < kPer / kVector; ++j) {
      const int at = (j * kLanes + lane) * kVector;
      if (wanted && there && at < dim) raw.vectors[j] = load_vector<kVector>(from + at);
    }
    return raw;
  }
  __device__ __forceinline__ static Row wide(const Raw& raw) {
    Row row;
#pragma unroll
    for (int i = 0; i < kPer; ++i) row.values[i] = widen(raw.vectors[i / kVector].values[i % kVector]);
    return row;
  }
  template <class To>
  __device__ __forceinline__ void store(To* to, const Row& x) const {
#pragma unroll
    for (int j = 0; j < kPer / kVector; ++j) {
      const int at = (j * kLanes + lane) * kVector;
      Vector<To, kVector> vector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) vector.values[i] = narrow<To>(x.values[j * kVector + i]);
      if (there && at < dim) store_vector(to + head * dim + at, vector);
    }
  }
  __device__ __forceinline__ Row q(int64_t query, bool wanted = true) const {
    return wide(fetch(p.q + b * p.q_batch + query * p.q_row + head * dim, wanted));
  }
  __device__ __forceinline__ Row grad(int64_t query, bool wanted = true) const {
    return wide(fetch(p.grad + (b * p.queries() + query) * p.width + head * dim, wanted));
  }
  __device__ __forceinline__ Keys<T> keys(int64_t row) const {
    return {p.kv + b * p.kv_batch + row * p.kv_row + head * dim, p.kv_row, p.width};
  }
  __device__ __forceinline__ A* stats(int64_t query) const {
    return p.stats + 2 * ((b * p.heads + head) * p.queries() + query);
  }

  // Calls visit(keys, values, n, seen) with chunks of n keys, of which query i sees the first seen(i): those of the
  // suffix first, because every query sees one of them.
  template <class Visit>
  __device__ __forceinline__ void each_chunk(const Queries& queries, const Keys<T>& prefix, Visit visit) const {
    Keys<T> from = keys(queries.start);
    int left = queries.own(queries.count - 1), before = 0;
    bool causal = true;
    while (true) {
#pragma unroll 1
      for (; left > 0; left -= kChunk, before += kChunk, from.first += kChunk * from.row) {
        Raw k[kChunk], v[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) k[j] = fetch(from.first + j * from.row, j < left);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) v[j] = fetch(from.first + j * from.row + from.value, j < left);
        visit(k, v, min(left, kChunk), [&](int i) { return causal ? queries.own(i) - before : i < queries.count ? left : 0; });
      }
      if (!causal) return;
      causal = false, from = prefix, left = queries.shared;
    }
  }

  // Products of every query with the n keys of a chunk: a lane gets those with key lane % kChunk.
  template <int kQueries>
  __device__ __forceinline__ static void products(const Row (&own)[kQueries], const Raw (&rows)[kChunk], int n,
                                                  A (&result)[kQueries]) {
    A sums[kQueries][kChunk] = {};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j >= n) continue;
      const Row row = wide(rows[j]);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) sums[i][j] = own[i].dot(row);
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) result[i] = group_sums(sums[i]);
  }

  template <int kQueries>
  __device__ __forceinline__ void attend(const Queries& queries, const Keys<T>& prefix) const {
    Row own[kQueries], out[kQueries];
    A largest[kQueries], sum[kQueries];  // the sum of this lane's keys
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      own[i] = q(queries.query + i, i < queries.count);
      out[i].clear();
      largest[i] = -kInfinity<A>, sum[i] = 0;
    }
    each_chunk(queries, prefix, [&](const Raw(&k)[kChunk], const Raw(&v)[kChunk], int n, auto seen) {
      A probs[kQueries];
      products(own, k, n, probs);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const A score = lane % kChunk < seen(i) ? scaling * probs[i] : -kInfinity<A>, before = largest[i];
        largest[i] = Max()(before, warp_reduce<kChunk>(score, Max()));
        const A shrink = exp_nonpositive(before - largest[i]);
        probs[i] = exp_nonpositive(score - largest[i]);
        sum[i] = sum[i] * shrink + probs[i];
        out[i].scale(shrink);
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j >= n) continue;
        const Row value = wide(v[j]);
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          const A prob = __shfl_sync(kAllLanes, probs[i], j, kLanes);
          if (j < seen(i)) out[i].add(prob, value);  // zero times the NaN of a later row would be NaN
        }
      }
    });
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      out[i].scale(A(1) / warp_reduce<kChunk>(sum[i], Sum()));
      if (i < queries.count) store(p.out + (b * p.queries() + queries.query + i) * p.width, out[i]);
    }
  }

  // Writes grad_q of the queries, and their statistics: log sum exp of the scores, along = sum_j p_j slope_j, where
  // slope_j is the product of the gradient with value j. The gradient of q is scaling sum_j p_j (slope_j - along) k_j:
  // sum_j p_j slope_j k_j and sum_j p_j k_j are summed up beside each other, so the keys are read once.
  template <int kQueries>
  __device__ __forceinline__ void query_backward(const Queries& queries, const Keys<T>& prefix) const {
    Row own[kQueries], wanted[kQueries], steep[kQueries], mean[kQueries];
    A largest[kQueries], sum[kQueries], along[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      own[i] = q(queries.query + i, i < queries.count);
      wanted[i] = grad(queries.query + i, i < queries.count);
      steep[i].clear(), mean[i].clear();
      largest[i] = -kInfinity<A>, sum[i] = 0, along[i] = 0;
    }
    each_chunk(queries, prefix, [&](const Raw(&k)[kChunk], const Raw(&v)[kChunk], int n, auto seen) {
      A probs[kQueries], slopes[kQueries];
      products(own, k, n, probs);
      products(wanted, v, n, slopes);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const bool sees = lane % kChunk < seen(i);
        const A score = sees ? scaling * probs[i] : -kInfinity<A>, before = largest[i];
        largest[i] = Max()(before, warp_reduce<kChunk>(score, Max()));
        const A shrink = exp_nonpositive(before - largest[i]);
        probs[i] = exp_nonpositive(score - largest[i]);
        slopes[i] = sees ? probs[i] * slopes[i] : A(0);
        sum[i] = sum[i] * shrink + probs[i];
        along[i] = along[i] * shrink + slopes[i];
        steep[i].scale(shrink), mean[i].scale(shrink);
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j >= n) continue;
        const Row key = wide(k[j]);
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          const A prob = __shfl_sync(kAllLanes, probs[i], j, kLanes);
          const A slope = __shfl_sync(kAllLanes, slopes[i], j, kLanes);
          if (j >= seen(i)) continue;
          mean[i].add(prob, key);
          steep[i].add(slope, key);
        }
      }
    });
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const A total = warp_reduce<kChunk>(sum[i], Sum()), inverse = A(1) / total;
      along[i] = warp_reduce<kChunk>(along[i], Sum()) * inverse;
      steep[i].add(-along[i], mean[i]);
      steep[i].scale(scaling * inverse);
      if (i >= queries.count) continue;
      store(p.grad_q + b * p.grad_q_batch + (queries.query + i) * p.grad_q_row, steep[i]);
      if (lane == 0 && there) {
        stats(queries.query + i)[0] = largest[i] + std::log(total);
        stats(queries.query + i)[1] = along[i];
      }
    }
  }

  // Adds what one query gives to the gradient of one key and its value; nothing if it is not `wanted`.
  __device__ __forceinline__ void key_backward(int64_t query, bool wanted, const Row& key, const Row& value,
                                               Row& grad_k, Row& grad_v) const {
    wanted = wanted && there;
    const Row own = q(query, wanted), given = grad(query, wanted);
    const A log_sum = wanted ? stats(query)[0] : A(0), along = wanted ? stats(query)[1] : A(0);
    A sums[2] = {own.dot(key), given.dot(value)};
    const A mine = group_sums(sums), other = __shfl_xor_sync(kAllLanes, mine, 1);
    const A score = lane % 2 ? other : mine, slope = lane % 2 ? mine : other;
    const A prob = wanted ? exp_nonpositive(scaling * score - log_sum) : A(0);
    grad_k.add(scaling * prob * (slope - along), own);
    grad_v.add(prob, given);
  }

  // The queries begin .. end - 1 split among the groups of the warp, which all have this head.
  __device__ __forceinline__ void key_backward_of_groups(int64_t begin, int64_t end, const Row& key, const Row& value,
                                                         Row& grad_k, Row& grad_v) const {
    const int group = threadIdx.x % kWarp / kLanes;
#pragma unroll 2
    for (; begin < end; begin += kGroups)
      key_backward(begin + group, begin + group < end, key, value, grad_k, grad_v);
  }

  __device__ __forceinline__ void store_key(int64_t row, const Row& grad_k, const Row& grad_v) const {
    T* to = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
    store(to, grad_k);
    store(to + p.width, grad_v);
  }
};

// A warp's item of work is a class, or kQueries rows of the prefix, for four heads.
template <int kQueries, class T>
TPT_FAST_HOST_DEVICE int64_t items(const PrefixAttentionParams<T>& p) {
  return p.classes + (p.last_only ? 0 : (p.prefix + kQueries - 1) / kQueries);
}

// Calls run(queries) with the queries of an item.
template <int kQueries, class T, class Run>
__device__ __forceinline__ void for_queries(const PrefixAttentionParams<T>& p, int64_t item, Run run) {
  const bool is_class = item < p.classes;
  const int64_t start = is_class ? p.offsets[item] : 0, stop = is_class ? p.offsets[item + 1] : p.prefix;
  const int shared = is_class ? static_cast<int>(p.prefix) : 0;
  int64_t first = is_class ? p.last_only ? stop - 1 : start : (item - p.classes) * kQueries;
  const int64_t last = is_class ? stop : min(first + kQueries, stop);
  for (; first < last; first += kQueries) {
    const int count = static_cast<int>(min(last - first, int64_t{kQueries}));
    run(Queries{p.last_only ? item : first, first, start, count, shared});
  }
}

// The prefix's keys and values of the block's heads, copied to shared memory if `staged`. All threads call.
template <int kPer, int kVector, class T>
__device__ __forceinline__ Keys<T> prefix_keys(const Head<kPer, kVector, T>& head, bool staged) {
  if (!staged) return head.keys(0);
  TPT_FAST_DYNAMIC_SHARED(memory);
  constexpr int kWidth = kWarp * kPer;
  T* const own = reinterpret_cast<T*>(memory) + threadIdx.x % kWarp / kLanes * (kLanes * kPer);
  for (int64_t row = threadIdx.x / kWarp; row < head.p.prefix; row += kWarps) {
    const Keys<T> from = head.keys(row);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const auto raw = head.fetch(from.first + which * from.value);
#pragma unroll
      for (int j = 0; j < kPer / kVector; ++j)
        store_vector(own + (2 * row + which) * kWidth + (j * kLanes + head.lane) * kVector, raw.vectors[j]);
    }
  }
  __syncthreads();
  return {own, 2 * kWidth, kWidth};
}

template <int kPer>
constexpr int kForwardQueries = 32 / kPer;
template <int kPer>
constexpr int kBackwardQueries = 16 / kPer;

// Grid: (items / warps, heads / 4, batch).
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kThreads)
    prefix_attention_kernel(const __grid_constant__ PrefixAttentionParams<T> p, bool staged) {
  constexpr int kQueries = kForwardQueries<kPer>;
  const Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y * kGroups + threadIdx.x % kWarp / kLanes);
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  const Keys<T> prefix = prefix_keys(head, staged);
  if (item >= items<kQueries>(p)) return;  // a whole warp
  for_queries<kQueries>(p, item, [&](const Queries& queries) { head.template attend<kQueries>(queries, prefix); });
}

// Grid: the same. Writes stats, grad_q, and grad_kv of the suffixes.
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kThreads)
    prefix_attention_backward_kernel(const __grid_constant__ PrefixAttentionParams<T> p, bool staged) {
  constexpr int kQueries = kBackwardQueries<kPer>;
  const Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y * kGroups + threadIdx.x % kWarp / kLanes);
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  const Keys<T> prefix = prefix_keys(head, staged);
  if (item >= items<kQueries>(p)) return;
  for_queries<kQueries>(p, item,
                        [&](const Queries& queries) { head.template query_backward<kQueries>(queries, prefix); });
  if (item >= p.classes) return;
  __syncwarp();  // one lane of each group wrote the statistics
  const int64_t stop = p.offsets[item + 1];
  for (int64_t key = p.offsets[item]; key < stop; ++key) {
    const Keys<T> from = head.keys(key);
    const auto k = head.wide(head.fetch(from.first)), v = head.wide(head.fetch(from.first + from.value));
    auto grad_k = k, grad_v = v;
    grad_k.clear();
    grad_v.clear();
#pragma unroll 2
    for (int64_t row = p.last_only ? stop - 1 : key; row < stop; ++row)
      head.key_backward(p.last_only ? item : row, true, k, v, grad_k, grad_v);
    head.store_key(key, grad_k, grad_v);
  }
}

// Grid: (blocks of classes, heads, batch); a warp a prefix key, whose queries its groups share. Writes partial.
template <int kPer, int kVector, class T>
__global__ void __launch_bounds__(kMaxPartialWarps* kWarp)
    prefix_attention_partial_kernel(const __grid_constant__ PrefixAttentionParams<T> p) {
  Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y);
  const int64_t first = blockIdx.x * kPrefixAttentionClassesAtOnce;
  const int64_t last = min(first + kPrefixAttentionClassesAtOnce, p.classes);
  const int64_t begin = p.last_only ? first : p.offsets[first], end = p.last_only ? last : p.offsets[last];
  for (int64_t key = threadIdx.x / kWarp; key < p.prefix; key += blockDim.x / kWarp) {
    const Keys<T> from = head.keys(key);
    const auto k = head.wide(head.fetch(from.first)), v = head.wide(head.fetch(from.first + from.value));
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
__global__ void __launch_bounds__(kWarp)
    prefix_attention_prefix_kernel(const __grid_constant__ PrefixAttentionParams<T> p) {
  using A = Accumulate<T>;
  const Head<kPer, kVector, T> head(p, blockIdx.z, blockIdx.y);
  const int64_t key = blockIdx.x;
  const Keys<T> from = head.keys(key);
  const auto k = head.wide(head.fetch(from.first)), v = head.wide(head.fetch(from.first + from.value));
  Part<kPer, A> grads[2];
  grads[0].clear();
  grads[1].clear();
  const A* sums = p.partial + (head.b * p.blocks() * p.prefix + key) * 2 * p.width + head.head * head.dim;
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
  return p.width / p.heads <= 128 && p.classes + p.prefix <= kMaxGridX && p.batch <= kMaxGridY && p.heads <= kMaxGridY;
}

// A kernel by items, with the prefix in shared memory where it is short.
template <int kQueries, int kPer, class T>
cudaError_t launch_items(void (*kernel)(PrefixAttentionParams<T>, bool), const PrefixAttentionParams<T>& p,
                         cudaStream_t stream) {
  if (items<kQueries>(p) == 0) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(p.prefix) * 2 * kWarp * kPer * sizeof(T);
  const bool staged = bytes <= kPrefixBytes;
  const dim3 grid(static_cast<unsigned>(ceil_div(items<kQueries>(p), kWarps)),
                  static_cast<unsigned>(ceil_div(p.heads, kGroups)), static_cast<unsigned>(p.batch));
  return launch(kernel, grid, dim3(kThreads), staged ? bytes : 0, stream, p, staged);
}

template <int kPer, int kVector, class T>
cudaError_t launch_backward(const PrefixAttentionParams<T>& p, cudaStream_t stream) {
  const cudaError_t error =
      launch_items<kBackwardQueries<kPer>, kPer>(prefix_attention_backward_kernel<kPer, kVector, T>, p, stream);
  if (error != cudaSuccess || p.prefix == 0) return error;
  dim3 grid(static_cast<unsigned>(p.blocks()), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  if (p.classes > 0) {
    const int64_t rounds = ceil_div(p.prefix, kMaxPartialWarps);
    const dim3 block(static_cast<unsigned>(ceil_div(p.prefix, rounds)) * kWarp);
    const cudaError_t error =
        launch(prefix_attention_partial_kernel<kPer, kVector, T>, grid, block, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  grid.x = static_cast<unsigned>(p.prefix);
  return launch(prefix_attention_prefix_kernel<kPer, kVector, T>, grid, dim3(kWarp), 0, stream, p);
}

// Calls run(elements of a lane, elements of a vector): vectors for heads of up to 64 (every CLIP text tower), single
// elements for longer or unaligned ones, and for float64, which is for checking gradients only.
template <class T, class Run>
cudaError_t with_head(const PrefixAttentionParams<T>& p, Run run) {
  if (p.batch == 0) return cudaSuccess;
  if (!fits(p)) return cudaErrorInvalidValue;
  const int64_t dim = p.width / p.heads;
  if constexpr (sizeof(T) <= 4) {
    constexpr int kVector = 16 / sizeof(T);
    const int64_t strides = p.q_batch | p.q_row | p.kv_batch | p.kv_row | p.grad_q_batch | p.grad_q_row |
                            p.grad_kv_batch | p.grad_kv_row;
    const bool fit = vectors_fit<kVector>(strides | dim, p.q, p.kv, p.grad, p.out, p.grad_q, p.grad_kv, p.partial);
    if (fit && dim <= 64) return run(std::integral_constant<int, 8>(), std::integral_constant<int, kVector>());
  }
  return run(std::integral_constant<int, 16>(), std::integral_constant<int, 1>());
}

}  // namespace

template <class T>
cudaError_t launch_prefix_attention(const PrefixAttentionParams<T>& p, cudaStream_t stream) {
  return with_head(p, [&](auto per, auto vector) {
    constexpr int kPer = decltype(per)::value;
    return launch_items<kForwardQueries<kPer>, kPer>(prefix_attention_kernel<kPer, decltype(vector)::value, T>, p,
                                                     stream);
  });
}

template <class T>
cudaError_t launch_prefix_attention_backward(const PrefixAttentionParams<T>& p, cudaStream_t stream) {
  return with_head(p, [&](auto per, auto vector) {
    return launch_backward<decltype(per)::value, decltype(vector)::value>(p, stream);
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
