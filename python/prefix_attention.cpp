#include "../csrc/prefix_attention.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "device.h"
#include "dispatch.h"

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

// Only the CPU can look at the offsets without waiting for a device.
template <class T>
void check_offsets(const PrefixAttentionParams<T>& p) {
  int64_t previous = p.offsets[0];
  STD_TORCH_CHECK(previous == p.prefix, "offsets: expected to start at the prefix, ", p.prefix, ", got ", previous);
  for (int64_t c = 1; c <= p.classes; ++c) {
    STD_TORCH_CHECK(p.offsets[c] > previous, "offsets: expected ascending, got ", p.offsets[c], " after ", previous);
    const int64_t keys = p.prefix + p.offsets[c] - previous;
    STD_TORCH_CHECK(keys <= kPrefixAttentionMaxKeys, "offsets: expected at most ", kPrefixAttentionMaxKeys,
                    " keys a query, got ", keys);
    previous = p.offsets[c];
  }
  STD_TORCH_CHECK(previous == p.rows, "offsets: expected to end at the number of rows, ", p.rows, ", got ", previous);
  STD_TORCH_CHECK(p.prefix <= kPrefixAttentionMaxKeys, "prefix: expected at most ", kPrefixAttentionMaxKeys, ", got ",
                  p.prefix);
}

void check_types(const Tensor& grad, const Tensor& kv, const Tensor& grad_q, const Tensor& grad_kv) {
  for (const auto& [t, name] : {std::pair{&grad, "grad"}, std::pair{&grad_q, "grad_q"}, std::pair{&grad_kv, "grad_kv"}})
    check_dtype(*t, name, {kv.scalar_type()});
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
  Tensor partial = empty(kv, {p.batch, p.blocks(), p.prefix, 2 * p.width}, accumulate_type(kv.scalar_type()));
  p.grad = static_cast<const T*>(grad.const_data_ptr());
  p.grad_q = static_cast<T*>(grad_q.mutable_data_ptr());
  p.grad_q_batch = grad_q.stride(0), p.grad_q_row = grad_q.stride(1);
  p.grad_kv = static_cast<T*>(grad_kv.mutable_data_ptr());
  p.grad_kv_batch = grad_kv.stride(0), p.grad_kv_row = grad_kv.stride(1);
  p.partial = partial.mutable_data_ptr<Accumulate<T>>();
  run(p);
}

const auto run_forward = [](const auto& p) {
  check_offsets(p);
  parallel_for(0, p.batch * (p.classes + 1), 4,
               [&](int64_t begin, int64_t end) { prefix_attention_forward(p, begin, end); });
};

const auto run_backward = [](const auto& p) {
  check_offsets(p);
  parallel_for(0, p.batch * p.blocks(), 1,
               [&](int64_t begin, int64_t end) { prefix_attention_backward_classes(p, begin, end); });
  parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) { prefix_attention_backward_prefix(p, begin, end); });
};

// The CPU kernels hold float and double. A key is read by every query that sees it, and its gradient is a sum over
// them: rows of 16 bits are widened once, before, and rounded once, after.
template <class T>
constexpr bool kNarrow = !std::is_same_v<T, Accumulate<T>>;

Tensor wide(const Tensor& t) { return torch::stable::to(t, accumulate_type(t.scalar_type())); }

Tensor forward_cpu(const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix, int64_t heads) {
  return with_type(kv, "kv", [&]<class T>(T) {
    if constexpr (!kNarrow<T>) return forward<T>(q, kv, offsets, prefix, heads, run_forward);
    check_dtype(q, "q", {kv.scalar_type()});
    return torch::stable::to(forward<Accumulate<T>>(wide(q), wide(kv), offsets, prefix, heads, run_forward),
                             kv.scalar_type());
  });
}

void backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& kv, const Tensor& offsets, int64_t prefix,
                  int64_t heads, Tensor grad_q, Tensor grad_kv) {
  check_types(grad, kv, grad_q, grad_kv);
  with_type(kv, "kv", [&]<class T>(T) {
    if constexpr (!kNarrow<T>) {
      backward<T>(grad, q, kv, offsets, prefix, heads, grad_q, grad_kv, run_backward);
    } else {
      check_dtype(q, "q", {kv.scalar_type()});
      Tensor wide_q = torch::stable::new_empty(q, grad_q.sizes(), ScalarType::Float);
      Tensor wide_kv = torch::stable::new_empty(kv, grad_kv.sizes(), ScalarType::Float);
      backward<float>(wide(grad), wide(q), wide(kv), offsets, prefix, heads, wide_q, wide_kv, run_backward);
      torch::stable::copy_(grad_q, wide_q);
      torch::stable::copy_(grad_kv, wide_kv);
    }
  });
}

#ifdef TPT_FAST_CUDA
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
  check_types(grad, kv, grad_q, grad_kv);
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

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&tpt_fast::forward_cpu));
  m.impl("prefix_attention_backward", TORCH_BOX(&tpt_fast::backward_cpu));
}
#ifdef TPT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CUDA, m) {
  m.impl("prefix_attention", TORCH_BOX(&tpt_fast::forward_cuda));
  m.impl("prefix_attention_backward", TORCH_BOX(&tpt_fast::backward_cuda));
}
#endif
