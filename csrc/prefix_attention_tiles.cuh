// What a warp of prefix_attention.cu does where tensor cores can be used: 16 queries of one head, and at a time 16 keys
// of their own and 16 of the prefix. The queries are of a few classes, so that most products are with keys they do not
// see, and these cost nothing beside the loads. What is not finite spreads to all of those classes' rows, for zero
// times infinity is NaN.
#pragma once

#include "prefix_attention.h"
#include "prefix_attention_lanes.cuh"
#include "tiles.cuh"

namespace tpt_fast {

constexpr int kWarpClasses = 3;  // twelve or thirteen rows of ImageNet's names
static_assert(kWarpClasses * kWarps == kPrefixAttentionClassesAtOnce);
constexpr float kLog2E = 1.44269504f;

// 2^x within 2 ulp; results below the normal numbers are zero. Softmax is computed with it, as one instruction.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// The rows begin .. begin + count - 1.
struct Span {
  int begin, count;

  __device__ __forceinline__ bool has(int row) const {
    return static_cast<unsigned>(row - begin) < static_cast<unsigned>(count);
  }
  __device__ __forceinline__ int end() const { return begin + count; }
};

// What a warp works on: neighbouring classes, or 16 rows of the prefix.
struct Item {
  int starts[kWarpClasses + 1];  // the first row of each class, and the row after the last one
  Span queries;                  // places in q and out
  int shared;                    // keys of the prefix that all of them see
};

// 16 of the item's own keys and 16 of the prefix's: the first row of each, and where all of the kind end.
struct KeyTiles {
  int first[2], end[2];
};

// The softmax of a lane's two queries so far, to the base of two; each lane adds up its own columns.
struct TileSoftmax {
  float largest[2] = {kLowest<float>, kLowest<float>}, sum[2] = {};

  // scores -> 2^(score - largest), and the factors for whatever was summed up before.
  __device__ __forceinline__ void take(Square (&scores)[2], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = largest[half];
      float here = before;
      each(scores, half, [&](float& score) { here = Larger()(here, score); });
      largest[half] = warp_reduce<4>(here, Larger());
      shrink[half] = power_of_two(before - largest[half]);
      sum[half] *= shrink[half];
      each(scores, half, [&](float& score) { sum[half] += score = power_of_two(score - largest[half]); });
    }
  }
  // The sums of all columns.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = warp_reduce<4>(sum[half], Sum());
  }
  template <class Run>
  __device__ __forceinline__ static void each(Square (&scores)[2], int half, Run run) {
#pragma unroll
    for (int i = 0; i < 8; ++i) run(scores[i / 4].values[i / 2 % 2][2 * half + i % 2]);
  }
};

// One head of one batch, as the whole warp sees it.
template <class T>
struct TileHead {
  const Attention<T>& p;
  int b, head;
  Rows<const T> q, grad, keys;

  __device__ __forceinline__ TileHead(const Attention<T>& p, int b, int head)
      : p(p),
        b(b),
        head(head),
        q(rows(p.q, p.q_batch, p.q_row)),
        grad(rows(p.grad, p.queries() * p.width, p.width)),
        keys(rows(p.kv, p.kv_batch, p.kv_row)) {}

  // Rows of this head, the first one `start`.
  template <class To>
  __device__ __forceinline__ Rows<To> rows(To* start, int64_t batch, int64_t pitch) const {
    return {start + b * batch + head * kTileColumns, pitch};
  }
  __device__ __forceinline__ float* stats(int query) const {
    return p.stats + 2 * ((b * p.heads + head) * p.queries() + query);
  }
  __device__ __forceinline__ Tile value_tile(int first, int end) const {
    return load_tile(keys, first, end, static_cast<int>(p.width));
  }
  __device__ __forceinline__ float scaling() const { return p.scaling * kLog2E; }

  // The classes of a warp, or, after all of those, rows of the prefix; nothing past the end.
  __device__ __forceinline__ Item item(int block, int warp) const {
    const int blocks = static_cast<int>(p.blocks()), prefix = static_cast<int>(p.prefix);
    const int classes = static_cast<int>(p.classes), first_class = (block * kWarps + warp) * kWarpClasses;
    const int first_row = min(((block - blocks) * kWarps + warp) * kTileRows, prefix);
    const bool of_prefix = block >= blocks;
    Item item;
#pragma unroll
    for (int i = 0; i <= kWarpClasses; ++i)
      item.starts[i] = of_prefix ? i == 0 ? 0 : prefix : static_cast<int>(p.offsets[min(first_class + i, classes)]);
    item.shared = of_prefix ? 0 : prefix;
    if (of_prefix) {
      item.queries = {first_row, min(kTileRows, prefix - first_row)};
    } else if (p.last_only) {
      item.queries = {first_class, max(0, min(kWarpClasses, classes - first_class))};
    } else {
      item.queries = {item.starts[0], item.starts[kWarpClasses] - item.starts[0]};
    }
    return item;
  }

