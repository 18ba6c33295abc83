#include "prefix_attention.h"

#include <algorithm>
#include <cmath>

#include "math.h"

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

template <class T, int kDim>
void forward(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / (p.classes + 1), c = item % (p.classes + 1);
    if (c == p.classes) {
      for (int64_t row = 0; row < p.prefix && !p.last_only; ++row) attend(p, head, b, row, {0, 0, row});
    } else if (p.last_only) {
      attend(p, head, b, c, {p.prefix, p.offsets[c], p.offsets[c + 1] - 1});
    } else {
      for (int64_t row = p.offsets[c]; row < p.offsets[c + 1]; ++row)
        attend(p, head, b, row, {p.prefix, p.offsets[c], row});
    }
  }
}

template <class T, int kDim>
void backward_classes(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t begin, int64_t end) {
  const int64_t blocks = p.blocks(), pair = 2 * p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks, first = item % blocks * kPrefixAttentionClassesAtOnce;
    const int64_t last = std::min(first + kPrefixAttentionClassesAtOnce, p.classes);
    T* shared = p.partial + item * p.prefix * pair;
    std::fill(shared, shared + p.prefix * pair, T(0));
    for (int64_t row = p.offsets[first]; row < p.offsets[last]; ++row) {
      T* own = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
      std::fill(own, own + pair, T(0));
    }
    for (int64_t c = first; c < last; ++c) {
      const int64_t start = p.offsets[c], stop = p.offsets[c + 1];
      for (int64_t row = p.last_only ? stop - 1 : start; row < stop; ++row)
        attend_backward(p, head, b, p.last_only ? c : row, {p.prefix, start, row}, shared, pair);
    }
  }
}

template <class T, int kDim>
void backward_prefix(const PrefixAttentionParams<T>& p, Head<T, kDim> head, int64_t begin, int64_t end) {
  const int64_t blocks = p.blocks(), pair = 2 * p.width;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t row = 0; row < p.prefix; ++row) {
      T* to = p.grad_kv + b * p.grad_kv_batch + row * p.grad_kv_row;
      std::fill(to, to + pair, T(0));
      for (int64_t block = 0; block < blocks; ++block) {
        const T* from = p.partial + ((b * blocks + block) * p.prefix + row) * pair;
#pragma omp simd
        for (int64_t i = 0; i < pair; ++i) to[i] += from[i];
      }
    }
    for (int64_t row = 0; row < p.prefix && !p.last_only; ++row)
      attend_backward(p, head, b, row, {0, 0, row}, static_cast<T*>(nullptr), 0);
  }
}

template <class T, class Run>
void with_head(const PrefixAttentionParams<T>& p, Run run) {
  const int64_t dim = p.width / p.heads;
  dim == 64 ? run(Head<T, 64>{dim}) : run(Head<T, 0>{dim});
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
#undef INSTANTIATE

}  // namespace tpt_fast
