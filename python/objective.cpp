#include "../csrc/objective.h"

#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>
#include <tuple>

#include "device.h"
#include "dispatch.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Checks, allocates and fills the parameters; `run` computes.
template <class T, class Run>
Outputs objective(const Tensor& logits_in, int64_t n_selected, const std::optional<Tensor>& selected_in, Run run) {
  const bool batched = logits_in.dim() == 3;
  STD_TORCH_CHECK(batched || logits_in.dim() == 2, "logits: expected [N, C] or [B, N, C], got ",
                  shape_string(logits_in));
  const Tensor logits = torch::stable::contiguous(logits_in);
  const int64_t batch = batched ? logits.size(0) : 1, views = logits.size(-2), classes = logits.size(-1);
  STD_TORCH_CHECK(classes >= 1, "logits: expected at least one class, got ", shape_string(logits));
  check_range(n_selected, "n_selected", 1, views);

  const ScalarType dtype = logits.scalar_type();
  Tensor selected = empty(logits, {batch, n_selected}, ScalarType::Long);
  if (selected_in) {
    check_dtype(*selected_in, "selected", {ScalarType::Long});
    STD_TORCH_CHECK(selected_in->numel() == batch * n_selected, "selected: expected ", batch, " x ", n_selected,
                    " indices, got ", shape_string(*selected_in));
    torch::stable::copy_(selected, torch::stable::reshape(*selected_in, {batch, n_selected}));
  }
  Tensor entropy = empty(logits, {batch, views}, dtype), loss = empty(logits, {batch}, dtype),
         grad = empty(logits, {batch, n_selected, classes}, dtype), shift = empty(logits, {batch, views, 2}, dtype),
         log_mean = empty(logits, {batch, classes}, dtype);

  run(ObjectiveParams<T>{logits.const_data_ptr<T>(), entropy.mutable_data_ptr<T>(), shift.mutable_data_ptr<T>(),
                         selected.mutable_data_ptr<int64_t>(), log_mean.mutable_data_ptr<T>(),
                         loss.mutable_data_ptr<T>(), grad.mutable_data_ptr<T>(), batch, views, classes, n_selected,
                         !selected_in.has_value()});
  if (!batched) {
    using torch::stable::select;
    return {select(entropy, 0, 0), select(selected, 0, 0), select(loss, 0, 0), select(grad, 0, 0)};
  }
  return {entropy, selected, loss, grad};
}

#ifndef TPT_FAST_CUDA
template <class T>
Outputs on_cpu(const Tensor& logits, int64_t n_selected, const std::optional<Tensor>& selected) {
  if (selected) {  // only the CPU can look at the indices without waiting for a device
    const Tensor indices = torch::stable::contiguous(*selected);
    check_dtype(indices, "selected", {ScalarType::Long});
    for (int64_t i = 0; i < indices.numel(); ++i)
      check_range(indices.const_data_ptr<int64_t>()[i], "selected", 0, logits.size(-2) - 1);
  }
  return objective<T>(logits, n_selected, selected, [](const ObjectiveParams<T>& p) {
    torch::stable::parallel_for(0, p.batch * p.views, grain(kExponential * p.classes),
                                [&](int64_t begin, int64_t end) { objective_rows(p, begin, end); });
    torch::stable::parallel_for(0, p.batch, grain(3 * kExponential * p.n_selected * p.classes),
                                [&](int64_t begin, int64_t end) { objective_images(p, begin, end); });
  });
}

Outputs objective_cpu(const Tensor& logits, int64_t n_selected, std::optional<Tensor> selected) {
  return with_wide_type(logits, "logits", [&]<class T>(T) { return on_cpu<T>(logits, n_selected, selected); });
}

#else
// Counters that are zero, and what keeps their memory. Launches leave them so, and launches on one stream follow each
// other, so one set a stream will do. A graph may be replayed on any stream, but never beside itself: each launch in
// one takes counters for good, of those that the first eager call on the device has zeroed, to spare replays a launch.
// Who destroys a stream of his own has to wait for its work first: another may get its handle, and with that its
// counters.
struct Counters {
  Tensor held;
  uint32_t* first;
};

Counters zero_counters(const Tensor& like, int64_t count, const OnDevice& device) {
  struct Reserve {
    Tensor zeros;
    int64_t taken = 0;
  };
  constexpr int64_t kReserve = 4096;
  static std::mutex mutex;
  // Never destroyed: torch may be gone before this library's destructors run.
  static auto& of_stream = *new std::map<std::pair<int32_t, cudaStream_t>, Tensor>;
  static auto& reserves = *new std::map<int32_t, Reserve>;
  const auto zeros = [&](int64_t n) { return torch::stable::new_zeros(like, {n}, ScalarType::Int); };
  const auto counters = [](Tensor held, int64_t first = 0) {
    auto* data = static_cast<uint32_t*>(held.mutable_data_ptr());
    return Counters{std::move(held), data + first};
  };
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(device.stream(), &capturing), "objective");
  const std::lock_guard lock(mutex);
  Reserve& reserve = reserves[device.index()];
  if (capturing != cudaStreamCaptureStatusNone) {
    if (!reserve.zeros.defined() || reserve.taken + count > kReserve) return counters(zeros(count));
    reserve.taken += count;
    return counters(reserve.zeros, reserve.taken - count);
  }
  if (!reserve.zeros.defined()) reserve.zeros = zeros(kReserve);
  if (device.stream() == cudaStreamPerThread) return counters(zeros(count));  // one handle for a stream of each thread
  Tensor& own = of_stream[{device.index(), device.stream()}];
  if (!own.defined() || own.numel() < count) own = zeros(count);
  return counters(own);
}

template <class T>
Outputs on_cuda(const Tensor& logits, int64_t n_selected, const std::optional<Tensor>& selected) {
  const OnDevice device(logits);
  if (selected) check_device(*selected, "selected", logits);
  return objective<T>(logits, n_selected, selected, [&](ObjectiveParams<T> p) {
    const int64_t needed = objective_shared_bytes(p), room = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    STD_TORCH_CHECK(needed <= room, "n_selected: keeping ", p.n_selected, " of ", p.views, " views takes ", needed,
                    " bytes of shared memory, CUDA device ", device.index(), " has ", room,
                    "; keep fewer views, or compute the objective on the CPU");
    const Counters arrived = zero_counters(logits, p.batch, device);
    p.arrived = arrived.first;
    check_launch(launch_objective(p, device.stream()), "objective");
  });
}

Outputs objective_cuda(const Tensor& logits, int64_t n_selected, std::optional<Tensor> selected) {
  return with_wide_type(logits, "logits", [&]<class T>(T) { return on_cuda<T>(logits, n_selected, selected); });
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) { m.impl("objective", TORCH_BOX(&tpt_fast::objective_cpu)); }
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) { m.impl("objective", TORCH_BOX(&tpt_fast::objective_cuda)); }
#endif
