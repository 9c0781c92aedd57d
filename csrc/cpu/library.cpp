// The operators of the native libraries. Their schemas are defined here, once; each op's own file
// registers its CPU implementation. They are plumbing: fasttrain_kernels/ops/<op>/cpu_kernel.py
// allocates the outputs and calls them, and the public, differentiable ops are defined in op.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fasttrain_native, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> str");

  // sum and residual come together; without them sum is empty. weight, rstd: float32, or float64
  // where x is. dx, dweight: empty where not wanted. partials: (chunks, width) workspace.
  m.def(
      "rms_norm_forward(Tensor x, Tensor weight, Tensor? residual, float eps, bool cast_first, "
      "Tensor(a!) y, Tensor(b!) sum, Tensor(c!) rstd) -> ()");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) partials) -> ()");
}
