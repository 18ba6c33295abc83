// What the loaded library says of itself.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

std::string build_info() {
#ifdef TPT_FAST_CUDA
  return "CPU and CUDA, compiler " __VERSION__;
#else
  return "CPU, compiler " __VERSION__;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
