// What the loaded library of the CPU kernels says of itself.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

std::string build_info() { return "CPU, compiler " __VERSION__; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tpt_fast, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
