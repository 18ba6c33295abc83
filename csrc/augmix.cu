// Two launches. In the first a block makes the image of one chain of one view, step after step, in global memory, which
// its own barriers order. As on the CPU (augmix.cpp), the point operations are tables of 256 bytes that wait until an
// affine step, or the mixture, reads the image; what is counted of an image is counted once, in shared memory, and
// moved. The second launch mixes: of each channel four tables of weighted, normalised values in shared memory.
//
// What bounds it: affine steps, in double arithmetic of some 60 operations a pixel. Consumer GPUs do that at 1/64 of
// their rate in float; it is what Pillow computes with, and equal to the bit is what is asked.
//
// Dangers: images go back and forth between two buffers of 3 H W bytes a chain (58 MB for 63 views of 224 px), so views
// go in groups that share 64 MB; a view larger than that goes by itself. A thread block walks the whole image: 1024
// threads, and 192 blocks of 64 views, fill a GPU; few large views do not. Atomics are additions of integers, whose
// order changes nothing. `image` is written by the same launch that reads it: never through the read-only cache.
// Products are rounded by intrinsics, so that no flag can fuse them. Grid: 3 blocks a view of at most 65,535, and H W /
// 2048 blocks; offsets are 64 bits wide. Loads are of single bytes, no shuffles, nothing kept between launches.
#include <algorithm>

#include "augmix.h"
#include "augmix_tables.h"
#include "common.cuh"
#include "half.h"

namespace tpt_fast {
namespace {

constexpr int kLevels = 256;
constexpr int kBytes = 3 * kLevels;  // of the three channels
constexpr int kChainThreads = 1024;
constexpr int kMixThreads = 256;
constexpr int kMixPixels = 8 * kMixThreads;

__device__ __forceinline__ int64_t image_bytes(const AugmixGeometry& p) { return 3 * p.pixels(); }

// What one block knows of its chain, in shared memory. All threads call its functions, which end with a barrier.
struct Chain {
  uint8_t* bytes;   // [kBytes] what each byte of the image is to become
  uint8_t* table;   // [kBytes]
  int32_t* counts;  // [kBytes] how many there are of each byte of the image
  int32_t* now;     // [kBytes] and of each that they are to become

  __device__ void clear() const {
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads) bytes[i] = static_cast<uint8_t>(i % kLevels);
    __syncthreads();
  }

  __device__ void count(const uint8_t* image, int64_t pixels) const {
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads) counts[i] = 0;
    __syncthreads();
    for (int c = 0; c < 3; ++c) {
      for (int64_t i = threadIdx.x; i < pixels; i += kChainThreads)
        atomicAdd(counts + c * kLevels + image[c * pixels + i], 1);
    }
    __syncthreads();
  }

  __device__ void by_counts(int32_t kind, int32_t pixels) const {
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads) now[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads)
      atomicAdd(now + i / kLevels * kLevels + bytes[i], counts[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads) {
      const int32_t *of_channel = now + i / kLevels * kLevels, byte = i % kLevels;
      int32_t low = kLevels, high = 0, below = 0;
      for (int v = 0; v < kLevels; ++v) {
        if (of_channel[v] == 0) continue;
        low = min(low, v);
        high = v;
        below += v < byte ? of_channel[v] : 0;
      }
      table[i] =
          kind == kAutocontrast ? autocontrast(low, high, byte) : equalize(pixels, of_channel[high], below, byte);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads) bytes[i] = table[i / kLevels * kLevels + bytes[i]];
    __syncthreads();
  }

  template <class Function>
  __device__ void then(Function function) const {
    for (int i = threadIdx.x; i < kBytes; i += kChainThreads) bytes[i] = function(bytes[i]);
    __syncthreads();
  }

  __device__ void affine(const double* m, const uint8_t* image, uint32_t height, uint32_t width, uint8_t* to) const {
    const int64_t pixels = static_cast<int64_t>(height) * width;
    const double outer = width, bottom = height;
    const int last_row = static_cast<int>(height) - 1, last_column = static_cast<int>(width) - 1;
    for (int64_t i = threadIdx.x; i < pixels; i += kChainThreads) {
      const auto pixel = static_cast<uint32_t>(i), row = pixel / width;
      const double x = pixel - row * width + 0.5, y = row + 0.5;
      const double u = rounded_product(m[0], x) + rounded_product(m[1], y) + m[2];
      const double v = rounded_product(m[3], x) + rounded_product(m[4], y) + m[5];
      const bool inside = u >= 0.0 && u < outer && v >= 0.0 && v < bottom;
      const double left = (inside ? u : 0.5) - 0.5, top = (inside ? v : 0.5) - 0.5;
      const double column = floor(left), line = floor(top), right = left - column, down = top - line;
      const int x0 = static_cast<int>(column), y0 = static_cast<int>(line);
      const int64_t above = static_cast<int64_t>(max(y0, 0)) * width,
                    below = static_cast<int64_t>(min(y0 + 1, last_row)) * width;
      const int before = max(x0, 0), after = min(x0 + 1, last_column);
      for (int c = 0; c < 3; ++c) {
        const uint8_t *plane = image + c * pixels, *become = bytes + c * kLevels;
        const int p = become[plane[above + before]], q = become[plane[above + after]];
        const int r = become[plane[below + before]], s = become[plane[below + after]];
        const double upper = p + rounded_product(q - p, right), lower = r + rounded_product(s - r, right);
        const double value = upper + rounded_product(lower - upper, down);
        to[c * pixels + i] = inside ? static_cast<uint8_t>(value) : 0;
      }
    }
    __syncthreads();
  }
};

