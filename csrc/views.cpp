// Both passes of a resize are one loop here: a weighted sum of whole lines of bytes, which vectorises along the line
// whatever the weights. The vertical pass sums image rows; the horizontal pass sums image columns, which are lines of
// the transposed image (made once for all views), and a transpose of the small intermediate joins the two. A view is
// cut into bands of output rows, so that an intermediate stays in the cache and one large view still feeds every core;
// where the horizontal pass comes first, neighbouring bands compute the few source rows they share twice.
#include "views.h"

#include <algorithm>
#include <cstring>

#include "views_weights.h"

namespace tpt_fast {
namespace {

constexpr int64_t kBandRows = 64;
constexpr int64_t kBlockRows = 64;  // image rows of one transposing item: whole cache lines of the result
constexpr int64_t kTile = 16;       // side of the byte transpose

// Pitch of a transposed line of n bytes: an odd number of cache lines, so that lines do not share cache sets.
int64_t column_pitch(int64_t n) { return ((n + 63) / 64 | 1) * 64; }

#ifdef __GNUC__
#define TPT_FAST_VECTORS
using Bytes16 = uint8_t __attribute__((vector_size(16)));
using Ints8 = int32_t __attribute__((vector_size(32)));

// 8 * kVectors bytes of weighted_lines, their sums in registers.
template <int kVectors>
void weighted_block(const uint8_t* lines, int64_t pitch, const int32_t* weights, int32_t count, uint8_t* out) {
  Ints8 sums[kVectors] = {};
  for (int32_t k = 0; k < count; ++k, lines += pitch) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint8_t* p = lines + 8 * v;
      sums[v] += weights[k] * Ints8{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};  // gcc: one widening load
    }
  }
  int32_t stored[8 * kVectors];
  std::memcpy(stored, sums, sizeof stored);
  for (int i = 0; i < 8 * kVectors; ++i) out[i] = pixel_of_sum(stored[i]);
}

// Bytes of x (0 to 15) and of y (16 to 31).
template <int... kPlaces>
Bytes16 shuffled(Bytes16 x, Bytes16 y) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, y, kPlaces...);
#else  // gcc before 12
  return __builtin_shuffle(x, y, Bytes16{kPlaces...});
#endif
}

void interleave(const Bytes16 (&in)[kTile], Bytes16 (&out)[kTile]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = shuffled<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(in[i], in[i + 8]);
    out[2 * i + 1] = shuffled<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(in[i], in[i + 8]);
  }
}

// Four perfect shuffles of 256 bytes swap the halves of their 8-bit address: row and column.
void transpose_tile(const uint8_t* in, int64_t in_pitch, uint8_t* out, int64_t out_pitch) {
  Bytes16 a[kTile], b[kTile];
  for (int i = 0; i < kTile; ++i) std::memcpy(&a[i], in + i * in_pitch, sizeof a[i]);
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
  interleave(b, a);
  for (int i = 0; i < kTile; ++i) std::memcpy(out + i * out_pitch, &a[i], sizeof a[i]);
}
#endif

// out[i] = pixel_of_sum(sum over k of weights[k] * lines[k * pitch + i]) for i < n. Touches nothing outside the lines.
void weighted_lines(const uint8_t* lines, int64_t pitch, const int32_t* weights, int32_t count, uint8_t* out,
                    int64_t n) {
  if (count == 1) {  // the weight is one
    std::memcpy(out, lines, n);
    return;
  }
  int64_t i = 0;
#ifdef TPT_FAST_VECTORS
  for (; i + 64 <= n; i += 64) weighted_block<8>(lines + i, pitch, weights, count, out + i);
  for (; i + 32 <= n; i += 32) weighted_block<4>(lines + i, pitch, weights, count, out + i);
  if (i < n && n >= 32) {  // the last block overlaps the one before
    weighted_block<4>(lines + n - 32, pitch, weights, count, out + n - 32);
    return;
  }
#endif
  for (; i < n; ++i) {
    int32_t sum = 0;
    for (int32_t k = 0; k < count; ++k) sum += weights[k] * lines[k * pitch + i];
    out[i] = pixel_of_sum(sum);
  }
}

// out[j, i] = in[i, j] for i < rows, j < columns.
void transpose(const uint8_t* in, int64_t in_pitch, uint8_t* out, int64_t out_pitch, int64_t rows, int64_t columns) {
#ifdef TPT_FAST_VECTORS
  if (rows >= kTile && columns >= kTile) {
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t column = std::min(j, columns - kTile);
      for (int64_t i = 0; i < rows; i += kTile) {
        const int64_t row = std::min(i, rows - kTile);
        transpose_tile(in + row * in_pitch + column, in_pitch, out + column * out_pitch + row, out_pitch);
      }
    }
    return;
  }
