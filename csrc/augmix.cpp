// A chain's point operations (autocontrast, equalize, posterize, solarize) are tables of 256 bytes, so any number of
// them in a row is one table, and what is counted of an image is counted once: the counts after a table are the counts
// before it, moved. Pixels are touched by affine steps alone, and by the mixture, whose own tables take in the last
// table of each chain, its weight and the normalisation.
//
// An affine step first lays its source out with the outermost pixels repeated around it, the pending table applied, so
// that no pixel has to ask whether its neighbours exist. A row of its result falls into runs whose sources lie beside
// each other too: AugMix's transforms are nearly the identity, so a run has some 30 pixels at least, and loads, double
// arithmetic and stores are whole vectors. Any other transform is as right, only slower.
//
// Products must be rounded before they are added, as Pillow and PyTorch round them; in this file no compiler may fuse
// them.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "augmix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "augmix_tables.h"
#include "rows.h"

namespace tpt_fast {
namespace {

constexpr int64_t kBlock = 8;            // pixels of a run that are made together
constexpr int32_t kOutside = INT32_MIN;  // no offset of a pixel
constexpr int64_t kAlignment = 64;       // bytes, of each part of the scratch

// Parts of the scratch, one after the other; of none, only their size is counted.
class Scratch {
 public:
  explicit Scratch(uint8_t* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* part = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  int64_t used_ = 0;
};

// What one worker needs for a view. Blocks reach up to kBlock elements beyond the rows and the padded image.
struct Workspace {
  Workspace(Scratch& scratch, int64_t height, int64_t width)
      : padded(scratch.take<uint8_t>(3 * (height + 2) * (width + 2) + 2 * kBlock)),
        across(scratch.take<double>(2 * width)),
        right(scratch.take<double>(width + kBlock)),
        down(scratch.take<double>(width + kBlock)),
        offset(scratch.take<int32_t>(width)),
        line(scratch.take<uint8_t>(3 * (width + kBlock))),
        mixed(scratch.take<float>(width)) {
    for (auto& image : ends) image = scratch.take<uint8_t>(3 * height * width);
  }

  uint8_t* padded;         // [3, H + 2, W + 2] source of an affine step, outermost pixels repeated
  double* across;          // [2, W] what the column adds to the source's place
  double *right, *down;    // [W] how far the source lies beyond the pixel at `offset`, in pixels
  int32_t* offset;         // [W] in `padded`, less the column; kOutside
  uint8_t* line;           // [3, W + kBlock]
  float* mixed;            // [W]
  uint8_t* ends[kChains];  // [3, H, W] each chain's image
};

struct Histogram {
  int32_t counts[3][256];
  bool counted = false;