  // Which of the item's own rows a query sees.
  __device__ __forceinline__ Span seen_by(const Item& item, int query) const {
    const auto& starts = item.starts;
    const int which = p.last_only ? query - item.queries.begin : (query >= starts[1]) + (query >= starts[2]);
    const int begin = which == 0 ? starts[0] : which == 1 ? starts[1] : starts[2];
    const int end = !p.last_only ? query + 1 : which == 0 ? starts[1] : which == 1 ? starts[2] : starts[3];
    return {begin, end - begin};
  }

  // Calls visit(tiles) until all keys that any of the 16 queries from `query` on sees have had their turn.
  template <class Visit>
  __device__ __forceinline__ void each_keys(const Item& item, int query, Visit visit) const {
    const int begin = seen_by(item, query).begin;
    const int end = seen_by(item, min(query + kTileRows, item.queries.end()) - 1).end();
#pragma unroll 1
    for (int step = 0; step < max(end - begin, item.shared); step += kTileRows)
      visit(KeyTiles{{begin + step, step}, {end, item.shared}});
  }

  // Products to scores to the base of two: minus infinity where a query does not see a key, which for the prefix's is
  // past its end only. A query past the end may see anything.
  __device__ __forceinline__ void mask(Square& products, int which, const KeyTiles& tiles,
                                       const Span (&seen)[2]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tiles.first[which] + square_column(n, i);
        float& product = products.values[n][i];
        product = (which == 0 ? seen[i / 2].has(row) : row < tiles.end[1]) ? scaling() * product : -kInfinity<float>;
      }
    }
  }

  __device__ __forceinline__ void attend(const Item& item) const {
#pragma unroll 1
    for (int query = item.queries.begin; query < item.queries.end(); query += kTileRows) {
      const int end = item.queries.end();
      const Tile own = load_tile(q, query, end);
      const Span seen[2] = {seen_by(item, query + square_row(0)), seen_by(item, query + square_row(2))};
      TileSums out{};
      TileSoftmax softmax;
      each_keys(item, query, [&](const KeyTiles& tiles) {
        Square probs[2];
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          probs[which] = products<T>(own, load_tile(keys, tiles.first[which], tiles.end[which]));
          mask(probs[which], which, tiles, seen);
        }
        float shrink[2];
        softmax.take(probs, shrink);
        out.scale(shrink);
#pragma unroll
        for (int which = 0; which < 2; ++which)
          add_product<T>(out, probs[which], value_tile(tiles.first[which], tiles.end[which]));
      });
      softmax.finish();
      out.scale({1.0f / softmax.sum[0], 1.0f / softmax.sum[1]});
      store_tile(rows(p.out, p.queries() * p.width, p.width), query, end, out);
    }
  }

  // Writes grad_q and the statistics that Head::query_backward writes too. Twice over the keys, for the gradient of a
  // score, p_j (slope_j - along), has to be known before it is multiplied.
  __device__ __forceinline__ void query_backward(const Item& item) const {
#pragma unroll 1
    for (int query = item.queries.begin; query < item.queries.end(); query += kTileRows) {
      const int end = item.queries.end();
      const Tile own = load_tile(q, query, end), given = load_tile(grad, query, end);
      const Span seen[2] = {seen_by(item, query + square_row(0)), seen_by(item, query + square_row(2))};
      TileSoftmax softmax;
      float along[2] = {}, log_sum[2];
      each_keys(item, query, [&](const KeyTiles& tiles) {
        Square probs[2], slopes[2];
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          probs[which] = products<T>(own, load_tile(keys, tiles.first[which], tiles.end[which]));
          slopes[which] = products<T>(given, value_tile(tiles.first[which], tiles.end[which]));
          mask(probs[which], which, tiles, seen);
        }
        float shrink[2];
        softmax.take(probs, shrink);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          along[half] *= shrink[half];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int n = i / 2 % 2, j = 2 * half + i % 2;
            along[half] += probs[i / 4].values[n][j] * slopes[i / 4].values[n][j];
          }
        }
      });
      softmax.finish();
