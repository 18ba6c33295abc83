// Two launches. The first writes what all tiles share: the image with four bytes a pixel, so that a tap is one aligned
// load, and the integer weights of every output row and column. Weights are double arithmetic, which consumer GPUs do
// at 1/64 of their rate: once an output line is cheap, once a tile would cost more than everything else.
//
// The second does both passes of a tile of 32 x 32 output pixels through shared memory: a warp makes a line of
// intermediate pixels, rounded to bytes as Pillow rounds them, and then a line of output pixels. Intermediate lines
// come in chunks, so that shared memory does not grow with the image; sums are integers, so that chunks change nothing.
// Neighbouring tiles both make the few intermediate lines they share (6 % at scale 2).
//
// Dangers: scratch for weights grows with the longest side times the number of views (1 x 1,000,000 at 224 px: 32 MB a
// view), so views go in groups that share it; every usual image is one group. A thread walks all taps of its line, at
// most 4 * longest / S: 18,000 for that image, 54 for 3,000 pixels. Specs cannot be looked at without waiting, so boxes
// outside the image would be read: Python's view_specs and draw_specs make none, and the weights are cut at max_taps.
// Grid: 2^31 - 1 blocks for the pixels, 65,535 views a group; offsets in the image and the output are 64 bits wide.
// Loads are of single words, no shuffles.
#include <algorithm>

#include "common.cuh"
#include "views.h"
#include "views_weights.h"

namespace tpt_fast {
namespace {

constexpr int kTile = 32;              // output pixels, each way; columns are lanes
constexpr int kWarps = 8;              // of a block
constexpr int kRows = kTile / kWarps;  // output rows of one warp
constexpr int kChunkRows = 64;         // intermediate lines in shared memory, width first
constexpr int kChunkColumns = 96;      // intermediate columns in shared memory, height first
constexpr int kThreads = kWarps * kWarp;

// What makes the output lines of one axis of a view. Unlike in views.cpp the lines lie beside each other, since
// neighbouring lanes make neighbouring ones: first source lines, numbers of taps, first weights, second weights, ...
struct Lines {
  const int32_t* rows;
  int pitch;

  __device__ int first(int i) const { return __ldg(rows + i); }
  __device__ int count(int i) const { return __ldg(rows + pitch + i); }
  __device__ const int32_t* weight(int i, int tap) const { return rows + static_cast<int64_t>(2 + tap) * pitch + i; }
};

__device__ __forceinline__ Lines lines_of(const ViewsGeometry& p, int64_t view, bool horizontal) {
  return {p.weights + (2 * view + horizontal) * (2 + p.max_taps) * p.lines(), static_cast<int>(p.lines())};
}

struct Rgb {
  int r = 0, g = 0, b = 0;

