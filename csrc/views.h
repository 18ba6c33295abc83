// One image -> all its views: crop, Pillow's antialiased resize, window, flip, normalise; as images, or cut into the
// patches of a vision transformer, which are then the rows of its first matrix product.
#pragma once

#include "common.h"
#include "patches.h"

namespace tpt_fast {

// Columns of a spec row: box of the image -> resized to out_height x out_width -> the window of the
// view's size at (window_top, window_left) -> mirrored if flip. Boxes lie inside the image, windows inside the resized
// box.
enum ViewSpec {
  kTop,
  kLeft,
  kHeight,
  kWidth,
  kOutHeight,
  kOutWidth,
  kWindowTop,
  kWindowLeft,
  kFlip,
  kFilter,  // ViewFilter of views_weights.h
  kSpecColumns
};

struct ViewsGeometry {
  const uint8_t* image;  // [H, W, 3]
  const int32_t* specs;  // [N, kSpecColumns]
  int64_t height;        // H
  int64_t width;         // W
  int64_t views;         // N
  int64_t view_height;   // VH, pixels
  int64_t view_width;    // VW
  PatchLayout layout;    // of views in patches of PH x PW, divisors of VH and VW; those themselves leave images whole
  // The pass order of Pillow >= 13, or that of earlier ones: see vertical_first in views_weights.h.
  bool vertical_first_when_taller;

  // Scratch of the CPU functions, of the sizes that views_scratch returns.
  uint8_t* columns;  // [W * 3, column_pitch(H)] the image transposed
  int32_t* weights;  // [N, 2 (vertical, horizontal), max(VH, VW), 2 + max_taps] first source line, count, weights
                     // (CUDA: lines last)
  int64_t max_taps;

  // CUDA only.
  uint32_t* pixels;  // [H, W] scratch, R | G << 8 | B << 16
  int64_t at_once;   // how many views `weights` has room for, from views_at_once

  TPT_FAST_HOST_DEVICE int64_t lines() const { return view_height > view_width ? view_height : view_width; }
  TPT_FAST_HOST_DEVICE int64_t view_elements() const { return 3 * view_height * view_width; }
};

template <class T>
struct ViewsParams : ViewsGeometry {
  const T* table;  // [3, 256] normalised value of each byte; T is any type of that size
  T* out;          // [N, VH / PH * VW / PW, 3, PH, PW]
};

struct ViewsScratch {
  int64_t columns;   // bytes; 0 if no view needs them, and views_columns need not run
  int64_t max_taps;  // of any view
  int64_t weights;   // int32 elements
  int64_t band;      // bytes of the scratch that each concurrent views_bands needs
};

ViewsScratch views_scratch(const ViewsGeometry& p);

// Blocks of image rows that views_columns transposes, and bands of output rows that views_bands makes, one an item.
int64_t column_items(const ViewsGeometry& p);
int64_t band_items(const ViewsGeometry& p);

// Items: column_items. Writes columns.
void views_columns(const ViewsGeometry& p, int64_t begin, int64_t end);

// Items: the N views. Writes weights.
void views_weights(const ViewsGeometry& p, int64_t begin, int64_t end);

// Items: band_items, after the two above are done. Writes out.
template <class T>
void views_bands(const ViewsParams<T>& p, uint8_t* scratch, int64_t begin, int64_t end);

#ifdef TPT_FAST_CUDA
// No view of any specs has more taps; `max_taps` and `weights` for launch_views, which cannot look at the specs.
int64_t views_max_taps(int64_t height, int64_t width, int64_t view_height, int64_t view_width);

// How many views go together, at least 1: one after the other they use the same `weights`, [at_once, 2, 2 + max_taps,
// lines], of at most 64 MB where one view does not take more.
int64_t views_at_once(int64_t max_taps, int64_t lines, int64_t views);

// Two launches for each views_at_once. Needs `weights` and `pixels`; `columns` may be null.
template <class T>
cudaError_t launch_views(const ViewsParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
