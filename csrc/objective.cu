// One launch, one block a view. Each block reduces its row of logits to an entropy; the block that arrives last at its
// image's counter selects the views and computes loss and gradient.
//
// At 64 x 1000 there is a quarter of a megabyte to read, so latency bounds the kernel: the last block's chain of
// selection, mean and gradient has four block-wide synchronisations and no more. Rows are read again instead of being
// kept, because the second read hits the cache; exponentials are computed again instead of being stored. Clusters would
// spare the counter, but only data-centre GPUs from 9.0 and all from 12.0 have them.
//
// Dangers: shared memory grows with the kept views, so more than 48 KB is asked for, and the binding refuses what no
// block can have (objective_shared_bytes). The rows' results pass to the last block by a fence on either side of the
// count, and are read from L2. Counters belong to one stream, or to one launch of a graph (zero_counters in the
// binding). Shuffles name all lanes and stand where all lanes of the block pass. Grid: views up to 2^30, images up to
// 65,535; classes and views fit int, offsets are 64 bits wide. Vector loads only where every row is aligned.
#include "common.cuh"
#include "objective.h"

namespace tpt_fast {
namespace {

constexpr size_t kStaticBytes = 1 << 10;                    // at most, and what the compiler rounds up to
constexpr size_t kSharedBytes = (48 << 10) - kStaticBytes;  // what every launch may have without asking

// Long rows get larger blocks.
template <class T>
int threads_of(const ObjectiveParams<T>& p) {
  return sizeof(T) == 4 && p.classes > 4096 ? 1024 : 256;
}

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

// Calls visit(c, x) for the thread's share of a row's classes, the same share each time.
template <int kThreads, int kVector, class T, class Visit>
__device__ __forceinline__ void for_classes(const T* x, int classes, Visit visit) {
  for (int c = threadIdx.x * kVector; c < classes; c += kThreads * kVector) {
    const auto loaded = load_vector<kVector>(x + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) visit(c + i, loaded.values[i]);
  }
}

template <int kThreads, int kVector, class T>
__device__ void row_entropy(const ObjectiveParams<T>& p, int64_t row, T* scratch) {
  const T* x = p.logits + row * p.classes;
  const int classes = static_cast<int>(p.classes);
  T largest = -kInfinity<T>;
  for_classes<kThreads, kVector>(x, classes, [&](int, T value) { largest = Max()(largest, value); });
  largest = block_reduce<kThreads>(largest, Max(), scratch);
  T sum = 0, weighted = 0;
  for_classes<kThreads, kVector>(x, classes, [&](int, T value) {
    const T shifted = value - largest;
    const T e = exp_nonpositive(shifted);
    sum += e;
    weighted += shifted == -kInfinity<T> ? T(0) : e * shifted;
  });
  sum = block_reduce<kThreads>(sum, Sum(), scratch);
  weighted = block_reduce<kThreads>(weighted, Sum(), scratch);
  if (threadIdx.x == 0) {
    const T log_sum = std::log(sum);
    p.entropy[row] = log_sum - weighted / sum;
    p.shift[2 * row] = largest;
    p.shift[2 * row + 1] = log_sum;
  }
}

// Shared memory of the last block: the entropies, then what is known of each kept view.
template <class T>
struct Kept {
  T* entropy;      // [N]
  T* largest;      // [K]
  T* log_sum;      // [K]
  T* cross;        // [K, warps] partial sums of sum_c p_c log q_c
  int64_t* views;  // [K]

