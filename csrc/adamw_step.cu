// A block a context. The context is a few thousand numbers, so that the launch itself bounds it: one launch instead of
// AdamW's dozen, and the check for a gradient that is not finite is a vote of the block, so that nobody waits for it.
//
// Dangers: the vote is a barrier that all threads of the block reach, and publishes the scalars too; single loads, so
// no alignment is asked for; offsets are 64 bits wide, contexts up to 2^31 - 1.
#include "adamw_step.h"
#include "common.cuh"

namespace tpt_fast {
namespace {

constexpr int kThreads = 512;

// Grid: (batch).
template <class T>
__global__ void __launch_bounds__(kThreads) adamw_step_kernel(const __grid_constant__ AdamwStepParams<T> p) {
  TPT_FAST_SHARED(AdamwScalars<T>, scalars, [1]);
  const int64_t item = blockIdx.x, at = item * p.n;
  const int64_t step = p.step ? p.step[item] : 0;
  int finite = 1;
  if (p.skip_nonfinite) {
    for (int64_t i = threadIdx.x; i < p.n; i += kThreads) finite &= p.grad[at + i] - p.grad[at + i] == T(0);
  }
  if (threadIdx.x == 0) scalars[0] = adamw_scalars(p, step + 1);
  finite = __syncthreads_and(finite) != 0;
  if (threadIdx.x == 0) p.step_out[item] = step + finite;
  const AdamwScalars<T> s = scalars[0];
  for (int64_t i = at + threadIdx.x; i < at + p.n; i += kThreads) {
    T context = p.context[i], m = p.exp_avg ? p.exp_avg[i] : T(0), v = p.exp_avg_sq ? p.exp_avg_sq[i] : T(0);
    if (finite) context = adamw_element(s, context, p.grad[i], m, v);
    p.context_out[i] = context;
    p.exp_avg_out[i] = m;
    p.exp_avg_sq_out[i] = v;
  }
}

}  // namespace

template <class T>
cudaError_t launch_adamw_step(const AdamwStepParams<T>& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.batch > kMaxGridX) return cudaErrorInvalidValue;
  return launch(adamw_step_kernel<T>, dim3(static_cast<unsigned>(p.batch)), dim3(kThreads), 0, stream, p);
}

template cudaError_t launch_adamw_step(const AdamwStepParams<float>&, cudaStream_t);
template cudaError_t launch_adamw_step(const AdamwStepParams<double>&, cudaStream_t);

}  // namespace tpt_fast
