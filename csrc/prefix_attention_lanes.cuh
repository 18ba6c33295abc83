// What a warp of prefix_attention.cu does with any head: eight lanes, a group, work on one head of one row, and its
// four groups on four heads, or on four queries of one head.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "half.h"
#include "prefix_attention.h"

namespace tpt_fast {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kLanes = 8;                // of a group
constexpr int kGroups = kWarp / kLanes;  // of a warp
constexpr int kChunk = 4;                // keys whose scores are known at once

// kVector elements as they are stored, in words: 16-bit values would be moved one by one, and stored two at a time.
template <int kVector, class T>
struct Stored {
  using Word = std::conditional_t<kVector == 1, T, uint32_t>;
  Vector<Word, kVector * sizeof(T) / sizeof(Word)> words;

  __device__ __forceinline__ void load(const T* from) {
    words = load_vector<sizeof words / sizeof(Word)>(reinterpret_cast<const Word*>(from));
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kVector == 1) {
      *to = words.values[0];
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof words / 4); i += 4)
        store_words(reinterpret_cast<uint32_t*>(to) + i, words.values + i);
    }
  }
  __device__ __forceinline__ Accumulate<T> at(int i) const {
    if constexpr (kVector == 1) {
      return widen(words.values[0]);
    } else if constexpr (sizeof(T) == 2) {
      return widen(T{static_cast<uint16_t>(words.values[i / 2] >> (i % 2 * 16))});
    } else {
      T value;
      std::memcpy(&value, &words.values[i], sizeof value);
      return value;
    }
  }
  // In ascending order of i.
  __device__ __forceinline__ void put(int i, Accumulate<T> x) {
    const T value = narrow<T>(x);
    if constexpr (kVector == 1) {
      words.values[0] = value;
    } else if constexpr (sizeof(T) == 2) {
      const uint32_t bits = value.bits;
      words.values[i / 2] = i % 2 ? words.values[i / 2] | bits << 16 : bits;
    } else {
      std::memcpy(&words.values[i], &value, sizeof value);
    }
  }
};

// A lane's elements of one head of a row, to compute with: of vectors lane, lane + 8, ...
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
      for (int offset = kLanes; offset < kWarp; offset *= 2) values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
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
  int row, value;
};

// The rows first .. first + count - 1 that one warp works on together. Each sees `shared` keys of the prefix, and from
// `start` on the rows up to itself. `query` is the place of the first one in q and out.
struct Queries {
  int query, first, start, count, shared;

  __device__ __forceinline__ int own(int i) const { return first + i + 1 - start; }
};

// Calls add(i) with the queries that see key j of a chunk, for zero times the NaN of a later row would be NaN. Query i
// + 1 sees what query i does. Branches, since the compiler makes two moves of each predicated addition otherwise.
template <int kQueries, class Seen, class Add>
__device__ __forceinline__ void for_seen(int j, Seen seen, Add add) {
  if (j < seen(0)) {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) add(i);
    return;
  }
#pragma unroll
  for (int i = kQueries - 1; i > 0; --i) {
    if (j >= seen(i)) break;
    add(i);
  }
}

// The upper and the lower half of a group share the work of two queries.
template <int kQueries>
constexpr int kPairs = (kQueries + 1) / 2;

// What the launcher knows besides, so that no thread has to compute it.
template <class T>
struct Attention : PrefixAttentionParams<T> {
  int dim;                // of a head
  Accumulate<T> scaling;  // 1 / sqrt(dim)
  bool staged;            // the prefix lies in shared memory
};

// One head of one batch as one group sees it. A head that is not there (`heads` is no multiple of four, or a query past
// the end) reads zeros and writes nothing, for all lanes of a warp have to take part in its shuffles.
template <int kPer, int kVector, class T>
struct Head {
  using A = Accumulate<T>;
  using Row = Part<kPer, A>;
  struct Raw {
    Stored<kVector, T> vectors[kPer / kVector];
  };
  const Attention<T>& p;
  int b, head, lane, begin;
  int dim;  // 0 where there is no such head