  void count(const uint8_t* image, int64_t pixels) {
    // Neighbours are often equal, and an increment waits for the last one of its counter: so there are four of each.
    for (int64_t c = 0; c < 3; ++c, image += pixels) {
      int32_t parts[4][256] = {};
      for (int64_t i = 0; i < pixels; ++i) ++parts[i % 4][image[i]];
      for (int v = 0; v < 256; ++v) counts[c][v] = parts[0][v] + parts[1][v] + parts[2][v] + parts[3][v];
    }
    counted = true;
  }
};

#ifdef __GNUC__
using Doubles = double __attribute__((vector_size(8 * kBlock)));
using Ints = int32_t __attribute__((vector_size(4 * kBlock)));

void load(const uint8_t* p, Ints& to) { to = Ints{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }  // gcc: widens
#endif

// Pixels [begin, end) of a line, and up to kBlock - 1 more, which whoever comes next overwrites.
void interpolate(const uint8_t* source, const Workspace& w, int64_t pitch, int64_t begin, int64_t end, uint8_t* line) {
#ifdef __GNUC__
  for (int64_t x = begin; x < end; x += kBlock) {
    const uint8_t *above = source + x, *below = above + pitch;
    Ints p, q, r, s;
    load(above, p), load(above + 1, q), load(below, r), load(below + 1, s);
    Doubles right, down;
    std::memcpy(&right, w.right + x, sizeof right);
    std::memcpy(&down, w.down + x, sizeof down);
    const Doubles upper = __builtin_convertvector(p, Doubles) + __builtin_convertvector(q - p, Doubles) * right;
    const Doubles lower = __builtin_convertvector(r, Doubles) + __builtin_convertvector(s - r, Doubles) * right;
    const Ints values = __builtin_convertvector(upper + (lower - upper) * down, Ints);
    for (int64_t i = 0; i < kBlock; ++i) line[x + i] = static_cast<uint8_t>(values[i]);
  }
#else
  for (int64_t x = begin; x < end; ++x) {
    const int32_t p = source[x], q = source[x + 1], r = source[x + pitch], s = source[x + pitch + 1];
    const double upper = p + (q - p) * w.right[x], lower = r + (s - r) * w.right[x];
    line[x] = static_cast<uint8_t>(upper + (lower - upper) * w.down[x]);
  }
#endif
}

// A chain: an image, and what is still to become of its bytes.
class Chain {
 public:
  // `of_crop` is shared by the chains of a view, and counted when the first of them needs it.
  Chain(const uint8_t* crop, int64_t height, int64_t width, uint8_t* own, Workspace& workspace, Histogram& of_crop)
      : image_(crop), height_(height), width_(width), own_(own), workspace_(workspace), of_crop_(of_crop) {
    clear();
  }

  void step(int32_t kind, const double* parameters) {
    switch (kind) {
      case kAutocontrast:
      case kEqualize:
        by_counts(kind);
        break;
      case kPosterize:
        then([&](int64_t, int32_t byte) { return posterize(parameters[0], byte); });
        break;
      case kSolarize:
        then([&](int64_t, int32_t byte) { return solarize(parameters[0], byte); });
        break;
      case kAffine:
        affine(parameters);
        break;
      default:
        break;
    }
  }

  const uint8_t* image() const { return image_; }
  const uint8_t* bytes(int64_t channel) const { return bytes_[channel]; }

 private:
  void clear() {
    for (auto& channel : bytes_)
      for (int v = 0; v < 256; ++v) channel[v] = static_cast<uint8_t>(v);
    changed_ = false;
  }

  template <class Function>
  void then(Function function) {
    for (int64_t c = 0; c < 3; ++c)
      for (auto& byte : bytes_[c]) byte = function(c, byte);
    changed_ = true;
  }

  void by_counts(int32_t kind) {
    Histogram& before = image_ == own_ ? of_own_ : of_crop_;
    const auto pixels = static_cast<int32_t>(height_ * width_);
    if (!before.counted) before.count(image_, pixels);
    uint8_t table[3][256];
    for (int64_t c = 0; c < 3; ++c) {
      int32_t now[256] = {};
      for (int v = 0; v < 256; ++v) now[bytes_[c][v]] += before.counts[c][v];
      int32_t low = 0, high = 255, below = 0;
      while (now[low] == 0) ++low;
      while (now[high] == 0) --high;
      for (int v = 0; v < 256; below += now[v++])
        table[c][v] = kind == kAutocontrast ? autocontrast(low, high, v) : equalize(pixels, now[high], below, v);
    }
    then([&](int64_t c, int32_t byte) { return table[c][byte]; });
  }

  // Lays the image out with a border, its bytes replaced.
  void pad() {
    const int64_t pitch = width_ + 2, plane_size = pitch * (height_ + 2);
    for (int64_t c = 0; c < 3; ++c) {
      uint8_t* plane = workspace_.padded + c * plane_size;
      for (int64_t y = 0; y < height_; ++y) {
        const uint8_t* from = image_ + (c * height_ + y) * width_;
        uint8_t* to = plane + (1 + y) * pitch;
        if (changed_)
          for (int64_t x = 0; x < width_; ++x) to[1 + x] = bytes_[c][from[x]];
        else
          std::memcpy(to + 1, from, width_);
        to[0] = to[1];
        to[1 + width_] = to[width_];
      }
      std::memcpy(plane, plane + pitch, pitch);
      std::memcpy(plane + (1 + height_) * pitch, plane + height_ * pitch, pitch);
    }
  }

  // Fills the workspace's right, down and offset for one row.
  void locate(const double* matrix, int64_t y) {
    const Workspace& w = workspace_;
    const double row = y + 0.5, b = matrix[1] * row, c = matrix[2], e = matrix[4] * row, f = matrix[5];
    const double right = width_, bottom = height_, *ax = w.across, *dx = w.across + width_;
    const auto pitch = static_cast<int32_t>(width_ + 2);
    for (int32_t x = 0; x < width_; ++x) {
      const double u = ax[x] + b + c, v = dx[x] + e + f;
      const bool inside = (u >= 0.0) & (u < right) & (v >= 0.0) & (v < bottom);
      const double left = (inside ? u : 0.5) - 0.5, top = (inside ? v : 0.5) - 0.5;
      const double column = std::floor(left), line = std::floor(top);
      w.right[x] = left - column;
      w.down[x] = top - line;
      const int32_t at = (static_cast<int32_t>(line) + 1) * pitch + static_cast<int32_t>(column) + 1 - x;
      w.offset[x] = inside ? at : kOutside;
    }
  }

  void affine(const double* matrix) {
    const int64_t pitch = width_ + 2, plane_size = pitch * (height_ + 2);
    Workspace& w = workspace_;
    pad();
    for (int64_t x = 0; x < width_; ++x) {
      w.across[x] = matrix[0] * (x + 0.5);
      w.across[width_ + x] = matrix[3] * (x + 0.5);
    }
    for (int64_t y = 0; y < height_; ++y) {
      locate(matrix, y);
      for (int64_t begin = 0, end; begin < width_; begin = end) {
        const int32_t offset = w.offset[begin];
        end = begin + 1;
        while (end < width_ && w.offset[end] == offset) ++end;
        for (int64_t c = 0; c < 3; ++c) {
          uint8_t* line = w.line + c * (width_ + kBlock);
          if (offset == kOutside)
            std::memset(line + begin, 0, end - begin);
          else
            interpolate(w.padded + c * plane_size + offset, w, pitch, begin, end, line);
        }
      }
      for (int64_t c = 0; c < 3; ++c)
        std::memcpy(own_ + (c * height_ + y) * width_, w.line + c * (width_ + kBlock), width_);
    }
    image_ = own_;
    of_own_.counted = false;
    clear();
  }

  const uint8_t* image_;
  int64_t height_, width_;
  uint8_t* own_;
  Workspace& workspace_;
  Histogram& of_crop_;
  Histogram of_own_;
  uint8_t bytes_[3][256];  // what each byte of the image is to become
  bool changed_;           // whether that is another one
};

// Pixels [begin, begin + n) of a view, from the images and the tables of the crop and of each chain.
void mix(const uint8_t* const (&images)[1 + kChains], const float (&tables)[1 + kChains][256], float rest,
         int64_t begin, int64_t n, float* out) {
  for (int64_t x = 0; x < n; ++x) {
    const float mixture =
        tables[1][images[1][begin + x]] + tables[2][images[2][begin + x]] + tables[3][images[3][begin + x]];
    out[x] = tables[0][images[0][begin + x]] + rest * mixture;
  }
}

template <class T>
void store(const float* from, T* to, int64_t n) {
  narrow_row(from, to, n);
}
template <>
void store(const float* from, float* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}

// Writes one row of one channel of a view.
template <class T>
void write(const AugmixGeometry& p, const float* row, int64_t channel, int64_t y, T* view) {
  const int64_t patch = p.layout.patch_width;
  T* to = view + p.layout.of_row(channel, y);
  for (int64_t left = 0; left < p.width; left += patch) store(row + left, to + p.layout.of_column(left), patch);
}

}  // namespace

int64_t augmix_scratch(const AugmixGeometry& p) {
  Scratch scratch(nullptr);
  Workspace(scratch, p.height, p.width);
  return scratch.used();
}

template <class T>
void augmix_views(const AugmixParams<T>& p, uint8_t* memory, int64_t begin, int64_t end) {
  const int64_t plane = p.pixels();
  Scratch scratch(memory);
  Workspace workspace(scratch, p.height, p.width);
  std::fill_n(workspace.right + p.width, kBlock, 0.0);
  std::fill_n(workspace.down + p.width, kBlock, 0.0);
  for (int64_t view = begin; view < end; ++view) {
    const uint8_t* crop = p.crops + view * 3 * plane;
    T* out = p.out + view * 3 * plane;
    const float* weights = p.weights + view * (1 + kChains);
    const float own = weights[0], rest = 1.0f - own;
    Histogram of_crop;
    const uint8_t* images[1 + kChains] = {crop};
    float tables[3][1 + kChains][256];  // of each channel: the weight times what is normalised
    for (int64_t c = 0; c < 3; ++c)
      for (int v = 0; v < 256; ++v) tables[c][0][v] = own * p.table[c * 256 + v];
    for (int64_t i = 0; i < kChains; ++i) {
      Chain chain(crop, p.height, p.width, workspace.ends[i], workspace, of_crop);
      for (int64_t place = 0; place < p.depth; ++place) {
        const int64_t step = (view * kChains + i) * p.depth + place;
        chain.step(p.steps[step], p.parameters + step * kParameters);
      }
      images[1 + i] = chain.image();
      for (int64_t c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) tables[c][1 + i][v] = weights[1 + i] * p.table[c * 256 + chain.bytes(c)[v]];
    }
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t y = 0; y < p.height; ++y) {
        mix(images, tables[c], rest, c * plane + y * p.width, p.width, workspace.mixed);
        write(p, workspace.mixed, c, y, out);
      }
    }
  }
}

template void augmix_views(const AugmixParams<float>&, uint8_t*, int64_t, int64_t);
template void augmix_views(const AugmixParams<Half>&, uint8_t*, int64_t, int64_t);
template void augmix_views(const AugmixParams<BFloat16>&, uint8_t*, int64_t, int64_t);

}  // namespace tpt_fast
