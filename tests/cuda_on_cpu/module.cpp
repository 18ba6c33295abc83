// The Python module: every launcher of csrc/ under the name <op>_<type>, and the shim's own tests.
#include "module.h"

#include "../../csrc/adamw_step.h"
#include "../../csrc/add_layer_norm.h"
#include "../../csrc/augmix.h"
#include "../../csrc/bias_act.h"
#include "../../csrc/objective.h"
#include "../../csrc/prefix_attention.h"
#include "../../csrc/views.h"
#include "shim_test.h"

using namespace tpt_fast;

namespace {

template <class T>
void objective(const py::kwargs& values) {
  Arguments a(values);
  ObjectiveParams<T> p{};
  p.logits = a.data<T>("logits");
  p.entropy = a.data<T>("entropy");
  p.shift = a.data<T>("shift");
  p.selected = a.data<int64_t>("selected");
  p.log_mean = a.data<T>("log_mean");
  p.loss = a.data<T>("loss");
  p.grad = a.data<T>("grad");
  p.arrived = a.data<uint32_t>("arrived");
  a.integers("sizes", p.batch, p.views, p.classes, p.n_selected);
  p.reselect = a.flag("reselect");
  a.check(launch_objective(p, nullptr));
}

template <class T>
void views(const py::kwargs& values) {
  Arguments a(values);
  ViewsParams<T> p{};
  p.image = a.data<uint8_t>("image");
  p.specs = a.data<int32_t>("specs");
  p.table = a.data<T>("table");
  p.weights = a.data<int32_t>("weights");
  p.pixels = a.data<uint32_t>("pixels");
  p.out = a.data<T>("out");
  int64_t patch_height, patch_width;
  a.integers("sizes", p.height, p.width, p.views, p.view_height, p.view_width, patch_height, patch_width, p.max_taps,
             p.at_once);
  p.layout = {p.view_width, static_cast<uint32_t>(patch_height), static_cast<uint32_t>(patch_width)};
  p.vertical_first_when_taller = a.flag("vertical_first");
  a.check(launch_views(p, nullptr));
}

template <class T>
void augmix(const py::kwargs& values) {
  Arguments a(values);
  AugmixParams<T> p{};
  p.crops = a.data<uint8_t>("crops");
  p.steps = a.data<int32_t>("steps");
  p.parameters = a.data<double>("parameters");
  p.weights = a.data<float>("weights");
  p.table = a.data<float>("table");
  p.images = a.data<uint8_t>("images");
  p.ends = a.data<uint8_t>("ends");
  p.out = a.data<T>("out");
  int64_t patch_height, patch_width;
  a.integers("sizes", p.views, p.depth, p.height, p.width, patch_height, patch_width, p.at_once);
  p.layout = {p.width, static_cast<uint32_t>(patch_height), static_cast<uint32_t>(patch_width)};
  a.check(launch_augmix(p, nullptr));
}

template <class T>
void add_layer_norm(const py::kwargs& values) {
  using A = Accumulate<T>;
  Arguments a(values);
  AddLayerNormParams<T> p{};
  p.x = a.data<T>("x");
  p.delta = a.data<T>("delta");
  p.delta_bias = a.data<A>("delta_bias");
  p.weight = a.data<A>("weight");
  p.bias = a.data<A>("bias");
  p.sum = a.data<T>("sum");
  p.normed = a.data<T>("normed");
  p.mean = a.data<A>("mean");
  p.rstd = a.data<A>("rstd");
  a.integers("sizes", p.rows, p.width);
  p.eps = a.number("eps");
  a.check(launch_add_layer_norm(p, nullptr));
}

template <class T>
void add_layer_norm_backward(const py::kwargs& values) {
  using A = Accumulate<T>;
  Arguments a(values);
  AddLayerNormBackwardParams<T> p{};
  p.grad_normed = a.data<T>("grad_normed");
  p.grad_sum = a.data<T>("grad_sum");
  p.sum = a.data<T>("sum");
  p.mean = a.data<A>("mean");
  p.rstd = a.data<A>("rstd");
  p.weight = a.data<A>("weight");
  p.grad = a.data<T>("grad");
  a.integers("sizes", p.rows, p.width);
  a.check(launch_add_layer_norm_backward(p, nullptr));
}

template <class T>
void bias_act(const py::kwargs& values) {
  Arguments a(values);
  BiasActParams<T> p{};
  p.x = a.data<T>("x");
  p.bias = a.data<Accumulate<T>>("bias");
  p.grad = a.data<T>("grad");
  p.out = a.data<T>("out");
  a.integers("sizes", p.rows, p.width);
  p.quick = a.flag("quick");
  a.check(p.grad ? launch_bias_act_backward(p, nullptr) : launch_bias_act_forward(p, nullptr));
}

template <class T>
void prefix_attention(const py::kwargs& values) {
  using A = Accumulate<T>;
  Arguments a(values);
  PrefixAttentionParams<T> p{};
  p.q = a.data<T>("q");
  p.kv = a.data<T>("kv");
  p.offsets = a.data<int64_t>("offsets");
  p.grad = a.data<T>("grad");
  p.out = a.data<T>("out");
  p.grad_q = a.data<T>("grad_q");
  p.grad_kv = a.data<T>("grad_kv");
  p.partial = a.data<A>("partial");
  p.stats = a.data<A>("stats");
  a.integers("sizes", p.batch, p.rows, p.prefix, p.classes, p.width, p.heads);
  a.integers("strides", p.q_batch, p.q_row, p.kv_batch, p.kv_row);
  a.integers("grad_strides", p.grad_q_batch, p.grad_q_row, p.grad_kv_batch, p.grad_kv_row);
  p.last_only = a.flag("last_only");
  a.check(p.grad ? launch_prefix_attention_backward(p, nullptr) : launch_prefix_attention(p, nullptr));
}

template <class T>
void adamw_step(const py::kwargs& values) {
  Arguments a(values);
  AdamwStepParams<T> p{};
  p.context = a.data<T>("context");
  p.grad = a.data<T>("grad");
  p.exp_avg = a.data<T>("exp_avg");
  p.exp_avg_sq = a.data<T>("exp_avg_sq");
  p.step = a.data<int64_t>("step");
  p.context_out = a.data<T>("context_out");
  p.exp_avg_out = a.data<T>("exp_avg_out");
  p.exp_avg_sq_out = a.data<T>("exp_avg_sq_out");
  p.step_out = a.data<int64_t>("step_out");
  a.integers("sizes", p.batch, p.n);
  p.lr = a.number("lr");
  p.beta1 = a.number("beta1");
  p.beta2 = a.number("beta2");
  p.eps = a.number("eps");
  p.weight_decay = a.number("weight_decay");
  p.skip_nonfinite = a.flag("skip_nonfinite");
  a.check(launch_adamw_step(p, nullptr));
}

void shim_test(const py::kwargs& values) {
  Arguments a(values);
  const std::string name = a.text("name");
  const int* in = a.data<int>("in");
  int* out = a.data<int>("out");
  int blocks, threads, shared_bytes;
  a.integers("sizes", blocks, threads, shared_bytes);
  a.check(shim_test::launch_shim_test(name, in, out, blocks, threads, shared_bytes));
}

using Function = void (*)(const py::kwargs&);
constexpr std::pair<const char*, Function> kFunctions[] = {
    {"shim_test", shim_test},
    {"objective_float32", objective<float>},
    {"objective_float64", objective<double>},
    {"views_1", views<uint8_t>},
    {"views_2", views<uint16_t>},
    {"views_4", views<uint32_t>},
    {"augmix_float32", augmix<float>},
    {"augmix_float16", augmix<Half>},
    {"augmix_bfloat16", augmix<BFloat16>},
    {"adamw_step_float32", adamw_step<float>},
    {"adamw_step_float64", adamw_step<double>},
#define EVERY_TYPE(op)                                                                     \
  {#op "_float32", op<float>}, {#op "_float64", op<double>}, {#op "_float16", op<Half>}, { \
    #op "_bfloat16", op<BFloat16>                                                          \
  }
    EVERY_TYPE(add_layer_norm),
    EVERY_TYPE(add_layer_norm_backward),
    EVERY_TYPE(bias_act),
    EVERY_TYPE(prefix_attention),
#undef EVERY_TYPE
};

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_kernels, m) {
  m.def("set_seed", &cuda_on_cpu::set_seed);
  m.def("launches", &cuda_on_cpu::launches);
  m.def("views_max_taps", &views_max_taps);
  m.def("views_at_once", &views_at_once);
  m.def("augmix_at_once", &augmix_at_once);
  m.def("objective_shared_bytes", [](int64_t views, int64_t classes, int64_t n_selected) {
    ObjectiveParams<float> p{};
    p.views = views, p.classes = classes, p.n_selected = n_selected;
    return objective_shared_bytes(p);
  });
  for (const auto& [name, function] : kFunctions) m.def(name, function);
}
