#include "module.h"

#include "../../csrc/objective.h"
#include "shim_test.h"

using namespace tpt_fast;

namespace {

template <class T>
void objective(const py::array& logits, int64_t n_selected, bool reselect, const py::array& entropy,
               const py::array& selected, const py::array& loss, const py::array& grad, const py::array& shift,
               const py::array& log_mean, const py::array& arrived) {
  ObjectiveParams<T> p{};
  p.logits = data<T>(logits, "logits");
  p.entropy = data<T>(entropy, "entropy");
  p.shift = data<T>(shift, "shift");
  p.selected = data<int64_t>(selected, "selected");
  p.log_mean = data<T>(log_mean, "log_mean");
  p.loss = data<T>(loss, "loss");
  p.grad = data<T>(grad, "grad");
  p.batch = logits.shape(0);
  p.views = logits.shape(1);
  p.classes = logits.shape(2);
  p.n_selected = n_selected;
  p.reselect = reselect;
  p.arrived = data<uint32_t>(arrived, "arrived");
  check(launch_objective(p, nullptr));
}

}  // namespace

PYBIND11_MODULE(TPT_FAST_MODULE, m) {
  m.def("set_seed", &cuda_on_cpu::set_seed);
  m.def("launches", &cuda_on_cpu::launches);
  m.def("shim_test", [](const std::string& name, const py::array& in, const py::array& out, int blocks, int threads,
                        int shared_bytes) {
    check(shim_test::launch_shim_test(name, data<int>(in, "in"), data<int>(out, "out"), blocks, threads, shared_bytes));
  });
  m.def("objective_float32", &objective<float>);
  m.def("objective_float64", &objective<double>);
}
