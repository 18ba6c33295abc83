#include "prefix_attention.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "elementary.h"
#include "rows.h"

namespace tpt_fast {
namespace {

// The width of a head is known to the compiler where it is 64, as in every CLIP; then dot products stay in registers.
template <class T, int kDim>
struct Head {
  int64_t dim;
  int64_t size() const { return kDim ? kDim : dim; }

  T dot(const T* a, const T* b) const {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size(); ++i) sum += a[i] * b[i];
    return sum;
  }

  void add(T* to, T factor, const T* x) const {
#pragma omp simd
    for (int64_t i = 0; i < size(); ++i) to[i] += factor * x[i];
  }

  void clear(T* to) const { std::fill(to, to + size(), T(0)); }
};

// The keys of one query: rows 0..shared-1 and start..row, in this order.
struct Keys {
  int64_t shared, start, row;
  int64_t count() const { return shared + row + 1 - start; }
  int64_t at(int64_t j) const { return j < shared ? j : start + j - shared; }
};

// Scores -> probabilities of one query and head.
template <class T, int kDim>
void probabilities(Head<T, kDim> head, const T* q, const T* k, int64_t k_row, Keys keys, T* probs) {
  const int64_t count = keys.count();
  const T scale = T(1) / std::sqrt(static_cast<T>(head.size()));
  for (int64_t j = 0; j < count; ++j) probs[j] = scale * head.dot(q, k + keys.at(j) * k_row);
  const T largest = *std::max_element(probs, probs + count);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += probs[j] = exp_nonpositive(probs[j] - largest);
  const T inverse = T(1) / sum;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) probs[j] *= inverse;
}

template <class T, int kDim>
void attend(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t b, int64_t query, Keys keys) {
  T probs[kPrefixAttentionMaxKeys];
  const T *q = p.q + b * p.q_batch + query * p.q_row, *k = p.kv + b * p.kv_batch, *v = k + p.width;
  T* out = p.out + (b * p.queries() + query) * p.width;
  for (int64_t at = 0; at < p.width; at += head.size()) {
    probabilities(head, q + at, k + at, p.kv_row, keys, probs);
    head.clear(out + at);
    for (int64_t j = 0; j < keys.count(); ++j) head.add(out + at, probs[j], v + at + keys.at(j) * p.kv_row);
  }
}

// Gradients of one query's row: grad_q is written, those of its keys and values are added to; `shared` [prefix,
// 2 * width] takes those of the keys in the prefix.
template <class T, int kDim>
void attend_backward(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t b, int64_t query, Keys keys,
                     T* shared, int64_t shared_row) {
  T probs[kPrefixAttentionMaxKeys], slope[kPrefixAttentionMaxKeys];
  const int64_t width = p.width, count = keys.count();
  const T *q = p.q + b * p.q_batch + query * p.q_row, *k = p.kv + b * p.kv_batch, *v = k + width;
  const T* grad = p.grad + (b * p.queries() + query) * width;
  T* grad_q = p.grad_q + b * p.grad_q_batch + query * p.grad_q_row;
  T* own = p.grad_kv + b * p.grad_kv_batch;
  const T scale = T(1) / std::sqrt(static_cast<T>(head.size()));
  for (int64_t at = 0; at < width; at += head.size()) {
    probabilities(head, q + at, k + at, p.kv_row, keys, probs);
    T along = 0;
    for (int64_t j = 0; j < count; ++j) {
      slope[j] = head.dot(grad + at, v + at + keys.at(j) * p.kv_row);
      along += probs[j] * slope[j];
    }
    head.clear(grad_q + at);
    for (int64_t j = 0; j < count; ++j) {
      const T s = scale * probs[j] * (slope[j] - along);
      T* grad_k = (j < keys.shared ? shared + j * shared_row : own + keys.at(j) * p.grad_kv_row) + at;
      head.add(grad_q + at, s, k + at + keys.at(j) * p.kv_row);
      head.add(grad_k, s, q + at);
      head.add(grad_k + width, probs[j], grad + at);
    }
  }
}

// The next three are not inlined, so that float and the 16-bit types share their code, which takes long to compile.

