#include "../csrc/augmix.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../csrc/half.h"
#include "checks.h"
#include "device.h"
#include "grain.h"
#include "huge_pages.h"
#include "patch.h"

namespace tpt_fast {
namespace {

struct Given {
  const Tensor &crops, &steps, &parameters, &weights, &table, &out;
  std::optional<int64_t> patch;
};

void check(const Given& given) {
  const auto& [crops, steps, parameters, weights, table, out, patch] = given;
  check_shape(crops, "crops", {-1, 3, -1, -1});
  check_dtype(crops, "crops", {ScalarType::Byte});
  const int64_t views = crops.size(0), height = crops.size(2), width = crops.size(3);
  check_range(height, "height", 1, 1 << 15);
  check_range(width, "width", 1, 1 << 15);
  check_shape(steps, "steps", {views, kChains, -1});
  check_dtype(steps, "steps", {ScalarType::Int});
  check_shape(parameters, "parameters", {views, kChains, steps.size(2), kParameters});
  check_dtype(parameters, "parameters", {ScalarType::Double});
  check_shape(weights, "weights", {views, 1 + kChains});
  check_dtype(weights, "weights", {ScalarType::Float});
  check_shape(table, "table", {3, 256});
  check_dtype(table, "table", {ScalarType::Float});
  check_patch(height, width, patch);
  if (patch) {
    check_shape(out, "out", {views, height / *patch * (width / *patch), 3 * *patch * *patch});
  } else {
    check_shape(out, "out", {views, 3, height, width});
  }
  check_dtype(out, "out", {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  for (const Tensor* other : {&steps, &parameters, &weights, &table, &out})
    STD_TORCH_CHECK(other->is_cuda() == crops.is_cuda(), "crops: expected all tensors on one device");
}

// Fills the parameters; `run` computes.
template <class T, class Run>
void augmix(const Given& given, Run run) {
  const Tensor crops = torch::stable::contiguous(given.crops), steps = torch::stable::contiguous(given.steps),
               parameters = torch::stable::contiguous(given.parameters),
               weights = torch::stable::contiguous(given.weights), table = torch::stable::contiguous(given.table);
  AugmixParams<T> p{};
  p.crops = crops.const_data_ptr<uint8_t>();
  p.steps = steps.const_data_ptr<int32_t>();
  p.parameters = parameters.const_data_ptr<double>();
  p.weights = weights.const_data_ptr<float>();
  p.table = table.const_data_ptr<float>();
  p.out = static_cast<T*>(given.out.mutable_data_ptr());
  p.views = crops.size(0);
  p.depth = steps.size(2);
  p.height = crops.size(2);
  p.width = crops.size(3);
  p.layout = layout_of(p.height, p.width, given.patch);
  run(p);
}

template <class Run>
void by_type(const Given& given, Run run) {
  switch (given.out.scalar_type()) {
    case ScalarType::Half:
      return augmix<Half>(given, run);
    case ScalarType::BFloat16:
      return augmix<BFloat16>(given, run);
    default:
      return augmix<float>(given, run);
  }
}

#ifndef TPT_FAST_CUDA
// Only the CPU can look at the steps without waiting for a device.
void check_steps(const AugmixGeometry& p) {
  for (int64_t i = 0; i < p.views * kChains * p.depth; ++i) {
    const int64_t place = i % p.depth, chain = i / p.depth % kChains, view = i / p.depth / kChains;
    STD_TORCH_CHECK(p.steps[i] >= kNothing && p.steps[i] < kAugmixSteps, "steps: expected 0 to ", kAugmixSteps - 1,
                    ", got ", p.steps[i], " in step ", place, " of chain ", chain, " of view ", view);
    const double bits = p.parameters[i * kParameters];
    STD_TORCH_CHECK(p.steps[i] != kPosterize || (bits >= 0.0 && bits <= 8.0),
                    "parameters: expected 0 to 8 bits to posterize to, got ", bits, " in step ", place, " of chain ",
                    chain, " of view ", view);
  }
}

template <class T>
void run_on_cpu(const AugmixParams<T>& p, const Tensor& like) {
  constexpr double kPixel = 20.0;  // nanoseconds, of all three channels
  check_steps(p);
  const int64_t least = grain(kPixel * p.pixels());
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(p.views, least));
  const int64_t of_one = augmix_scratch(p);
  Tensor scratch = empty(like, {workers * of_one}, ScalarType::Byte);
  take_turns(workers, p.views, [&](int64_t worker, int64_t view) {
    augmix_views(p, scratch.mutable_data_ptr<uint8_t>() + worker * of_one, view, view + 1);
  });
}

void augmix_cpu(const Tensor& crops, const Tensor& steps, const Tensor& parameters, const Tensor& weights,
                const Tensor& table, Tensor out, std::optional<int64_t> patch) {
  const Given given{crops, steps, parameters, weights, table, out, patch};
  check(given);
  prefer_huge_pages(out);
  by_type(given, [&](const auto& p) { run_on_cpu(p, crops); });
}

#else
template <class T>
void run_on_cuda(AugmixParams<T>& p, const Tensor& like, const OnDevice& device) {
  p.at_once = augmix_at_once(p.pixels(), p.views);
  Tensor images = empty(like, {p.at_once, kChains, 2, 3, p.height, p.width}, ScalarType::Byte),
         ends = empty(like, {p.at_once, kChains, 3 * 256 + 1}, ScalarType::Byte);
  p.images = images.mutable_data_ptr<uint8_t>();
  p.ends = ends.mutable_data_ptr<uint8_t>();
  check_launch(launch_augmix(p, device.stream()), "augmix");
}

void augmix_cuda(const Tensor& crops, const Tensor& steps, const Tensor& parameters, const Tensor& weights,
                 const Tensor& table, Tensor out, std::optional<int64_t> patch) {
  const Given given{crops, steps, parameters, weights, table, out, patch};
  check(given);
  const OnDevice device(out);
  check_device(steps, "steps", crops);
  check_device(parameters, "parameters", crops);
  check_device(weights, "weights", crops);
  check_device(table, "table", crops);
  check_device(out, "out", crops);
  by_type(given, [&](auto& p) { run_on_cuda(p, crops, device); });
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) { m.impl("augmix", TORCH_BOX(&tpt_fast::augmix_cpu)); }
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) { m.impl("augmix", TORCH_BOX(&tpt_fast::augmix_cuda)); }
#endif