#endif
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * out_pitch + i] = in[i * in_pitch + j];
}

bool vertical_first(const ViewsGeometry& p, const int32_t* spec) {
  return tpt_fast::vertical_first(p.vertical_first_when_taller, spec[kHeight], spec[kWidth], spec[kOutHeight],
                                  spec[kOutWidth]);
}

ResizeAxis axis_of(const int32_t* spec, bool horizontal) {
  return resize_axis(spec[kFilter], spec[kHeight + horizontal], spec[kOutHeight + horizontal]);
}

int64_t bands_of(const ViewsGeometry& p) { return ceil_div(p.view_height, kBandRows); }
int64_t rows_of_band(const ViewsGeometry& p) { return p.view_height == 0 ? 0 : ceil_div(p.view_height, bands_of(p)); }

// Weights of output pixels [begin, end) of one axis and view: rows of 2 + max_taps.
struct Lines {
  const int32_t* rows;
  int64_t pitch;

  int32_t first(int64_t i) const { return rows[i * pitch]; }
  int32_t count(int64_t i) const { return rows[i * pitch + 1]; }
  const int32_t* weights(int64_t i) const { return rows + i * pitch + 2; }
};

Lines lines_of(const ViewsGeometry& p, int64_t view, bool horizontal) {
  const int64_t pitch = 2 + p.max_taps;
  return {p.weights + (2 * view + horizontal) * p.lines() * pitch, pitch};
}

// Source lines under output pixels [begin, end).
struct Span {
  int64_t first, count;
};

Span span_of(const Lines& lines, int64_t begin, int64_t end) {
  const int64_t first = lines.first(begin);
  return {first, lines.first(end - 1) + lines.count(end - 1) - first};
}

// Most source lines under `outputs` neighbouring output pixels.
int64_t widest_span(const ResizeAxis& axis, int64_t outputs) {
  return std::min<int64_t>(axis.length, static_cast<int64_t>((outputs - 1) * axis.scale) + 2 + most_taps(axis));
}

// Rows [begin, end) of a view as planes [3, end - begin, VW] of bytes, in one of the two buffers.
const uint8_t* band_columns_first(const ViewsGeometry& p, int64_t view, int64_t begin, int64_t end, uint8_t* buffer,
                                  uint8_t* other) {
  const int32_t* spec = p.specs + view * kSpecColumns;
  const Lines vertical = lines_of(p, view, false), horizontal = lines_of(p, view, true);
  const Span rows = span_of(vertical, begin, end);
  const int64_t pitch = column_pitch(p.height), n = end - begin;
  for (int64_t x = 0; x < p.view_width; ++x) {
    for (int64_t c = 0; c < 3; ++c) {
      const uint8_t* column =
          p.columns + ((spec[kLeft] + horizontal.first(x)) * int64_t{3} + c) * pitch + spec[kTop] + rows.first;
      weighted_lines(column, 3 * pitch, horizontal.weights(x), horizontal.count(x),
                     buffer + (c * p.view_width + x) * rows.count, rows.count);
    }
  }
  for (int64_t c = 0; c < 3; ++c)
    transpose(buffer + c * p.view_width * rows.count, rows.count, other + c * rows.count * p.view_width, p.view_width,
              p.view_width, rows.count);
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t y = 0; y < n; ++y)
      weighted_lines(other + (c * rows.count + vertical.first(begin + y) - rows.first) * p.view_width, p.view_width,
                     vertical.weights(begin + y), vertical.count(begin + y), buffer + (c * n + y) * p.view_width,
                     p.view_width);
  return buffer;
}

const uint8_t* band_rows_first(const ViewsGeometry& p, int64_t view, int64_t begin, int64_t end, uint8_t* buffer,
                               uint8_t* other) {
  const int32_t* spec = p.specs + view * kSpecColumns;
  const Lines vertical = lines_of(p, view, false), horizontal = lines_of(p, view, true);
  const Span columns = span_of(horizontal, 0, p.view_width);
  const int64_t n = end - begin, line = 3 * columns.count;
  for (int64_t y = 0; y < n; ++y)
    weighted_lines(p.image + ((spec[kTop] + vertical.first(begin + y)) * p.width + spec[kLeft] + columns.first) * 3,
                   3 * p.width, vertical.weights(begin + y), vertical.count(begin + y), buffer + y * line, line);
  transpose(buffer, line, other, n, n, line);
  for (int64_t x = 0; x < p.view_width; ++x)
    for (int64_t c = 0; c < 3; ++c)
      weighted_lines(other + ((horizontal.first(x) - columns.first) * int64_t{3} + c) * n, 3 * n, horizontal.weights(x),
                     horizontal.count(x), buffer + (c * p.view_width + x) * n, n);
  for (int64_t c = 0; c < 3; ++c)
    transpose(buffer + c * p.view_width * n, n, other + c * n * p.view_width, p.view_width, p.view_width, n);
  return other;
}

}  // namespace

