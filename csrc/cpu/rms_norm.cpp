// RMS normalisation on the CPU: from tensors to rows, shared out among torch's threads.
#include "rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "pages.h"
#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;

void forward(Tensor x, Tensor weight, std::optional<Tensor> residual, double eps, bool cast_first,
             Tensor y, Tensor sum, Tensor rstd) {
  const int64_t rows = x.size(0);
  prefer_large_pages(y);
  prefer_large_pages(sum);
  RmsNormForward args{};
  args.width = x.size(1);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.x_dtype = args.sum_dtype = dtype_of(x);
  if (residual.has_value()) {
    args.residual = residual->const_data_ptr();
    args.residual_stride = residual->stride(0);
    args.residual_dtype = dtype_of(*residual);
    args.sum = sum.mutable_data_ptr();
    args.sum_dtype = dtype_of(sum);
  }
  args.weight = weight.const_data_ptr();
  args.cast_first = cast_first;
  args.eps = eps;
  args.y = y.mutable_data_ptr();
  args.y_dtype = dtype_of(y);
  args.rstd = rstd.mutable_data_ptr();
  const auto run = FT_BEST(rms_norm_forward);
  torch::stable::parallel_for(0, rows, rows_per_thread(args.width),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

// The rows are cut into as many chunks as `partials` has rows, whatever the number of threads, and
// the chunks' shares of dweight are added in order: the same bits on any thread count.
void backward(Tensor dy, std::optional<Tensor> dsum, Tensor x, Tensor weight, Tensor rstd,
              Tensor dx, Tensor dweight, Tensor partials) {
  const int64_t rows = x.size(0), chunks = partials.size(0);
  const bool wants_dweight = dweight.numel() > 0;
  prefer_large_pages(dx);
  RmsNormBackward args{};
  args.width = x.size(1);
  args.dy = dy.const_data_ptr();
  args.dy_dtype = dtype_of(dy);
  args.dsum = dsum.has_value() ? dsum->const_data_ptr() : nullptr;
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.x_dtype = dtype_of(x);
  args.weight = weight.const_data_ptr();
  args.rstd = rstd.const_data_ptr();
  args.dx = dx.numel() > 0 ? dx.mutable_data_ptr() : nullptr;
  const bool wide = args.x_dtype == DType::f64;
  const int64_t row_bytes = args.width * (wide ? 8 : 4);
  char* partial_rows = wants_dweight ? static_cast<char*>(partials.mutable_data_ptr()) : nullptr;

  const auto run = FT_BEST(rms_norm_backward);
  each_chunk(rows, chunks, rows_per_thread(args.width),
             [&](int64_t chunk, int64_t begin, int64_t end) {
               run(args, wants_dweight ? partial_rows + chunk * row_bytes : nullptr, begin, end);
             });
  if (!wants_dweight) return;
  const auto add = FT_BEST(add_partials);
  void* total = dweight.mutable_data_ptr();
  torch::stable::parallel_for(
      0, args.width, std::max<int64_t>(64, rows_per_thread(chunks)),
      [&](int64_t begin, int64_t end) {
        add(partial_rows, chunks, args.width, wide, total, begin, end);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&forward));
  m.impl("rms_norm_backward", TORCH_BOX(&backward));
}

}  // namespace fasttrain