// All queries of class c, or of the prefix where c is the number of classes.
template <class T, int kDim>
[[gnu::noinline]] void attend_class(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t b, int64_t c) {
  if (c == p.classes) {
    for (int64_t row = 0; row < p.prefix && !p.last_only; ++row) attend(p, head, b, row, {0, 0, row});
  } else if (p.last_only) {
    attend(p, head, b, c, {p.prefix, p.offsets[c], p.offsets[c + 1] - 1});
  } else {
    for (int64_t row = p.offsets[c]; row < p.offsets[c + 1]; ++row)
      attend(p, head, b, row, {p.prefix, p.offsets[c], row});
  }
}

// Writes grad_q and grad_kv of the class's rows, and adds to `shared` [prefix, 2 * width].
template <class T, int kDim>
[[gnu::noinline]] void class_backward(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t b, int64_t c,
                                      T* shared) {
  const int64_t pair = 2 * p.width, start = p.offsets[c], stop = p.offsets[c + 1];
  for (int64_t row = start; row < stop; ++row) {
    T* own = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
    std::fill(own, own + pair, T(0));
  }
  for (int64_t row = p.last_only ? stop - 1 : start; row < stop; ++row)
    attend_backward(p, head, b, p.last_only ? c : row, {p.prefix, start, row}, shared, pair);
}

// Writes grad_q and grad_kv of the prefix's rows; `partial` [blocks, prefix, 2 * width] comes from the classes.
template <class T, int kDim>
[[gnu::noinline]] void prefix_backward(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t b,
                                       const T* partial, int64_t blocks) {
  const int64_t pair = 2 * p.width;
  for (int64_t row = 0; row < p.prefix; ++row) {
    T* to = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
    std::fill(to, to + pair, T(0));
    for (int64_t block = 0; block < blocks; ++block) {
      const T* from = partial + (block * p.prefix + row) * pair;
#pragma omp simd
      for (int64_t i = 0; i < pair; ++i) to[i] += from[i];
    }
  }
  for (int64_t row = 0; row < p.prefix && !p.last_only; ++row)
    attend_backward(p, head, b, row, {0, 0, row}, static_cast<T*>(nullptr), 0);
}

// Calls run(parameters, b, c) to compute class c, or the prefix where c is the number of classes. With 16-bit rows, the
// parameters are those of a batch with this class alone, in p.wide: a key is read by every query that sees it, and its
// gradient is a sum over them, so rows are widened once and rounded once.
template <class T>
class Classes {
 public:
  using A = Accumulate<T>;

  explicit Classes(const PrefixAttentionParams<T>& p) : p_(p) {}

  template <class Run>
  void visit(int64_t b, int64_t c, Run run) {
    if constexpr (std::is_same_v<T, A>) {
      run(p_, b, c);
    } else {
      const bool is_class = c < p_.classes;
      const int64_t start = is_class ? p_.offsets[c] : 0, count = is_class ? p_.offsets[c + 1] - start : p_.prefix;
      const Span own{start, is_class ? p_.prefix : 0, count};
      const Span queries = !p_.last_only ? own : is_class ? Span{c, 0, 1} : Span{0, 0, 0};
      const int64_t width = p_.width, pair = 2 * width, rows = own.to + count, offsets[] = {p_.prefix, rows};
      A *kv = p_.wide, *q = kv + rows * pair, *out = q + rows * width;  // or the gradient of out
      PrefixAttentionParams<A> one{};
      one.q = q, one.q_row = width;
      one.kv = kv, one.kv_row = pair;
      one.offsets = offsets;
      one.out = out, one.grad = out;
      one.grad_q = out + rows * width, one.grad_q_row = width;
      one.grad_kv = one.grad_q + rows * width, one.grad_kv_row = pair;
      one.rows = rows, one.prefix = p_.prefix, one.classes = is_class, one.width = width, one.heads = p_.heads;
      one.batch = 1, one.last_only = p_.last_only;

      const T* kvs = p_.kv + b * p_.kv_batch;
      if (b != batch_) widen_rows({0, 0, p_.prefix}, kvs, p_.kv_row, kv, pair);
      batch_ = b;  // the prefix stays in its place from class to class
      if (is_class) widen_rows(own, kvs, p_.kv_row, kv, pair);
      widen_rows(queries, p_.q + b * p_.q_batch, p_.q_row, q, width);
      const int64_t dense = b * p_.queries() * width;
      const bool backward = p_.grad_kv != nullptr;
      if (backward) widen_rows(queries, p_.grad + dense, width, out, width);
      run(one, 0, 0);
      if (!backward) return narrow_rows(queries, out, width, p_.out + dense, width);
      narrow_rows(queries, one.grad_q, width, p_.grad_q + b * p_.grad_q_batch, p_.grad_q_row);
      narrow_rows(own, one.grad_kv, pair, p_.grad_kv + b * p_.grad_kv_batch, p_.grad_kv_row);
    }
  }