ViewsScratch views_scratch(const ViewsGeometry& p) {
  ViewsScratch scratch{};
  const int64_t rows = rows_of_band(p);
  for (int64_t view = 0; view < p.views; ++view) {
    const int32_t* spec = p.specs + view * kSpecColumns;
    const ResizeAxis vertical = axis_of(spec, false), horizontal = axis_of(spec, true);
    scratch.max_taps = std::max<int64_t>({scratch.max_taps, most_taps(vertical), most_taps(horizontal)});
    int64_t bytes;
    if (vertical_first(p, spec)) {
      bytes = 3 * rows * std::max(widest_span(horizontal, p.view_width), p.view_width);
    } else {
      bytes = 3 * p.view_width * std::max(widest_span(vertical, rows), rows);
      scratch.columns = p.width * 3 * column_pitch(p.height);
    }
    scratch.band = std::max(scratch.band, 2 * bytes);
  }
  scratch.weights = p.views * 2 * p.lines() * (2 + scratch.max_taps);
  return scratch;
}

int64_t column_items(const ViewsGeometry& p) { return ceil_div(p.height, kBlockRows); }
int64_t band_items(const ViewsGeometry& p) { return p.views * bands_of(p); }

void views_columns(const ViewsGeometry& p, int64_t begin, int64_t end) {
  const int64_t first = begin * kBlockRows, pitch = column_pitch(p.height), line = 3 * p.width;
  for (int64_t row = first; row < std::min(end * kBlockRows, p.height); row += kBlockRows)
    transpose(p.image + row * line, line, p.columns + row, pitch, std::min(kBlockRows, p.height - row), line);
}

void views_weights(const ViewsGeometry& p, int64_t begin, int64_t end) {
  const int64_t pitch = 2 + p.max_taps;
  for (int64_t view = begin; view < end; ++view) {
    const int32_t* spec = p.specs + view * kSpecColumns;
    for (const bool horizontal : {false, true}) {
      const ResizeAxis axis = axis_of(spec, horizontal);
      int32_t* row = p.weights + (2 * view + horizontal) * p.lines() * pitch;
      for (int64_t i = 0; i < (horizontal ? p.view_width : p.view_height); ++i, row += pitch) {
        const Taps taps = taps_at(axis, spec[kWindowTop + horizontal] + static_cast<int32_t>(i));
        const double sum = sum_of_weights(axis, taps);
        row[0] = taps.first;
        row[1] = taps.count;
        for (int32_t k = 0; k < taps.count; ++k) row[2 + k] = fixed_weight(axis, taps, sum, k);
      }
    }
  }
}

template <class T>
void views_bands(const ViewsParams<T>& p, uint8_t* scratch, int64_t begin, int64_t end) {
  const int64_t bands = bands_of(p), rows = rows_of_band(p);
  const PatchLayout layout = p.layout;
  const int64_t patch = layout.patch_width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t view = item / bands, top = item % bands * rows, bottom = std::min(top + rows, p.view_height);
    if (top >= bottom) continue;
    const int32_t* spec = p.specs + view * kSpecColumns;
    const Lines vertical = lines_of(p, view, false), horizontal = lines_of(p, view, true);
    int64_t half;
    const uint8_t* planes;
    if (vertical_first(p, spec)) {
      half = 3 * (bottom - top) * std::max(span_of(horizontal, 0, p.view_width).count, p.view_width);
      planes = band_rows_first(p, view, top, bottom, scratch, scratch + half);
    } else {
      half = 3 * p.view_width * std::max(span_of(vertical, top, bottom).count, bottom - top);
      planes = band_columns_first(p, view, top, bottom, scratch, scratch + half);
    }
    for (int64_t c = 0; c < 3; ++c) {
      const T* table = p.table + 256 * c;
      for (int64_t y = top; y < bottom; ++y, planes += p.view_width) {
        T* row = p.out + view * p.view_elements() + layout.of_row(c, y);
        for (int64_t left = 0; left < p.view_width; left += patch) {
          T* out = row + layout.of_column(left);
          if (spec[kFlip]) {
            for (int64_t x = 0; x < patch; ++x) out[x] = table[planes[p.view_width - 1 - left - x]];
          } else {
            for (int64_t x = 0; x < patch; ++x) out[x] = table[planes[left + x]];
          }
        }
      }
    }
  }
}

template void views_bands(const ViewsParams<uint8_t>&, uint8_t*, int64_t, int64_t);
template void views_bands(const ViewsParams<uint16_t>&, uint8_t*, int64_t, int64_t);
template void views_bands(const ViewsParams<uint32_t>&, uint8_t*, int64_t, int64_t);

}  // namespace tpt_fast