// Grid: (chains, views).
__global__ void __launch_bounds__(kChainThreads) augmix_chains_kernel(const AugmixGeometry p) {
  TPT_FAST_SHARED(uint8_t, bytes, [kBytes]);
  TPT_FAST_SHARED(uint8_t, table, [kBytes]);
  TPT_FAST_SHARED(int32_t, counts, [kBytes]);
  TPT_FAST_SHARED(int32_t, now, [kBytes]);
  const Chain chain{bytes, table, counts, now};
  const int64_t index = static_cast<int64_t>(blockIdx.y) * kChains + blockIdx.x, pixels = p.pixels();
  uint8_t* own = p.images + index * 2 * image_bytes(p);
  const uint8_t* image = p.crops + blockIdx.y * image_bytes(p);
  int which = 0;  // the crop; then 1 or 2, the chain's own images
  bool counted = false;
  chain.clear();
  for (int64_t step = index * p.depth; step < (index + 1) * p.depth; ++step) {
    const int32_t kind = p.steps[step];
    const double* parameters = p.parameters + step * kParameters;
    switch (kind) {
      case kAutocontrast:
      case kEqualize:
        if (!counted) chain.count(image, pixels);
        counted = true;
        chain.by_counts(kind, static_cast<int32_t>(pixels));
        break;
      case kPosterize:
        chain.then([&](int32_t byte) { return posterize(parameters[0], byte); });
        break;
      case kSolarize:
        chain.then([&](int32_t byte) { return solarize(parameters[0], byte); });
        break;
      case kAffine: {
        which = which == 1 ? 2 : 1;
        uint8_t* to = own + (which - 1) * image_bytes(p);
        chain.affine(parameters, image, static_cast<uint32_t>(p.height), static_cast<uint32_t>(p.width), to);
        image = to;
        counted = false;
        chain.clear();
        break;
      }
      default:
        break;
    }
  }
  uint8_t* end = p.ends + index * (kBytes + 1);
  for (int i = threadIdx.x; i < kBytes; i += kChainThreads) end[i] = bytes[i];
  if (threadIdx.x == 0) end[kBytes] = static_cast<uint8_t>(which);
}

// Grid: (kMixPixels pixels, channels, views).
template <class T>
__global__ void __launch_bounds__(kMixThreads) augmix_mix_kernel(const AugmixParams<T> p) {
  TPT_FAST_SHARED(float, tables, [(1 + kChains) * kLevels]);  // the weight times what is normalised
  const int64_t view = blockIdx.z, pixels = p.pixels();
  const int channel = blockIdx.y;
  const float* weights = p.weights + view * (1 + kChains);
  const uint8_t* images[1 + kChains];
  images[0] = p.crops + view * image_bytes(p) + channel * pixels;
  for (int i = 0; i < 1 + kChains; ++i) {
    const int64_t chain = view * kChains + i - 1;
    const uint8_t* end = p.ends + chain * (kBytes + 1);
    if (i > 0) {
      const int which = end[kBytes];
      images[i] = which == 0 ? images[0] : p.images + (chain * 2 + which - 1) * image_bytes(p) + channel * pixels;
    }
    for (int v = threadIdx.x; v < kLevels; v += kMixThreads) {
      const int byte = i == 0 ? v : end[channel * kLevels + v];
      tables[i * kLevels + v] = rounded_product(weights[i], p.table[channel * kLevels + byte]);
    }
  }
  __syncthreads();
  const float rest = 1.0f - weights[0];
  const PatchLayout layout = p.layout;
  const auto width = static_cast<uint32_t>(p.width);
  T* out = p.out + view * image_bytes(p);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kMixPixels;
  for (int64_t i = begin + threadIdx.x; i < begin + kMixPixels && i < pixels; i += kMixThreads) {
    const float mixture =
        tables[1 * kLevels + images[1][i]] + tables[2 * kLevels + images[2][i]] + tables[3 * kLevels + images[3][i]];
    const uint32_t y = static_cast<uint32_t>(i) / width, x = static_cast<uint32_t>(i) - y * width;
    out[layout.of_row(channel, y) + layout.of_column(x)] =
        narrow<T>(tables[images[0][i]] + rounded_product(rest, mixture));
  }
}

}  // namespace

int64_t augmix_at_once(int64_t pixels, int64_t views) {
  constexpr int64_t kImageBytes = 64 << 20;
  const int64_t of_one = kChains * 2 * 3 * pixels;
  return std::clamp<int64_t>(std::min(kImageBytes / of_one, kMaxGridY), 1, std::max<int64_t>(views, 1));
}

template <class T>
cudaError_t launch_augmix(const AugmixParams<T>& p, cudaStream_t stream) {
  for (int64_t first = 0; first < p.views; first += p.at_once) {
    AugmixParams<T> some = p;
    some.views = std::min(p.at_once, p.views - first);
    some.crops += first * 3 * p.pixels();
    some.steps += first * kChains * p.depth;
    some.parameters += first * kChains * p.depth * kParameters;
    some.weights += first * (1 + kChains);
    some.out += first * 3 * p.pixels();
    const auto views = static_cast<unsigned>(some.views);
    const cudaError_t error = launch(augmix_chains_kernel, dim3(kChains, views), dim3(kChainThreads), 0, stream,
                                     static_cast<const AugmixGeometry&>(some));
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.pixels(), kMixPixels)), 3, views);
    const cudaError_t mixed = launch(augmix_mix_kernel<T>, grid, dim3(kMixThreads), 0, stream, some);
    if (mixed != cudaSuccess) return mixed;
  }
  return cudaSuccess;
}

template cudaError_t launch_augmix(const AugmixParams<float>&, cudaStream_t);
template cudaError_t launch_augmix(const AugmixParams<Half>&, cudaStream_t);
template cudaError_t launch_augmix(const AugmixParams<BFloat16>&, cudaStream_t);

}  // namespace tpt_fast