 private:
  // Rows from.. of the 16-bit tensors, to.. of the wide ones.
  struct Span {
    int64_t from, to, count;
  };

  static void widen_rows(Span span, const T* from, int64_t from_row, A* to, int64_t width) {
    for (int64_t i = 0; i < span.count; ++i)
      widen_row(from + (span.from + i) * from_row, to + (span.to + i) * width, width);
  }

  static void narrow_rows(Span span, const A* from, int64_t width, T* to, int64_t to_row) {
    for (int64_t i = 0; i < span.count; ++i)
      narrow_row(from + (span.to + i) * width, to + (span.from + i) * to_row, width);
  }

  const PrefixAttentionParams<T>& p_;
  int64_t batch_ = -1;
};

template <class T, class H>
void forward(const PrefixAttentionParams<T>& p, H head, int64_t begin, int64_t end) {
  Classes<T> classes(p);
  for (int64_t item = begin; item < end; ++item) {
    classes.visit(item / (p.classes + 1), item % (p.classes + 1),
                  [&](const auto& wide, int64_t b, int64_t c) { attend_class(wide, head, b, c); });
  }
}

template <class T, class H>
void backward_classes(const PrefixAttentionParams<T>& p, H head, int64_t begin, int64_t end) {
  Classes<T> classes(p);
  const int64_t blocks = p.blocks(), size = p.prefix * 2 * p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % blocks * kPrefixAttentionClassesAtOnce;
    const int64_t last = std::min(first + kPrefixAttentionClassesAtOnce, p.classes);
    auto* shared = p.partial + item * size;
    std::fill(shared, shared + size, Accumulate<T>(0));
    for (int64_t c = first; c < last; ++c) {
      classes.visit(item / blocks, c,
                    [&](const auto& wide, int64_t b, int64_t c) { class_backward(wide, head, b, c, shared); });
    }
  }
}

template <class T, class H>
void backward_prefix(const PrefixAttentionParams<T>& p, H head, int64_t begin, int64_t end) {
  Classes<T> classes(p);
  const int64_t blocks = p.blocks(), size = blocks * p.prefix * 2 * p.width;
  for (int64_t b = begin; b < end; ++b) {
    classes.visit(b, p.classes, [&](const auto& wide, int64_t at, int64_t) {
      prefix_backward(wide, head, at, p.partial + b * size, blocks);
    });
  }
}

template <class T, class Run>
void with_head(const PrefixAttentionParams<T>& p, Run run) {
  const int64_t dim = p.width / p.heads;
  using A = Accumulate<T>;
  dim == 64 ? run(Head<A, 64>{dim}) : run(Head<A, 0>{dim});
}

}  // namespace

template <class T>
void prefix_attention_forward(const PrefixAttentionParams<T>& p, int64_t begin, int64_t end) {
  with_head(p, [&](auto head) { forward(p, head, begin, end); });
}

template <class T>
void prefix_attention_backward_classes(const PrefixAttentionParams<T>& p, int64_t begin, int64_t end) {
  with_head(p, [&](auto head) { backward_classes(p, head, begin, end); });
}

template <class T>
void prefix_attention_backward_prefix(const PrefixAttentionParams<T>& p, int64_t begin, int64_t end) {
  with_head(p, [&](auto head) { backward_prefix(p, head, begin, end); });
}

#define INSTANTIATE(T)                                                                                \
  template void prefix_attention_forward(const PrefixAttentionParams<T>&, int64_t, int64_t);          \
  template void prefix_attention_backward_classes(const PrefixAttentionParams<T>&, int64_t, int64_t); \
  template void prefix_attention_backward_prefix(const PrefixAttentionParams<T>&, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
#undef INSTANTIATE

}  // namespace tpt_fast
