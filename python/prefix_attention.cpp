#include "../csrc/prefix_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "device.h"
#include "dispatch.h"
#include "grain.h"

namespace tpt_fast {
namespace {

using torch::stable::parallel_for;

// A row dimension may have any stride, the elements of a row are dense.
void check_dense_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(-1) <= 1 || t.stride(-1) == 1, name, ": expected a dense last dimension, got stride ",
                  t.stride(-1));
}

// Checks the arguments that both passes share; the pointers only the backward pass has stay null.
template <class T>
PrefixAttentionParams<T> params(const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix,
                                int64_t heads) {
  STD_TORCH_CHECK(q.dim() == 3, "q: expected [B, R or C, W], got ", shape_string(q));
  const int64_t batch = q.size(0), width = q.size(2), classes = offsets.numel() - 1;
  check_shape(kv, "kv", {batch, -1, 2 * width});
  check_dtype(q, "q", {kv.scalar_type()});
  check_dtype(offsets, "offsets", {ScalarType::Long});
  check_range(classes, "number of classes", 0, kv.size(1));
  check_range(prefix, "prefix", 0, kv.size(1));
  STD_TORCH_CHECK(heads >= 1 && width % heads == 0, "heads: expected a divisor of the width ", width, ", got ", heads);
  const int64_t rows = kv.size(1);
  STD_TORCH_CHECK(q.size(1) == rows || q.size(1) == classes, "q: expected ", rows, " or ", classes, " rows, got ",
                  shape_string(q));
  check_dense_rows(q, "q");
  check_dense_rows(kv, "kv");
  PrefixAttentionParams<T> p{};
  p.q = static_cast<const T*>(q.const_data_ptr()), p.q_batch = q.stride(0), p.q_row = q.stride(1);
  p.kv = static_cast<const T*>(kv.const_data_ptr()), p.kv_batch = kv.stride(0), p.kv_row = kv.stride(1);
  p.offsets = offsets.const_data_ptr<int64_t>();
  p.batch = batch, p.rows = rows, p.prefix = prefix, p.classes = classes, p.width = width, p.heads = heads;
  p.last_only = q.size(1) != rows;
  return p;
}

// Returns the most keys that a query has. Only the CPU can look at the offsets without waiting for a device.
template <class T>
int64_t check_offsets(const PrefixAttentionParams<T>& p) {
  int64_t previous = p.offsets[0], most = p.prefix;
  STD_TORCH_CHECK(previous == p.prefix, "offsets: expected to start at the prefix, ", p.prefix, ", got ", previous);
  for (int64_t c = 1; c <= p.classes; ++c) {
    STD_TORCH_CHECK(p.offsets[c] > previous, "offsets: expected ascending, got ", p.offsets[c], " after ", previous);
    const int64_t keys = p.prefix + p.offsets[c] - previous;
    STD_TORCH_CHECK(keys <= kPrefixAttentionMaxKeys, "offsets: expected at most ", kPrefixAttentionMaxKeys,
                    " keys a query, got ", keys);
    most = std::max(most, keys);
    previous = p.offsets[c];
  }
  STD_TORCH_CHECK(previous == p.rows, "offsets: expected to end at the number of rows, ", p.rows, ", got ", previous);
  STD_TORCH_CHECK(p.prefix <= kPrefixAttentionMaxKeys, "prefix: expected at most ", kPrefixAttentionMaxKeys, ", got ",
                  p.prefix);
  return most;
}

// Both fill the parameters and allocate; `run` looks at the offsets if it can, and computes.
template <class T, class Run>
Tensor forward(const Tensor& q, const Tensor& kv, const Tensor& offsets_in, int64_t prefix, int64_t heads, Run run) {
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  PrefixAttentionParams<T> p = params<T>(q, kv, offsets, prefix, heads);
  Tensor out = empty(q, {p.batch, p.queries(), p.width}, q.scalar_type());
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run(p);
  return out;
}

template <class T, class Run>
void backward(const Tensor& grad_in, const Tensor& q, const Tensor& kv, const Tensor& offsets_in, int64_t prefix,
              int64_t heads, Tensor& grad_q, Tensor& grad_kv, Run run) {
  const Tensor offsets = torch::stable::contiguous(offsets_in), grad = torch::stable::contiguous(grad_in);
  PrefixAttentionParams<T> p = params<T>(q, kv, offsets, prefix, heads);
  check_shape(grad, "grad", {p.batch, p.queries(), p.width});
  check_shape(grad_q, "grad_q", {p.batch, p.queries(), p.width});
  check_shape(grad_kv, "grad_kv", {p.batch, p.rows, 2 * p.width});
  check_dense_rows(grad_q, "grad_q");
  check_dense_rows(grad_kv, "grad_kv");
  for (const auto& [t, name] : {std::pair{&grad, "grad"}, std::pair{&std::as_const(grad_q), "grad_q"},
                                std::pair{&std::as_const(grad_kv), "grad_kv"}})
    check_dtype(*t, name, {kv.scalar_type()});
  Tensor partial = empty(kv, {p.batch, p.blocks(), p.prefix, 2 * p.width}, accumulate_type(kv.scalar_type()));
  p.grad = static_cast<const T*>(grad.const_data_ptr());
  p.grad_q = static_cast<T*>(grad_q.mutable_data_ptr());
  p.grad_q_batch = grad_q.stride(0), p.grad_q_row = grad_q.stride(1);
  p.grad_kv = static_cast<T*>(grad_kv.mutable_data_ptr());
  p.grad_kv_batch = grad_kv.stride(0), p.grad_kv_row = grad_kv.stride(1);
  p.partial = partial.mutable_data_ptr<Accumulate<T>>();
  run(p);
}

