// Rotary position embedding on the CPU: from tensors to heads, tokens shared out among threads.
#include "rope.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "pages.h"
#include "rms_norm.h"
#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;

RopeSide side_of(const Tensor& x, const std::optional<Tensor>& weight, Tensor& out) {
  RopeSide side{};
  side.heads = x.size(1);
  side.x = heads_of(x);
  prefer_large_pages(out);
  side.weight = weight.has_value() ? weight->const_data_ptr() : nullptr;
  side.out = out.numel() > 0 ? out.mutable_data_ptr() : nullptr;
  return side;
}

Rope rope_of(const Tensor& some, const Tensor& cos, const Tensor& sin, double eps,
             bool interleaved) {
  Rope args{};
  args.dtype = dtype_of(some);
  args.head_dim = some.size(2);
  args.half = cos.size(1);
  args.interleaved = interleaved;
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.cos_stride = cos.stride(0);
  args.sin_stride = sin.stride(0);
  args.eps = eps;
  return args;
}

int64_t elements_per_token(const Rope& args) {
  return (args.sides[0].heads + args.sides[1].heads) * args.head_dim;
}

void forward(std::optional<Tensor> q, std::optional<Tensor> k, Tensor cos, Tensor sin,
             std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, double eps,
             bool interleaved, bool back, Tensor q_out, Tensor k_out) {
  Rope args = rope_of(q.has_value() ? *q : *k, cos, sin, eps, interleaved);
  args.direction = back ? -1.0 : 1.0;
  if (q.has_value()) args.sides[0] = side_of(*q, q_weight, q_out);
  if (k.has_value()) args.sides[1] = side_of(*k, k_weight, k_out);
  const auto run = FT_BEST(rope_forward);
  torch::stable::parallel_for(0, cos.size(0), rows_per_thread(elements_per_token(args)),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

// As in rms_norm.cpp: as many chunks of tokens as `partials` says, whatever the number of threads,
// and their shares of dweight are added in order.
void norm_backward(std::optional<Tensor> q_grad, std::optional<Tensor> k_grad, Tensor q, Tensor k,
                   Tensor cos, Tensor sin, Tensor q_weight, Tensor k_weight, double eps,
                   bool interleaved, Tensor dq, Tensor dk, Tensor dweight, Tensor partials) {
  Rope args = rope_of(q, cos, sin, eps, interleaved);
  if (q_grad.has_value()) {
    args.sides[0] = side_of(q, q_weight, dq);
    args.sides[0].grad = heads_of(*q_grad);
  }
  if (k_grad.has_value()) {
    args.sides[1] = side_of(k, k_weight, dk);
    args.sides[1].grad = heads_of(*k_grad);
  }
  const int64_t width = dweight.numel();
  const bool wide = args.dtype == DType::f64;
  char* shares = static_cast<char*>(partials.mutable_data_ptr());
  const auto run = FT_BEST(rope_norm_backward);
  each_chunk(cos.size(0), partials.size(0), rows_per_thread(elements_per_token(args)),
             [&](int64_t chunk, int64_t begin, int64_t end) {
               run(args, shares + chunk * width * (wide ? 8 : 4), begin, end);
             });
  FT_BEST(add_partials)
  (shares, partials.size(0), width, wide, dweight.mutable_data_ptr(), 0, width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("rope_forward", TORCH_BOX(&forward));
  m.impl("rope_norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fasttrain
