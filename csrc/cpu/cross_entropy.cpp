// Cross-entropy of rows of logits on the CPU: from tensors to rows, shared out among torch's
// threads. A row is one thread's work, so the number of threads changes no bit.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;
using Rows = void (*)(const CrossEntropy&, int64_t, int64_t);

CrossEntropy describe(const Tensor& logits, const Tensor& targets, const Tensor& statistics,
                      double scale, double softcap, int64_t first, int64_t classes) {
  CrossEntropy args{};
  args.logits = logits.const_data_ptr();
  args.stride = logits.stride(0);
  args.columns = logits.size(1);
  args.first = first;
  args.classes = classes;
  args.dtype = dtype_of(logits);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.statistics = const_cast<void*>(statistics.const_data_ptr());
  args.scale = scale;
  args.softcap = softcap;
  return args;
}

void each_row(const CrossEntropy& args, int64_t rows, Rows run) {
  torch::stable::parallel_for(0, rows, rows_per_thread(args.columns),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void forward(Tensor logits, Tensor targets, double scale, double softcap, bool wants_total,
             bool wants_entropy, int64_t first, Tensor statistics) {
  CrossEntropy args = describe(logits, targets, statistics, scale, softcap, first, 0);
  args.wants_total = wants_total;
  args.wants_entropy = wants_entropy;
  each_row(args, logits.size(0), FT_BEST(cross_entropy_forward));
}

void backward(Tensor logits, Tensor targets, Tensor statistics, Tensor coefficients, double scale,
              double softcap, double label_smoothing, double z_loss, int64_t first,
              int64_t classes, Tensor out) {
  CrossEntropy args = describe(logits, targets, statistics, scale, softcap, first, classes);
  args.coefficients = coefficients.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.out_stride = out.stride(0);
  args.label_smoothing = label_smoothing;
  args.z_loss = z_loss;
  each_row(args, logits.size(0), FT_BEST(cross_entropy_backward));
}

void forward_backward(Tensor logits, Tensor targets, Tensor coefficients, double scale,
                      double softcap, double label_smoothing, double z_loss, bool wants_entropy,
                      Tensor statistics) {
  CrossEntropy args =
      describe(logits, targets, statistics, scale, softcap, 0, logits.size(1));
  args.coefficients = coefficients.const_data_ptr();
  args.out = logits.mutable_data_ptr();
  args.out_stride = args.stride;
  args.label_smoothing = label_smoothing;
  args.z_loss = z_loss;
  args.wants_total = label_smoothing != 0;
  args.wants_entropy = wants_entropy;
  each_row(args, logits.size(0), FT_BEST(cross_entropy_forward_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
  m.impl("cross_entropy_forward_backward", TORCH_BOX(&forward_backward));
}

}  // namespace fasttrain
