// Marginal-entropy objective of test-time prompt tuning (Shu et al., NeurIPS 2022, equations 2 to 4).
#pragma once

#include "common.h"

namespace tpt_fast {

template <class T>
struct ObjectiveParams {
  const T* logits;     // [B, N, C]; -inf is a class of probability zero
  T* entropy;          // [B, N] entropy of each view's softmax, in nats
  T* shift;            // [B, N, 2] scratch: largest logit and log sum exp(logit - largest) of each row
  int64_t* selected;   // [B, K] views kept, ascending by (entropy, index), NaN last; given when `reselect` is false
  T* log_mean;         // [B, C] scratch: log of the kept views' mean probability, clamped to be finite
  T* loss;             // [B] entropy of that mean
  T* grad;             // [B, K, C] d loss / d logits of the kept views
  int64_t batch;       // B
  int64_t views;       // N
  int64_t classes;     // C >= 1
  int64_t n_selected;  // K, 1 <= K <= N
  bool reselect;       // choose `selected` by entropy, or take it as given
  uint32_t* arrived;   // [B] CUDA only: zero before the launch, and zero again after it
};

// Orders views by entropy, then by index; NaN after everything, so that a broken view is kept only when nothing else
// is.
template <class T>
TPT_FAST_HOST_DEVICE bool precedes(const T* entropy, int64_t a, int64_t b) {
  const bool nan_a = entropy[a] != entropy[a], nan_b = entropy[b] != entropy[b];
  if (nan_a || nan_b) return nan_a == nan_b ? a < b : nan_b;
  return entropy[a] < entropy[b] || (entropy[a] == entropy[b] && a < b);
}

// Items: the B * N rows of the logits. Writes entropy and shift.
template <class T>
void objective_rows(const ObjectiveParams<T>& p, int64_t begin, int64_t end);

// Items: the B images, after objective_rows has done all rows. Writes selected, log_mean, loss and grad.
template <class T>
void objective_images(const ObjectiveParams<T>& p, int64_t begin, int64_t end);

#ifdef TPT_FAST_CUDA
// All of it in one launch, which needs this much shared memory a block: it grows with views and kept views, and a
// device has cudaDevAttrMaxSharedMemoryPerBlockOptin of it.
template <class T>
int64_t objective_shared_bytes(const ObjectiveParams<T>& p);
template <class T>
cudaError_t launch_objective(const ObjectiveParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