  __host__ __device__ static size_t bytes(int64_t views, int64_t kept, int warps) {
    return static_cast<size_t>(kept) * sizeof(int64_t) + static_cast<size_t>(views + (2 + warps) * kept) * sizeof(T);
  }
  __device__ Kept(unsigned char* memory, int views_count, int kept) {
    views = reinterpret_cast<int64_t*>(memory);
    entropy = reinterpret_cast<T*>(views + kept);
    largest = entropy + views_count;
    log_sum = largest + kept;
    cross = log_sum + kept;
  }
};

template <int kThreads, class T>
__device__ void select(const ObjectiveParams<T>& p, int64_t image, const Kept<T>& kept) {
  const int views = static_cast<int>(p.views), count = static_cast<int>(p.n_selected);
  const int64_t first = image * p.views;
  // Other blocks wrote these: read them from L2, where they are, not from this multiprocessor's L1.
  for (int i = threadIdx.x; i < views; i += kThreads) kept.entropy[i] = __ldcg(p.entropy + first + i);
  __syncthreads();
  const auto keep = [&](int rank, int64_t view) {
    kept.views[rank] = view;
    kept.largest[rank] = __ldcg(p.shift + 2 * (first + view));
    kept.log_sum[rank] = __ldcg(p.shift + 2 * (first + view) + 1);
  };
  if (p.reselect) {
    constexpr int kPart = 4;                                         // lanes that share the comparisons of one view
    for (int begin = 0; begin < views; begin += kThreads / kPart) {  // for all lanes: they exchange their counts
      const int i = begin + threadIdx.x / kPart;
      int rank = 0;
      if (i < views)
        for (int j = threadIdx.x % kPart; j < views; j += kPart) rank += precedes(kept.entropy, j, i);
      rank = warp_reduce<kPart>(rank, Sum());
      if (i < views && threadIdx.x % kPart == 0 && rank < count) {
        keep(rank, i);
        p.selected[image * count + rank] = i;
      }
    }
  } else {
    for (int rank = threadIdx.x; rank < count; rank += kThreads) keep(rank, p.selected[image * count + rank]);
  }
  __syncthreads();
}

template <int kThreads, int kVector, class T>
__device__ void loss_and_gradient(const ObjectiveParams<T>& p, int64_t image, const Kept<T>& kept, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  const int classes = static_cast<int>(p.classes), count = static_cast<int>(p.n_selected);
  const T* logits = p.logits + image * p.views * p.classes;
  T* log_mean = p.log_mean + image * p.classes;
  T* grad = p.grad + image * count * p.classes;
  const T inverse_kept = T(1) / static_cast<T>(count), log_kept = std::log(static_cast<T>(count));
  const int warp = threadIdx.x / kWarp;

  T loss = 0;
  for (int c = threadIdx.x * kVector; c < classes; c += kThreads * kVector) {
    T largest[kVector], sum[kVector] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest[i] = kLowest<T>;
    for (int k = 0; k < count; ++k) {
      const auto x = load_vector<kVector>(logits + kept.views[k] * classes + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        largest[i] = Max()(largest[i], (x.values[i] - kept.largest[k]) - kept.log_sum[k]);
      }
    }
    for (int k = 0; k < count; ++k) {
      const auto x = load_vector<kVector>(logits + kept.views[k] * classes + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] += exp_nonpositive((x.values[i] - kept.largest[k]) - kept.log_sum[k] - largest[i]);
      }
    }
    Vector<T, kVector> log_q;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const T value = largest[i] + std::log(sum[i]) - log_kept;
      log_q.values[i] = value < kLowest<T> ? kLowest<T> : value;
      loss -= exp_nonpositive(smaller(log_q.values[i], T(0))) * log_q.values[i];
    }
    store_vector(log_mean + c, log_q);  // read below by the thread that wrote it
  }

  for (int k = 0; k < count; ++k) {
    T cross = 0;
    for_classes<kThreads, kVector>(logits + kept.views[k] * classes, classes, [&](int c, T x) {
      cross += exp_nonpositive((x - kept.largest[k]) - kept.log_sum[k]) * log_mean[c];
    });
    cross = warp_reduce(cross, Sum());
    if (threadIdx.x % kWarp == 0) kept.cross[k * kWarps + warp] = cross;
  }
  loss = block_reduce<kThreads>(loss, Sum(), scratch);  // its barriers also publish kept.cross
  if (threadIdx.x == 0) p.loss[image] = loss;

