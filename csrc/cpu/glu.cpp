// Gated linear units on the CPU: from tensors to rows, cut into blocks that torch's threads share.
#include "glu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "pages.h"
#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "gelu", "expected silu, gelu_tanh or gelu, got ", name);
  return Activation::gelu;
}

bool contiguous(const std::optional<Tensor>& tensor) {
  return !tensor.has_value() || tensor->is_contiguous();
}

void* written(std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  prefer_large_pages(*tensor);
  return tensor->mutable_data_ptr();
}

// run(row, begin, end) for blocks of each row: elements don't depend on each other, so the cut
// changes no bit.
template <class Run>
void each_block(int64_t rows, int64_t width, Run run) {
  constexpr int64_t kBlock = 16384;
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  torch::stable::parallel_for(
      0, rows * blocks, rows_per_thread(width), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t begin = i % blocks * kBlock;
          run(i / blocks, begin, std::min(width, begin + kBlock));
        }
      });
}

void forward(Tensor gate, Tensor up, std::string activation, Tensor y) {
  GluForward args{};
  args.dtype = dtype_of(gate);
  args.activation = activation_of(activation);
  args.gate = gate.const_data_ptr();
  args.gate_stride = gate.stride(0);
  args.up = up.const_data_ptr();
  args.up_stride = up.stride(0);
  prefer_large_pages(y);
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  const bool one_row = gate.is_contiguous() && up.is_contiguous() && y.is_contiguous();
  const auto run = FT_BEST(glu_forward);
  each_block(one_row ? 1 : gate.size(0), one_row ? gate.numel() : gate.size(1),
             [&](int64_t row, int64_t begin, int64_t end) { run(args, row, begin, end); });
}

void backward(Tensor dy, Tensor gate, Tensor up, std::string activation,
              std::optional<Tensor> dgate, std::optional<Tensor> dup) {
  GluBackward args{};
  args.dtype = dtype_of(gate);
  args.activation = activation_of(activation);
  args.dy = dy.const_data_ptr();
  args.dy_stride = dy.stride(0);
  args.gate = gate.const_data_ptr();
  args.gate_stride = gate.stride(0);
  args.up = up.const_data_ptr();
  args.up_stride = up.stride(0);
  args.dgate = written(dgate);
  args.dgate_stride = dgate.has_value() ? dgate->stride(0) : 0;
  args.dup = written(dup);
  args.dup_stride = dup.has_value() ? dup->stride(0) : 0;
  const bool one_row = dy.is_contiguous() && gate.is_contiguous() && up.is_contiguous() &&
                       contiguous(dgate) && contiguous(dup);
  const auto run = FT_BEST(glu_backward);
  each_block(one_row ? 1 : gate.size(0), one_row ? gate.numel() : gate.size(1),
             [&](int64_t row, int64_t begin, int64_t end) { run(args, row, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("glu_forward", TORCH_BOX(&forward));
  m.impl("glu_backward", TORCH_BOX(&backward));
}

}  // namespace fasttrain