  __device__ __forceinline__ Head(const Attention<T>& p, int b, int head)
      : p(p), b(b), head(head), lane(threadIdx.x % kLanes), begin(head * p.dim), dim(head < p.heads ? p.dim : 0) {}

  // Reads a head that begins at `from`; what lies past its end, or is not wanted, stays as it is.
  __device__ __forceinline__ void read(Raw& raw, const T* from, bool wanted = true) const {
#pragma unroll
    for (int j = 0; j < kPer / kVector; ++j) {
      const int at = (j * kLanes + lane) * kVector;
      if (wanted && at < dim) raw.vectors[j].load(from + at);
    }
  }
  __device__ __forceinline__ Row load(const T* from, bool wanted = true) const {
    Raw raw{};
    read(raw, from, wanted);
    return wide(raw);
  }
  __device__ __forceinline__ static Row wide(const Raw& raw) {
    Row row;
#pragma unroll
    for (int i = 0; i < kPer; ++i) row.values[i] = raw.vectors[i / kVector].at(i % kVector);
    return row;
  }
  template <class To>
  __device__ __forceinline__ void store(To* to, const Row& x) const {
#pragma unroll
    for (int j = 0; j < kPer / kVector; ++j) {
      const int at = (j * kLanes + lane) * kVector;
      Stored<kVector, To> vector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) vector.put(i, x.values[j * kVector + i]);
      if (at < dim) vector.store(to + begin + at);
    }
  }
  __device__ __forceinline__ const T* q(int64_t query) const { return p.q + b * p.q_batch + query * p.q_row + begin; }
  __device__ __forceinline__ const T* grad(int64_t query) const {
    return p.grad + (b * p.queries() + query) * p.width + begin;
  }
  __device__ __forceinline__ Keys<T> keys(int64_t row) const {
    return {p.kv + b * p.kv_batch + row * p.kv_row + begin, static_cast<int>(p.kv_row), static_cast<int>(p.width)};
  }
  // The prefix's keys, which stage() has copied to shared memory: keys and values of the warp's four heads by turns.
  __device__ __forceinline__ Keys<T> prefix_keys() const {
    if (!p.staged) return keys(0);
    TPT_FAST_DYNAMIC_SHARED(memory);
    constexpr int kWidth = kWarp * kPer;
    return {reinterpret_cast<T*>(memory) + threadIdx.x % kWarp / kLanes * (kLanes * kPer), 2 * kWidth, kWidth};
  }
  // All threads of the block call.
  __device__ __forceinline__ void stage() const {
    if (!p.staged) return;
    const Keys<T> to = prefix_keys();
    for (int row = threadIdx.x / kWarp; row < p.prefix; row += kWarps) {
      const Keys<T> from = keys(row);
      Raw raws[2]{};  // key and value: both are under way before one is stored, for no load passes a store
#pragma unroll
      for (int which = 0; which < 2; ++which) read(raws[which], from.first + which * from.value);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int j = 0; j < kPer / kVector; ++j)
          raws[which].vectors[j].store(const_cast<T*>(to.first) + row * to.row + which * to.value +
                                       (j * kLanes + lane) * kVector);
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ A* stats(int64_t query) const {
    return p.stats + 2 * ((b * p.heads + head) * p.queries() + query);
  }

  // Calls visit(keys, n, seen) with chunks of n keys, of which query i sees the first seen(i): those of the suffix
  // first, because every query sees one of them.
  template <class Visit>
  __device__ __forceinline__ void each_chunk(const Queries& queries, Visit visit) const {
    Keys<T> from = keys(queries.start);
    int left = queries.own(queries.count - 1), seen = queries.own(0), step = 1;
    while (true) {
#pragma unroll 1
      for (; left > 0; left -= kChunk, seen -= kChunk, from.first += kChunk * from.row)
        visit(from, min(left, kChunk), [&](int i) { return seen + i * step; });
      if (step == 0) return;
      from = prefix_keys(), left = seen = queries.shared, step = 0;
    }
  }

  struct Chunk {
    Raw rows[kChunk];
  };
  __device__ __forceinline__ Chunk chunk(const T* from, int row, int n) const {
    Chunk result{};
#pragma unroll
    for (int j = 0; j < kChunk; ++j, from += row) read(result.rows[j], from, j < n);
    return result;
  }

  // Products of every query with the n keys of a chunk: result i of a lane is that of key lane % 4 with query 2 i, or,
  // in the upper half of the group, with query 2 i + 1.
  template <int kQueries>
  __device__ __forceinline__ static void products(const Row (&own)[kQueries], const Chunk& chunk, int n,
                                                  A (&result)[kPairs<kQueries>]) {
    A sums[kPairs<kQueries>][kLanes] = {};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j >= n) continue;
      const Row row = wide(chunk.rows[j]);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) sums[i / 2][i % 2 * kChunk + j] = own[i].dot(row);
    }