#pragma unroll
      for (int half = 0; half < 2; ++half) along[half] = warp_reduce<4>(along[half], Sum());
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        along[half] /= softmax.sum[half];
        log_sum[half] = softmax.largest[half] + std::log2(softmax.sum[half]);
        const int row = query + square_row(2 * half);
        if (row >= end || threadIdx.x % 4 > 0) continue;
        stats(row)[0] = log_sum[half] / kLog2E;
        stats(row)[1] = along[half];
      }
      TileSums grad_q{};
      each_keys(item, query, [&](const KeyTiles& tiles) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const Tile key = load_tile(keys, tiles.first[which], tiles.end[which]);
          Square probs = products<T>(own, key);
          mask(probs, which, tiles, seen);
          const Square slopes = products<T>(given, value_tile(tiles.first[which], tiles.end[which]));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& prob = probs.values[i / 4][i % 4];
            prob = power_of_two(prob - log_sum[i % 4 / 2]) * (slopes.values[i / 4][i % 4] - along[i % 4 / 2]);
          }
          add_product<T, true>(grad_q, probs, key);
        }
      });
      grad_q.scale({p.scaling, p.scaling});
      store_tile(rows(p.grad_q, p.grad_q_batch, p.grad_q_row), query, end, grad_q);
    }
  }

  // The gradients of 16 keys from `first` on, up to `end`, and of their values, as far as the item's queries from
  // `query` on give them. A key of the prefix is seen by all, another one by the queries that see it. Rows of products
  // are keys.
  template <bool kShared>
  __device__ __forceinline__ void key_backward(const Item& item, int query, int first, int end, TileSums& grad_k,
                                               TileSums& grad_v) const {
    const int last = item.queries.end();
#pragma unroll 1
    for (; query < last; query += kTileRows) {
      const Tile own = load_tile(q, query, last), given = load_tile(grad, query, last);
      Vector<float, 2> stat[4];
      Square probs = products<T>(load_tile(keys, first, end), own);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int asking = query + square_column(i / 2, i);
        stat[i] = asking < last ? load_vector<2>(stats(asking)) : Vector<float, 2>{};  // it and its gradient are zero
        const Span seen = seen_by(item, asking);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& prob = probs.values[i / 2][2 * half + i % 2];
          const int key = first + square_row(2 * half);
          // A key behind the last would have a chance of exp(-lse), and its gradient set the scale of all.
          const bool counts = kShared ? key < end : seen.has(key);
          prob = counts ? power_of_two(scaling() * prob - kLog2E * stat[i].values[0]) : 0.0f;
        }
      }
      add_product<T>(grad_v, probs, given);
      const Square slopes = products<T>(value_tile(first, end), given);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        probs.values[i / 4][i % 4] *= slopes.values[i / 4][i % 4] - stat[i / 4 * 2 + i % 2].values[1];
      add_product<T, true>(grad_k, probs, own);
    }
    grad_k.scale({p.scaling, p.scaling});
  }

  // Writes grad_kv of the item's own keys.
  __device__ __forceinline__ void own_keys_backward(const Item& item) const {
    const int end = item.starts[kWarpClasses];
#pragma unroll 1
    for (int first = item.starts[0]; first < end; first += kTileRows) {
      TileSums grad_k{}, grad_v{};
      key_backward<false>(item, p.last_only ? item.queries.begin : first, first, end, grad_k, grad_v);
      store_tile(rows(p.grad_kv, p.grad_kv_batch, p.grad_kv_row), first, end, grad_k);
      store_tile(rows(p.grad_kv + p.width, p.grad_kv_batch, p.grad_kv_row), first, end, grad_v);
    }
  }

  // Writes what the block's classes give to the prefix's keys: one block of `partial`. All threads of the block call.
  __device__ __forceinline__ void prefix_keys_backward(const Item& item, int block) const {
    const int prefix = static_cast<int>(p.prefix);
#pragma unroll 1
    for (int first = 0; first < prefix; first += kTileRows) {
      TileSums grad_k{}, grad_v{};
      key_backward<true>(item, item.queries.begin, first, prefix, grad_k, grad_v);
      float* to = p.partial + ((b * p.blocks() + block) * p.prefix + first) * 2 * p.width + head * kTileColumns;
      store_sum_of_warps(to, prefix - first, grad_k);
      store_sum_of_warps(to + p.width, prefix - first, grad_v);
    }
  }

  // Each of four warps adds up and stores a quarter of the columns.
  __device__ __forceinline__ void store_sum_of_warps(float* to, int count, const TileSums& sums) const {
    static_assert(kWarps == 4);
    TPT_FAST_SHARED(float, parts, [kWarps][8][4][kWarp]);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) parts[warp][i][j][lane] = sums.values[i][j];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector<float, 4> total{};
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total.values[i] += parts[from][2 * warp + i / 2][2 * half + i % 2][lane];
      }
      const int row = square_row(2 * half);
      if (row < count) store_vector(to + row * 2 * p.width + warp / 2 * 32 + lane % 4 * 8 + warp % 2 * 4, total);
    }
    __syncthreads();
  }
};

}  // namespace tpt_fast