  for (int k = 0; k < count; ++k) {
    T cross = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) cross += kept.cross[k * kWarps + w];
    const T* x = logits + kept.views[k] * classes;
    for (int c = threadIdx.x * kVector; c < classes; c += kThreads * kVector) {
      const auto loaded = load_vector<kVector>(x + c);
      Vector<T, kVector> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const T prob = exp_nonpositive((loaded.values[i] - kept.largest[k]) - kept.log_sum[k]);
        result.values[i] = prob * ((cross - log_mean[c + i]) * inverse_kept);
      }
      store_vector(grad + k * static_cast<int64_t>(classes) + c, result);
    }
  }
}

// Grid: (views, batch). The second bound gives each thread up to 64 or 80 registers, so that nothing is spilled.
template <int kThreads, int kVector, class T>
__global__ void __launch_bounds__(kThreads, kThreads > 256 ? 1 : 3)
    objective_kernel(const __grid_constant__ ObjectiveParams<T> p) {
  TPT_FAST_DYNAMIC_SHARED(memory);
  TPT_FAST_SHARED(T, scratch, [kThreads / kWarp]);
  TPT_FAST_SHARED(bool, is_last, [1]);
  const int64_t image = blockIdx.y;
  row_entropy<kThreads, kVector>(p, image * p.views + blockIdx.x, scratch);
  if (threadIdx.x == 0) {
    __threadfence();  // the row's results before the count
    // Wraps to zero at the last block, ready for the next launch.
    const unsigned last = static_cast<unsigned>(p.views) - 1;
    is_last[0] = atomicInc(p.arrived + image, last) == last;
    __threadfence();  // the count before the other rows' results
  }
  __syncthreads();
  if (!is_last[0]) return;
  const Kept<T> kept(memory, static_cast<int>(p.views), static_cast<int>(p.n_selected));
  select<kThreads>(p, image, kept);
  loss_and_gradient<kThreads, kVector>(p, image, kept, scratch);
}

template <int kThreads, int kVector, class T>
cudaError_t launch_with(const ObjectiveParams<T>& p, cudaStream_t stream) {
  const size_t shared = Kept<T>::bytes(p.views, p.n_selected, kThreads / kWarp);
  const dim3 grid(static_cast<unsigned>(p.views), static_cast<unsigned>(p.batch));
  if (shared > kSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        objective_kernel<kThreads, kVector, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  return launch(objective_kernel<kThreads, kVector, T>, grid, dim3(kThreads), shared, stream, p);
}

}  // namespace

template <class T>
int64_t objective_shared_bytes(const ObjectiveParams<T>& p) {
  return static_cast<int64_t>(Kept<T>::bytes(p.views, p.n_selected, threads_of(p) / kWarp) + kStaticBytes);
}

template <class T>
cudaError_t launch_objective(const ObjectiveParams<T>& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.batch > kMaxGridY || p.classes > (1 << 30) || p.views > (1 << 30)) return cudaErrorInvalidValue;
  if constexpr (sizeof(T) == 4) {
    const bool large = threads_of(p) == 1024;
    if (vectors_fit<4>(p.classes, p.logits, p.grad, p.log_mean)) {
      return large ? launch_with<1024, 4>(p, stream) : launch_with<256, 4>(p, stream);
    }
    if (large) return launch_with<1024, 1>(p, stream);
  }
  return launch_with<256, 1>(p, stream);
}

template int64_t objective_shared_bytes(const ObjectiveParams<float>&);
template int64_t objective_shared_bytes(const ObjectiveParams<double>&);
template cudaError_t launch_objective(const ObjectiveParams<float>&, cudaStream_t);
template cudaError_t launch_objective(const ObjectiveParams<double>&, cudaStream_t);

}  // namespace tpt_fast