#pragma unroll
    for (int i = 0; i < kPairs<kQueries>; ++i) result[i] = group_sums(sums[i]);
  }
  // What the lane of query i and key j keeps.
  template <int kCount>
  __device__ __forceinline__ static A of(const A (&kept)[kCount], int i, int j = 0) {
    return __shfl_sync(kAllLanes, kept[i / 2], i % 2 * kChunk + j, kLanes);
  }

  // The softmax of one query's scores so far, as the lane of a key keeps it.
  struct Softmax {
    A largest = -kInfinity<A>, sum = 0;  // the sum of this lane's keys

    // score -> exp(score - largest), and the factor for whatever was summed up before.
    __device__ __forceinline__ A take(A& score) {
      const A before = largest;
      largest = Max()(before, warp_reduce<kChunk>(score, Max()));
      const A shrink = exp_nonpositive(before - largest);
      score = exp_nonpositive(score - largest);
      sum = sum * shrink + score;
      return shrink;
    }
  };

  template <int kQueries>
  __device__ __forceinline__ void attend(const Queries& queries) const {
    Row own[kQueries], out[kQueries];
    Softmax softmax[kPairs<kQueries>];
    A kept[kPairs<kQueries>], shrink[kPairs<kQueries>];
    const T* q_row = q(queries.query);
#pragma unroll
    for (int i = 0; i < kQueries; ++i, q_row += p.q_row) {
      own[i] = load(q_row, i < queries.count);
      out[i].clear();
    }
    each_chunk(queries, [&](const Keys<T>& from, int n, auto seen) {
      // Keys, then values: both at once would take too many registers.
      products(own, chunk(from.first, from.row, n), n, kept);
      const Chunk values = chunk(from.first + from.value, from.row, n);
#pragma unroll
      for (int i = 0; i < kPairs<kQueries>; ++i) {
        kept[i] = lane % kChunk < seen(2 * i + lane / kChunk) ? p.scaling * kept[i] : -kInfinity<A>;
        shrink[i] = softmax[i].take(kept[i]);
      }
#pragma unroll
      for (int i = 0; i < kQueries; ++i) out[i].scale(of(shrink, i));
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j >= n) continue;
        const Row value = wide(values.rows[j]);
        for_seen<kQueries>(j, seen, [&](int i) { out[i].add(of(kept, i, j), value); });
      }
    });
#pragma unroll
    for (int i = 0; i < kPairs<kQueries>; ++i) kept[i] = A(1) / warp_reduce<kChunk>(softmax[i].sum, Sum());
    T* to = p.out + (b * p.queries() + queries.query) * p.width;
