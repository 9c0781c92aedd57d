// Cross-entropy on CUDA: from tensors to pointers. Also the op that says whether a device will do.
#include "cross_entropy.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "stream.h"

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Indices of columns and of blocks, of which a row takes up to 8, are 32 bits wide.
constexpr int64_t kMaxWidth = int64_t{1} << 30;
constexpr int64_t kMaxRows = int64_t{1} << 27;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "cross_entropy on CUDA takes float32, bfloat16 and float16");
      return DType::f32;
  }
}

void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1),
                  "cross_entropy on CUDA: ", name, " must be rows of adjacent elements");
}

template <class T>
const T* column(const Tensor& tensor, ScalarType dtype, int64_t rows, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.size(0) == rows,
                  "cross_entropy on CUDA: ", name,
                  " must be contiguous, with a row per row of logits, and of its own dtype");
  return static_cast<const T*>(tensor.const_data_ptr());
}

CrossEntropy problem_of(const Tensor& logits, const Tensor& targets, const Tensor& statistics) {
  check_rows(logits, "logits");
  CrossEntropy problem{};
  problem.dtype = dtype_of(logits);
  problem.rows = logits.size(0);
  STD_TORCH_CHECK(problem.rows <= kMaxRows && logits.size(1) <= kMaxWidth,
                  "cross_entropy on CUDA: at most 2^27 rows of 2^30 columns at once");
  problem.width = static_cast<int>(logits.size(1));
  problem.logits = logits.const_data_ptr();
  problem.logits_stride = logits.stride(0);
  problem.targets = column<int64_t>(targets, ScalarType::Long, problem.rows, "targets");
  problem.statistics = const_cast<float*>(
      column<float>(statistics, ScalarType::Float, problem.rows, "statistics"));
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(1) == kFields,
                  "cross_entropy on CUDA: statistics must have five columns");
  return problem;
}

template <class Launch>
void run(Launch launch, const CrossEntropy& problem, int device) {
  if (problem.rows == 0) return;
  const DeviceGuard guard(device);
  const char* error = launch(problem, device, current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "cross_entropy on CUDA: ", error);
}

void forward(Tensor logits, Tensor targets, double scale, double softcap, bool wants_total,
             bool wants_entropy, int64_t first, Tensor statistics) {
  CrossEntropy problem = problem_of(logits, targets, statistics);
  problem.first = first;
  problem.wants_total = wants_total;
  problem.wants_entropy = wants_entropy;
  problem.terms = terms_of(scale, softcap, 0, 0, 1);
  run(cross_entropy_forward, problem, logits.get_device_index());
}

void backward(Tensor logits, Tensor targets, Tensor statistics, Tensor coefficients, double scale,
              double softcap, double label_smoothing, double z_loss, int64_t first, int64_t classes,
              Tensor out) {
  check_rows(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == logits.scalar_type() && out.size(0) == logits.size(0) &&
                      out.size(1) == logits.size(1),
                  "cross_entropy on CUDA: out must have the shape and the dtype of logits");
  CrossEntropy problem = problem_of(logits, targets, statistics);
  problem.out = out.mutable_data_ptr();
  problem.out_stride = out.stride(0);
  problem.coefficients =
      column<float>(coefficients, ScalarType::Float, problem.rows, "coefficients");
  problem.first = first;
  problem.terms = terms_of(scale, softcap, label_smoothing, z_loss, classes);
  run(cross_entropy_backward, problem, logits.get_device_index());
}

void forward_backward(Tensor logits, Tensor targets, Tensor coefficients, double scale,
                      double softcap, double label_smoothing, double z_loss, bool wants_entropy,
                      Tensor statistics) {
  CrossEntropy problem = problem_of(logits, targets, statistics);
  problem.out = logits.mutable_data_ptr();
  problem.out_stride = problem.logits_stride;
  problem.coefficients =
      column<float>(coefficients, ScalarType::Float, problem.rows, "coefficients");
  problem.wants_total = label_smoothing != 0;
  problem.wants_entropy = wants_entropy;
  problem.terms = terms_of(scale, softcap, label_smoothing, z_loss, problem.width);
  run(cross_entropy_forward_backward, problem, logits.get_device_index());
}

std::string error_of(int64_t device) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  const char* error = cuda_error(static_cast<int>(device));
  return error == nullptr ? "" : error;
}

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
  m.impl("cross_entropy_forward_backward", TORCH_BOX(&forward_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_error", TORCH_BOX(&error_of));
}

}  // namespace
}  // namespace fasttrain
