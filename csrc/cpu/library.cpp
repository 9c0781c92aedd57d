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

  // Implemented by the CPU and the CUDA library; ops/cross_entropy/reference.py says what they write.
  // softcap 0: none. statistics: (N, 5). out may be logits.
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, float scale, float softcap, "
      "bool wants_total, bool wants_entropy, int first, Tensor(a!) statistics) -> ()");
  m.def(
      "cross_entropy_backward(Tensor logits, Tensor targets, Tensor statistics, "
      "Tensor coefficients, float scale, float softcap, float label_smoothing, float z_loss, "
      "int first, int classes, Tensor(a!) out) -> ()");
  m.def(
      "cross_entropy_forward_backward(Tensor(a!) logits, Tensor targets, Tensor coefficients, "
      "float scale, float softcap, float label_smoothing, float z_loss, bool wants_entropy, "
      "Tensor(b!) statistics) -> ()");

  // owners: int32, tokens: int64. What they are: csrc/cpu/embedding.h.
  m.def(
      "embedding_backward(Tensor dy, Tensor owners, Tensor tokens, Tensor(a!) dweight) -> ()");
  // q, k: either may be none. cos, sin, weights, dweight (2, head_dim), partials (chunks, 2,
  // head_dim): float32, or float64 where q is. back: by the opposite angles. dq, dk: empty where not
  // wanted.
  m.def(
      "rope_forward(Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, "
      "Tensor? k_weight, float eps, bool interleaved, bool back, Tensor(a!) q_out, "
      "Tensor(b!) k_out) -> ()");
  m.def(
      "rope_norm_backward(Tensor? q_grad, Tensor? k_grad, Tensor q, Tensor k, Tensor cos, "
      "Tensor sin, Tensor q_weight, Tensor k_weight, float eps, bool interleaved, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dweight, Tensor(d!) partials) -> ()");
  // offsets: (docs + 1), int32. window 0, softcap 0: none. sinks: (Hq), in the dtype of lse, as are
  // delta (Hq, T) and dsinks (Hq), which without sinks is empty. Outputs are contiguous but for o.
  m.def(
      "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor offsets, bool causal, "
      "int window, float softcap, Tensor? sinks, float scale, Tensor(a!) o, Tensor(b!) lse) -> ()");
  m.def(
      "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor offsets, bool causal, int window, float softcap, Tensor? sinks, float scale, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, Tensor(e!) dsinks) -> ()");
  // All of one dtype, rows without gaps. activation: silu, gelu_tanh, gelu. dgate, dup: None where
  // not wanted.
  m.def("glu_forward(Tensor gate, Tensor up, str activation, Tensor(a!) y) -> ()");
  m.def(
      "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation, Tensor(a!)? dgate, "
      "Tensor(b!)? dup) -> ()");

  // Implemented by the CPU and the CUDA library. table: (tensors, 14) int64 and numbers: (groups, 7)
  // float64, both on the device; csrc/common/optimizer.h says what they hold. Tensors that the table
  // points to are written, and must be kept alive until the device is done.
  // norm, grad_scale, skip: () float32. max_norm 0: no clipping. workspace, here and below: of the
  // CUDA library, kStepWorkspace and kNormWorkspace int64 zeros, which a call leaves as zeros.
  m.def(
      "optimizer_step(Tensor table, Tensor numbers, int algorithm, int rounding, int moments, "
      "Tensor? norm, float max_norm, Tensor? grad_scale, Tensor? skip, int seed, bool zero_grad, "
      "Tensor(a!) workspace) -> ()");
  // Of the table only grad, numel, offset, first_chunk and grad_is_bf16 are read. out: () float32.
  m.def("grad_norm(Tensor table, Tensor(a!) out, Tensor(b!) workspace) -> ()");

  // Of the CUDA library: why none of its kernels runs on that device; empty where they do.
  m.def("cuda_error(int device) -> str");
}
