// AugMix: three chains of image operations on each crop, mixed after normalisation; as images, or cut into patches.
#pragma once

#include "common.h"
#include "patches.h"

namespace tpt_fast {

enum AugmixStep : int32_t {
  kNothing,
  kAutocontrast,
  kEqualize,
  kPosterize,  // parameter: bits
  kSolarize,   // parameter: threshold
  kAffine,     // parameters: a, b, c, d, e, f of source = (a x + b y + c, d x + e y + f), in centres of pixels
  kAugmixSteps
};

constexpr int64_t kChains = 3;
constexpr int64_t kParameters = 6;

struct AugmixGeometry {
  const uint8_t* crops;      // [N, 3, H, W]
  const int32_t* steps;      // [N, kChains, D] AugmixStep
  const double* parameters;  // [N, kChains, D, kParameters]
  const float* weights;      // [N, 1 + kChains] m of the crop itself, and w of each chain
  const float* table;        // [3, 256] normalised value of each byte
  int64_t views;             // N
  int64_t depth;             // D
  int64_t height;            // H, pixels, at most 32768
  int64_t width;             // W, likewise
  PatchLayout layout;        // of views in patches of PH x PW, divisors of H and W; those themselves leave images whole

  // CUDA only, scratch.
  int64_t at_once;  // how many views the two below have room for, from augmix_at_once
  uint8_t* images;  // [at_once, kChains, 2, 3, H, W]
  uint8_t* ends;    // [at_once, kChains, 3 * 256 + 1] what the last image's bytes become, and which image: crop, 0 or 1

  TPT_FAST_HOST_DEVICE int64_t pixels() const { return height * width; }
};

template <class T>
struct AugmixParams : AugmixGeometry {
  T* out;  // [N, H / PH * W / PW, 3, PH, PW]
};

// Bytes of the scratch that each concurrent augmix_views needs, aligned to 64.
int64_t augmix_scratch(const AugmixGeometry& p);

// Items: the N views. Writes out.
template <class T>
void augmix_views(const AugmixParams<T>& p, uint8_t* scratch, int64_t begin, int64_t end);

#ifdef TPT_FAST_CUDA
// How many views go together, at least 1: of 64 MB of `images` where one view does not take more.
int64_t augmix_at_once(int64_t pixels, int64_t views);

// Two launches for each augmix_at_once.
template <class T>
cudaError_t launch_augmix(const AugmixParams<T>& p, cudaStream_t stream);
#endif

}  // namespace tpt_fast