#pragma unroll
    for (int i = 0; i < kQueries; ++i, to += p.width) {
      out[i].scale(of(kept, i));
      if (i < queries.count) store(to, out[i]);
    }
  }

  // Writes grad_q of the queries, and their statistics: log sum exp of the scores, along = sum_j p_j slope_j, where
  // slope_j is the product of the gradient with value j. The gradient of q is scaling sum_j p_j (slope_j - along) k_j:
  // sum_j p_j slope_j k_j and sum_j p_j k_j are summed up beside each other, so the keys are read once.
  template <int kQueries>
  __device__ __forceinline__ void query_backward(const Queries& queries) const {
    Row own[kQueries], wanted[kQueries], steep[kQueries], mean[kQueries];
    Softmax softmax[kPairs<kQueries>];
    A kept[kPairs<kQueries>], slopes[kPairs<kQueries>], along[kPairs<kQueries>] = {}, shrink[kPairs<kQueries>];
    const T *q_row = q(queries.query), *grad_row = grad(queries.query);
#pragma unroll
    for (int i = 0; i < kQueries; ++i, q_row += p.q_row, grad_row += p.width) {
      own[i] = load(q_row, i < queries.count);
      wanted[i] = load(grad_row, i < queries.count);
      steep[i].clear(), mean[i].clear();
    }
    each_chunk(queries, [&](const Keys<T>& from, int n, auto seen) {
      products(wanted, chunk(from.first + from.value, from.row, n), n, slopes);
      const Chunk keys = chunk(from.first, from.row, n);
      products(own, keys, n, kept);
#pragma unroll
      for (int i = 0; i < kPairs<kQueries>; ++i) {
        const bool sees = lane % kChunk < seen(2 * i + lane / kChunk);
        kept[i] = sees ? p.scaling * kept[i] : -kInfinity<A>;
        shrink[i] = softmax[i].take(kept[i]);
        slopes[i] = sees ? kept[i] * slopes[i] : A(0);
        along[i] = along[i] * shrink[i] + slopes[i];
      }
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const A factor = of(shrink, i);
        steep[i].scale(factor), mean[i].scale(factor);
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j >= n) continue;
        const Row key = wide(keys.rows[j]);
        for_seen<kQueries>(j, seen, [&](int i) {
          mean[i].add(of(kept, i, j), key);
          steep[i].add(of(slopes, i, j), key);
        });
      }
    });
#pragma unroll
    for (int i = 0; i < kPairs<kQueries>; ++i) {
      const A sum = warp_reduce<kChunk>(softmax[i].sum, Sum());
      kept[i] = A(1) / sum;
      along[i] = warp_reduce<kChunk>(along[i], Sum()) * kept[i];
      const int which = 2 * i + lane / kChunk;
      if (lane % kChunk == 0 && dim > 0 && which < queries.count) {
        stats(queries.query + which)[0] = softmax[i].largest + std::log(sum);
        stats(queries.query + which)[1] = along[i];
      }
    }
    T* to = p.grad_q + b * p.grad_q_batch + queries.query * p.grad_q_row;
#pragma unroll
    for (int i = 0; i < kQueries; ++i, to += p.grad_q_row) {
      steep[i].add(-of(along, i), mean[i]);
      steep[i].scale(p.scaling * of(kept, i));
      if (i < queries.count) store(to, steep[i]);
    }
  }

  // Adds what one query gives to the gradient of one key and its value; nothing if it is not `wanted`.
  __device__ __forceinline__ void key_backward(int64_t query, bool wanted, const Row& key, const Row& value,
                                               Row& grad_k, Row& grad_v) const {
    wanted = wanted && dim > 0;
    const Row own = load(q(query), wanted), given = load(grad(query), wanted);
    const A log_sum = wanted ? stats(query)[0] : A(0), along = wanted ? stats(query)[1] : A(0);
    A sums[2] = {own.dot(key), given.dot(value)};
    const A mine = group_sums(sums), other = __shfl_xor_sync(kAllLanes, mine, 1);
    const A score = lane % 2 ? other : mine, slope = lane % 2 ? mine : other;
    const A prob = wanted ? exp_nonpositive(p.scaling * score - log_sum) : A(0);
    grad_k.add(p.scaling * prob * (slope - along), own);
    grad_v.add(prob, given);
  }

  // The queries begin .. end - 1 split among the groups of the warp, which all have this head.
  __device__ __forceinline__ void key_backward_of_groups(int64_t begin, int64_t end, const Row& key, const Row& value,
                                                         Row& grad_k, Row& grad_v) const {
    const int group = threadIdx.x % kWarp / kLanes;
#pragma unroll(kPer == 8 ? 2 : 1)
    for (; begin < end; begin += kGroups) key_backward(begin + group, begin + group < end, key, value, grad_k, grad_v);
  }

  __device__ __forceinline__ void store_key(int64_t row, const Row& grad_k, const Row& grad_v) const {
    T* to = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
    store(to, grad_k);
    store(to + p.width, grad_v);
  }
};

}  // namespace tpt_fast
