// Causal attention of many suffixes that share one prefix, rows packed without padding.
//
// Rows 0..prefix-1 see the prefix up to themselves. Row r of the suffix [offsets[c], offsets[c + 1]) sees the prefix
// and that suffix up to itself.
#pragma once

#include "common.h"
#include "half.h"

namespace tpt_fast {

constexpr int64_t kPrefixAttentionMaxKeys = 1024;      // prefix + longest suffix
constexpr int64_t kPrefixAttentionClassesAtOnce = 12;  // classes whose part of the prefix's gradient is summed together

template <class T>
struct PrefixAttentionParams {
  const T* q;                // [B, Q, width], Q = rows, or Q = classes: only the last row of each suffix is a query
  const T* kv;               // [B, rows, 2 * width], keys then values
  const int64_t* offsets;    // [classes + 1] first row of each suffix, ascending from `prefix` to `rows`
  const T* grad;             // [B, Q, width] d loss / d out, dense; backward only
  T* out;                    // [B, Q, width], dense; forward only
  T* grad_q;                 // [B, Q, width]; backward only, as all below
  T* grad_kv;                // [B, rows, 2 * width]
  Accumulate<T>* partial;    // [B, blocks, prefix, 2 * width] scratch: the prefix's gradient from each block of classes
  int64_t q_batch, q_row;    // strides of q in elements; the last dimension is dense
  int64_t kv_batch, kv_row;  // of kv
  int64_t grad_q_batch, grad_q_row;  // of grad_q
  int64_t grad_kv_batch, grad_kv_row;
  int64_t batch, rows, prefix, classes, width, heads;
  bool last_only;        // Q = classes
  Accumulate<T>* stats;  // [B, heads, Q, 2] scratch: log sum exp, mean slope; backward on CUDA only
  Accumulate<T>* wide;   // [prefix + longest suffix, 7 * width] scratch of one range; 16-bit types on the CPU only

  TPT_FAST_HOST_DEVICE int64_t queries() const { return last_only ? classes : rows; }
  TPT_FAST_HOST_DEVICE int64_t blocks() const { return ceil_div(classes, kPrefixAttentionClassesAtOnce); }
};

// Items: B * (classes + 1); the last of each batch is the prefix. Writes out.
template <class T>
void prefix_attention_forward(const PrefixAttentionParams<T>& p, int64_t begin, int64_t end);

// Items: B * blocks(). Writes grad_q and grad_kv of the suffixes' rows, and partial.
template <class T>
void prefix_attention_backward_classes(const PrefixAttentionParams<T>& p, int64_t begin, int64_t end);

// Items: B, after all blocks. Writes grad_q and grad_kv of the prefix's rows.
template <class T>
void prefix_attention_backward_prefix(const PrefixAttentionParams<T>& p, int64_t begin, int64_t end);

#ifdef TPT_FAST_CUDA
// Half and BFloat16 too, and heads of up to 128 elements. The backward pass takes three launches, two on tensor cores.
template <class T>
cudaError_t launch_prefix_attention(const PrefixAttentionParams<T>& p, cudaStream_t stream);

template <class T>
cudaError_t launch_prefix_attention_backward(const PrefixAttentionParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
