#include "../csrc/views.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks.h"
#include "device.h"
#include "grain.h"
#include "huge_pages.h"
#include "patch.h"

namespace tpt_fast {
namespace {

#ifndef TPT_FAST_CUDA
// Only the CPU can look at the specs without waiting for a device.
void check_specs(const ViewsGeometry& p) {
  for (int64_t view = 0; view < p.views; ++view) {
    const int32_t* s = p.specs + view * kSpecColumns;
    const auto inside = [](int64_t first, int64_t count, int64_t length) {
      return first >= 0 && count >= 1 && first + count <= length;
    };
    STD_TORCH_CHECK(inside(s[kTop], s[kHeight], p.height) && inside(s[kLeft], s[kWidth], p.width),
                    "specs: expected boxes inside the image of ", p.height, " x ", p.width, " (height x width), got ",
                    s[kHeight], " x ", s[kWidth], " at (", s[kTop], ", ", s[kLeft], ") in row ", view);
    STD_TORCH_CHECK(
        inside(s[kWindowTop], p.view_height, s[kOutHeight]) && inside(s[kWindowLeft], p.view_width, s[kOutWidth]),
        "specs: expected windows of ", p.view_height, " x ", p.view_width, " inside the resized box of ", s[kOutHeight],
        " x ", s[kOutWidth], ", got one at (", s[kWindowTop], ", ", s[kWindowLeft], ") in row ", view);
    STD_TORCH_CHECK(s[kFilter] == 0 || s[kFilter] == 1, "specs: expected filter 0 or 1, got ", s[kFilter], " in row ",
                    view);
  }
}
#endif

struct Given {
  const Tensor &image, &specs, &table;
  int64_t height, width;  // of a view
  bool vertical_first;
  std::optional<int64_t> patch;
};

// Allocates the output and fills the parameters; `run` computes.
template <class T, class Run>
Tensor views(const Given& given, Run run) {
  const Tensor image = torch::stable::contiguous(given.image), specs = torch::stable::contiguous(given.specs),
               table = torch::stable::contiguous(given.table);
  const int64_t count = specs.size(0), height = given.height, width = given.width, patch = given.patch.value_or(1);
  Tensor out = given.patch
                   ? empty(table, {count, height / patch * (width / patch), 3 * patch * patch}, table.scalar_type())
                   : empty(table, {count, 3, height, width}, table.scalar_type());
  ViewsParams<T> p{};
  p.image = image.const_data_ptr<uint8_t>();
  p.specs = specs.const_data_ptr<int32_t>();
  p.table = static_cast<const T*>(table.const_data_ptr());
  p.out = static_cast<T*>(out.mutable_data_ptr());
  p.height = image.size(0);
  p.width = image.size(1);
  p.views = count;
  p.view_height = height;
  p.view_width = width;
  p.layout = layout_of(height, width, given.patch);
  p.vertical_first_when_taller = given.vertical_first;
  run(p, out);
  return out;
}

void check(const Given& given) {
  const auto& [image, specs, table, height, width, vertical_first, patch] = given;
  check_shape(image, "image", {-1, -1, 3});
  check_dtype(image, "image", {ScalarType::Byte});
  check_shape(specs, "specs", {-1, kSpecColumns});
  check_dtype(specs, "specs", {ScalarType::Int});
  check_shape(table, "table", {3, 256});
  check_dtype(table, "table", {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Byte});
  check_range(height, "size", 1, 1 << 15);
  check_range(width, "size", 1, 1 << 15);
  check_patch(height, width, patch);
  STD_TORCH_CHECK(image.is_cuda() == specs.is_cuda() && image.is_cuda() == table.is_cuda(),
                  "specs: expected image, specs and table on one device");
}

template <class Run>
Tensor by_size(const Given& given, Run run) {
  switch (given.table.element_size()) {
    case 4:
      return views<uint32_t>(given, run);
    case 2:
      return views<uint16_t>(given, run);
    default:
      return views<uint8_t>(given, run);
  }
}

#ifndef TPT_FAST_CUDA
template <class T>
void run_on_cpu(ViewsParams<T>& p, const Tensor& like, const Tensor& out) {
  using torch::stable::parallel_for;
  check_specs(p);
  prefer_huge_pages(out);
  const ViewsScratch needed = views_scratch(p);
  const int64_t bands = band_items(p);
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), bands);
  Tensor columns = empty(like, {needed.columns}, ScalarType::Byte),
         weights = empty(like, {needed.weights}, ScalarType::Int),
         scratch = empty(like, {workers * needed.band}, ScalarType::Byte);
  p.columns = columns.mutable_data_ptr<uint8_t>();
  p.weights = weights.mutable_data_ptr<int32_t>();
  p.max_taps = needed.max_taps;

  if (needed.columns)
    parallel_for(0, column_items(p), 1, [&](int64_t begin, int64_t end) { views_columns(p, begin, end); });
  parallel_for(0, p.views, 8, [&](int64_t begin, int64_t end) { views_weights(p, begin, end); });
  // Crops differ in size by a factor of ten.
  take_turns(workers, bands, [&](int64_t worker, int64_t band) {
    views_bands(p, scratch.mutable_data_ptr<uint8_t>() + worker * needed.band, band, band + 1);
  });
}

Tensor views_cpu(const Tensor& image, const Tensor& specs, const Tensor& table, int64_t height, int64_t width,
                 bool vertical_first, std::optional<int64_t> patch) {
  const Given given{image, specs, table, height, width, vertical_first, patch};
  check(given);
  return by_size(given, [&](auto& p, const Tensor& out) { run_on_cpu(p, image, out); });
}

#else
template <class T>
void run_on_cuda(ViewsParams<T>& p, const Tensor& like, const OnDevice& device) {
  p.max_taps = views_max_taps(p.height, p.width, p.view_height, p.view_width);
  p.at_once = views_at_once(p.max_taps, p.lines(), p.views);
  Tensor weights = empty(like, {p.at_once, 2, 2 + p.max_taps, p.lines()}, ScalarType::Int),
         pixels = empty(like, {p.height, p.width}, ScalarType::Int);
  p.weights = weights.mutable_data_ptr<int32_t>();
  p.pixels = static_cast<uint32_t*>(pixels.mutable_data_ptr());
  check_launch(launch_views(p, device.stream()), "views");
}

Tensor views_cuda(const Tensor& image, const Tensor& specs, const Tensor& table, int64_t height, int64_t width,
                  bool vertical_first, std::optional<int64_t> patch) {
  const Given given{image, specs, table, height, width, vertical_first, patch};
  check(given);
  const OnDevice device(image);
  check_device(specs, "specs", image);
  check_device(table, "table", image);
  return by_size(given, [&](auto& p, const Tensor&) { run_on_cuda(p, image, device); });
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) { m.impl("views", TORCH_BOX(&tpt_fast::views_cpu)); }
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) { m.impl("views", TORCH_BOX(&tpt_fast::views_cuda)); }
#endif