#ifndef TPT_FAST_CUDA
// Runs a range function over `items`; `keys` is the most that a query has. Each range gets scratch memory of its own.
template <class T, class Kernel>
void over(const PrefixAttentionParams<T>& p, int64_t keys, int64_t items, int64_t at_once, Kernel kernel) {
  parallel_for(0, items, at_once, [&](int64_t begin, int64_t end) {
    std::vector<Accumulate<T>> wide(std::is_same_v<T, Accumulate<T>> ? 0 : keys * 7 * p.width);
    PrefixAttentionParams<T> own = p;
    own.wide = wide.data();
    kernel(own, begin, end);
  });
}

// Nanoseconds of one class's queries, whose keys are `keys` at most; most of it in two products.
template <class T>
double time_of_class(const PrefixAttentionParams<T>& p, int64_t keys) {
  const double queries = p.last_only ? 1 : double(p.rows - p.prefix) / std::max<int64_t>(p.classes, 1);
  return 4 * kOperation * queries * keys * p.width;
}

const auto run_forward = []<class T>(const PrefixAttentionParams<T>& p) {
  const int64_t keys = check_offsets(p);
  over(p, keys, p.batch * (p.classes + 1), grain(time_of_class(p, keys)), prefix_attention_forward<T>);
};

const auto run_backward = []<class T>(const PrefixAttentionParams<T>& p) {
  const int64_t keys = check_offsets(p);
  const double time = 3 * kPrefixAttentionClassesAtOnce * time_of_class(p, keys);
  over(p, keys, p.batch * p.blocks(), grain(time), prefix_attention_backward_classes<T>);
  over(p, keys, p.batch, 1, prefix_attention_backward_prefix<T>);
};

Tensor forward_cpu(const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix, int64_t heads) {
  return with_type(kv, "kv", [&]<class T>(T) { return forward<T>(q, kv, offsets, prefix, heads, run_forward); });
}

void backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix,
                  int64_t heads, Tensor grad_q, Tensor grad_kv) {
  with_type(kv, "kv",
            [&]<class T>(T) { backward<T>(grad, q, kv, offsets, prefix, heads, grad_q, grad_kv, run_backward); });
}

#else
Tensor forward_cuda(const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix, int64_t heads) {
  const OnDevice device(q);
  for (const Tensor* t : {&kv, &offsets}) check_device(*t, "kv and offsets", q);
  const auto run = [&](const auto& p) {
    check_launch(launch_prefix_attention(p, device.stream()), "prefix_attention");
  };
  return with_type(kv, "kv", [&]<class T>(T) { return forward<T>(q, kv, offsets, prefix, heads, run); });
}

void backward_cuda(const Tensor& grad, const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix,
                   int64_t heads, Tensor grad_q, Tensor grad_kv) {
  const OnDevice device(q);
  for (const Tensor* t : {&grad, &kv, &offsets, &std::as_const(grad_q), &std::as_const(grad_kv)})
    check_device(*t, "grad, kv, offsets, grad_q and grad_kv", q);
  const auto run = [&]<class T>(PrefixAttentionParams<T> p) {
    Tensor stats = empty(kv, {p.batch, p.heads, p.queries(), 2}, accumulate_type(kv.scalar_type()));
    p.stats = stats.mutable_data_ptr<Accumulate<T>>();
    check_launch(launch_prefix_attention_backward(p, device.stream()), "prefix_attention_backward");
  };
  with_type(kv, "kv", [&]<class T>(T) { backward<T>(grad, q, kv, offsets, prefix, heads, grad_q, grad_kv, run); });
}
#endif

}  // namespace
}  // namespace tpt_fast

#ifndef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&tpt_fast::forward_cpu));
  m.impl("prefix_attention_backward", TORCH_BOX(&tpt_fast::backward_cpu));
}
#else
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) {
  m.impl("prefix_attention", TORCH_BOX(&tpt_fast::forward_cuda));
  m.impl("prefix_attention_backward", TORCH_BOX(&tpt_fast::backward_cuda));
}
#endif
