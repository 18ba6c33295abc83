#include "objective.h"

#include <algorithm>
#include <limits>

#include "elementary.h"

namespace tpt_fast {
namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLowest = std::numeric_limits<T>::lowest();
constexpr int64_t kBlock = 128;  // classes whose sums over the views stay in registers and the first cache

template <class T>
void select(const T* entropy, int64_t views, int64_t* selected, int64_t count) {
  // Insertion into a short sorted list: K is a tenth of N, and no scratch memory is needed.
  int64_t held = 0;
  for (int64_t view = 0; view < views; ++view) {
    if (held == count && !precedes(entropy, view, selected[held - 1])) continue;
    int64_t at = held < count ? held++ : held - 1;
    for (; at > 0 && precedes(entropy, view, selected[at - 1]); --at) selected[at] = selected[at - 1];
    selected[at] = view;
  }
}

}  // namespace

template <class T>
void objective_rows(const ObjectiveParams<T>& p, int64_t begin, int64_t end) {
  const int64_t classes = p.classes;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.logits + row * classes;
    T largest = -kInfinity<T>;
#pragma omp simd reduction(max : largest)
    for (int64_t c = 0; c < classes; ++c) largest = x[c] > largest ? x[c] : largest;
    // A NaN loses every comparison above, but it poisons the sums here, as does inf - inf.
    T sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t c = 0; c < classes; ++c) {
      const T shifted = x[c] - largest;
      const T e = exp_nonpositive(shifted);
      sum += e;
      weighted += shifted == -kInfinity<T> ? T(0) : e * shifted;
    }
    const T log_sum = std::log(sum);
    p.entropy[row] = log_sum - weighted / sum;
    p.shift[2 * row] = largest;
    p.shift[2 * row + 1] = log_sum;
  }
}

template <class T>
void objective_images(const ObjectiveParams<T>& p, int64_t begin, int64_t end) {
  const int64_t classes = p.classes, kept = p.n_selected;
  const T inverse_kept = T(1) / static_cast<T>(kept), log_kept = std::log(static_cast<T>(kept));
  for (int64_t image = begin; image < end; ++image) {
    int64_t* selected = p.selected + image * kept;
    if (p.reselect) select(p.entropy + image * p.views, p.views, selected, kept);
    T* log_mean = p.log_mean + image * classes;
    T* grad = p.grad + image * kept * classes;

    // The gradient's rows hold log-probabilities first, log_mean their maximum over the kept views.
    std::fill(log_mean, log_mean + classes, kLowest<T>);
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t row = image * p.views + selected[k];
      const T *x = p.logits + row * classes, largest = p.shift[2 * row], log_sum = p.shift[2 * row + 1];
      T* log_prob = grad + k * classes;
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c) {
        log_prob[c] = (x[c] - largest) - log_sum;
        log_mean[c] = log_prob[c] > log_mean[c] ? log_prob[c] : log_mean[c];
      }
    }

    T loss = 0;
    for (int64_t first = 0; first < classes; first += kBlock) {
      const int64_t count = std::min(kBlock, classes - first);
      T sum[kBlock] = {};
      for (int64_t k = 0; k < kept; ++k) {
        const T* log_prob = grad + k * classes + first;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) sum[c] += exp_nonpositive(log_prob[c] - log_mean[first + c]);
      }
      for (int64_t c = 0; c < count; ++c) {
        const T log_q = log_mean[first + c] + std::log(sum[c]) - log_kept;
        log_mean[first + c] = log_q < kLowest<T> ? kLowest<T> : log_q;
      }
#pragma omp simd reduction(- : loss)
      for (int64_t c = first; c < first + count; ++c)
        loss -= exp_nonpositive(std::min(log_mean[c], T(0))) * log_mean[c];
    }
    p.loss[image] = loss;

    for (int64_t k = 0; k < kept; ++k) {
      T* row = grad + k * classes;
      T cross = 0;  // sum_j p_j log q_j
#pragma omp simd reduction(+ : cross)
      for (int64_t c = 0; c < classes; ++c) {
        row[c] = exp_nonpositive(row[c]);
        cross += row[c] * log_mean[c];
      }
#pragma omp simd
      for (int64_t c = 0; c < classes; ++c) row[c] *= (cross - log_mean[c]) * inverse_kept;
    }
  }
}

template void objective_rows(const ObjectiveParams<float>&, int64_t, int64_t);
template void objective_rows(const ObjectiveParams<double>&, int64_t, int64_t);
template void objective_images(const ObjectiveParams<float>&, int64_t, int64_t);
template void objective_images(const ObjectiveParams<double>&, int64_t, int64_t);

}  // namespace tpt_fast