  __device__ __forceinline__ void add(int weight, uint32_t pixel) {
    r += weight * static_cast<int>(pixel & 255);
    g += weight * static_cast<int>(pixel >> 8 & 255);
    b += weight * static_cast<int>(pixel >> 16 & 255);
  }
  __device__ __forceinline__ uint32_t packed() const {
    return pixel_of_sum(r) | static_cast<uint32_t>(pixel_of_sum(g)) << 8 | static_cast<uint32_t>(pixel_of_sum(b)) << 16;
  }
};

// One thread an output line of either axis, then, since those take longer, one an image pixel.
__global__ void __launch_bounds__(kThreads) views_prepare_kernel(const ViewsGeometry p) {
  const int64_t line = blockIdx.x * int64_t{kThreads} + threadIdx.x, lines = p.lines();
  const int64_t pixel = line - 2 * p.views * lines;
  if (pixel >= p.height * p.width) return;
  if (pixel >= 0) {
    const uint8_t* from = p.image + 3 * pixel;
    p.pixels[pixel] = from[0] | static_cast<uint32_t>(from[1]) << 8 | static_cast<uint32_t>(from[2]) << 16;
    return;
  }
  const int64_t index = line % lines, view = line / lines / 2;
  const bool horizontal = line / lines % 2 == 1;
  if (index >= (horizontal ? p.view_width : p.view_height)) return;
  const int32_t* spec = p.specs + view * kSpecColumns;
  const ResizeAxis axis = resize_axis(spec[kFilter], spec[kHeight + horizontal], spec[kOutHeight + horizontal]);
  const Taps taps = taps_at(axis, spec[kWindowTop + horizontal] + static_cast<int32_t>(index));
  const double sum = sum_of_weights(axis, taps);
  int32_t* to = p.weights + (2 * view + horizontal) * (2 + p.max_taps) * lines + index;
  const int count = taps.count < p.max_taps ? taps.count : static_cast<int>(p.max_taps);
  to[0] = taps.first;
  to[lines] = count;
  for (int k = 0; k < count; ++k) to[(2 + k) * lines] = fixed_weight(axis, taps, sum, k);
}

// Sum over the taps of `lines` at `index` that lie in [begin, end); pixel(k) is the source pixel at line k.
template <class Pixel>
__device__ __forceinline__ void accumulate(const Lines& lines, int index, int begin, int end, Rgb& sum, Pixel pixel) {
  const int first = lines.first(index), last = min(first + lines.count(index), end);
  int k = max(first, begin);
  const int32_t* weight = lines.weight(index, k - first);
#pragma unroll 2
  for (; k < last; ++k, weight += lines.pitch) sum.add(__ldg(weight), pixel(k));
}

// Grid: (tiles across, tiles down, views).
template <class T>
__global__ void __launch_bounds__(kThreads, 3) views_kernel(const ViewsParams<T> p) {
  TPT_FAST_SHARED(uint32_t, lines, [kTile * kChunkColumns]);  // the greater of the two shapes of a chunk
  TPT_FAST_SHARED(T, table, [3 * 256]);
  static_assert(kTile * kChunkColumns >= kChunkRows * kTile, "both chunks fit");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int view_height = static_cast<int>(p.view_height), view_width = static_cast<int>(p.view_width);
  const int64_t view = blockIdx.z;
  const int32_t* spec = p.specs + view * kSpecColumns;
  const Lines vertical = lines_of(p, view, false), horizontal = lines_of(p, view, true);
  const int y0 = blockIdx.y * kTile, y1 = min(y0 + kTile, view_height);
  const int x0 = blockIdx.x * kTile, x1 = min(x0 + kTile, view_width);
  const int x = x0 + lane;
  const uint32_t* image = p.pixels + spec[kTop] * p.width + spec[kLeft];
  const int width = static_cast<int>(p.width);
  for (int i = threadIdx.x; i < 3 * 256; i += kThreads) table[i] = p.table[i];

  Rgb sums[kRows];
  if (vertical_first(p.vertical_first_when_taller, spec[kHeight], spec[kWidth], spec[kOutHeight], spec[kOutWidth])) {
    const int end = horizontal.first(x1 - 1) + horizontal.count(x1 - 1);
    for (int begin = horizontal.first(x0); begin < end; begin += kChunkColumns) {
      const int columns = min(kChunkColumns, end - begin);
      for (int y = y0 + warp; y < y1; y += kWarps) {
        for (int column = lane; column < columns; column += kWarp) {
          Rgb sum;
          accumulate(vertical, y, 0, spec[kHeight], sum,
                     [&](int k) { return __ldg(image + static_cast<int64_t>(k) * width + begin + column); });
          lines[(y - y0) * kChunkColumns + column] = sum.packed();
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = warp + i * kWarps;
        if (x < x1 && y0 + row < y1) {
          accumulate(horizontal, x, begin, begin + columns, sums[i],
                     [&](int k) { return lines[row * kChunkColumns + k - begin]; });
        }
      }
      __syncthreads();
    }
  } else {
    const int end = vertical.first(y1 - 1) + vertical.count(y1 - 1);
    for (int begin = vertical.first(y0); begin < end; begin += kChunkRows) {
      const int rows = min(kChunkRows, end - begin);
      for (int row = warp; row < rows; row += kWarps) {
        if (x < x1) {
          Rgb sum;
          const uint32_t* from = image + static_cast<int64_t>(begin + row) * width;
          accumulate(horizontal, x, 0, spec[kWidth], sum, [&](int k) { return __ldg(from + k); });
          lines[row * kTile + lane] = sum.packed();
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int y = y0 + warp + i * kWarps;
        if (x < x1 && y < y1) {
          accumulate(vertical, y, begin, begin + rows, sums[i],
                     [&](int k) { return lines[(k - begin) * kTile + lane]; });
        }
      }
      __syncthreads();
    }
  }

  if (x >= x1) return;
  const PatchLayout layout = p.layout;
  const int64_t plane = static_cast<int64_t>(layout.patch_height) * layout.patch_width;
  T* out = p.out + view * p.view_elements() + layout.of_column(spec[kFlip] ? view_width - 1 - x : x);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int y = y0 + warp + i * kWarps;
    if (y >= y1) continue;
    T* to = out + layout.of_row(0, y);
    to[0] = table[pixel_of_sum(sums[i].r)];
    to[plane] = table[256 + pixel_of_sum(sums[i].g)];
    to[2 * plane] = table[512 + pixel_of_sum(sums[i].b)];
  }
}

}  // namespace

int64_t views_max_taps(int64_t height, int64_t width, int64_t view_height, int64_t view_width) {
  // The window lies inside the resized box and the box inside the image, so no scale exceeds the image's to the view's.
  const int64_t scale = std::max({ceil_div(height, view_height), ceil_div(width, view_width), int64_t{1}});
  return std::min(4 * scale + 2, std::max(height, width));
}

int64_t views_at_once(int64_t max_taps, int64_t lines, int64_t views) {
  constexpr int64_t kWeightBytes = 64 << 20;
  const int64_t of_one = 2 * (2 + max_taps) * lines * int64_t{sizeof(int32_t)};
  return std::clamp<int64_t>(kWeightBytes / of_one, 1, std::max<int64_t>(views, 1));
}

namespace {

template <class T>
cudaError_t launch_some(const ViewsParams<T>& p, cudaStream_t stream) {
  const int64_t items = p.height * p.width + 2 * p.views * p.lines(), blocks = ceil_div(items, kThreads);
  const int64_t across = ceil_div(p.view_width, kTile), down = ceil_div(p.view_height, kTile);
  if (blocks > kMaxGridX || p.views > kMaxGridY || down > kMaxGridY) return cudaErrorInvalidValue;
  const cudaError_t error = launch(views_prepare_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                                   static_cast<const ViewsGeometry&>(p));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(p.views));
  return launch(views_kernel<T>, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace

template <class T>
cudaError_t launch_views(const ViewsParams<T>& p, cudaStream_t stream) {
  for (int64_t first = 0; first < p.views; first += p.at_once) {
    ViewsParams<T> some = p;
    some.views = std::min(p.at_once, p.views - first);
    some.specs += first * kSpecColumns;
    some.out += first * p.view_elements();
    const cudaError_t error = launch_some(some, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_views(const ViewsParams<uint8_t>&, cudaStream_t);
template cudaError_t launch_views(const ViewsParams<uint16_t>&, cudaStream_t);
template cudaError_t launch_views(const ViewsParams<uint32_t>&, cudaStream_t);

}  // namespace tpt_fast
