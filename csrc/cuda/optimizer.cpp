// Steps of optimizers on CUDA: from tensors to pointers. What the table points to is Python's care.
#include "optimizer.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "stream.h"

namespace fasttrain {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// The index that a tensor of the host has.
constexpr int32_t kHost = -1;

// Rows of Row, as Python writes them.
template <class Row>
const Row* rows_of(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.get_device_index() != kHost && tensor.scalar_type() == dtype &&
                      tensor.is_contiguous() && tensor.dim() == 2 &&
                      tensor.size(1) * 8 == sizeof(Row),
                  "optimizer on CUDA: ", name, " must have ", sizeof(Row) / 8,
                  " contiguous columns, on the device");
  return static_cast<const Row*>(tensor.const_data_ptr());
}

const float* scalar(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->get_device_index() != kHost && tensor->scalar_type() == ScalarType::Float,
                  "optimizer on CUDA: norm, grad_scale and skip must be float32, on the device");
  return static_cast<const float*>(tensor->const_data_ptr());
}

int64_t* workspace_of(const Tensor& tensor, int64_t size) {
  STD_TORCH_CHECK(tensor.get_device_index() != kHost && tensor.scalar_type() == ScalarType::Long &&
                      tensor.is_contiguous() && tensor.numel() >= size,
                  "optimizer on CUDA: the workspace must have ", size, " int64, on the device");
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

template <class Launch, class Work>
void run(Launch launch, const Work& work, int device) {
  const DeviceGuard guard(device);
  const char* error = launch(work, device, current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "optimizer on CUDA: ", error);
}

void step(Tensor table, Tensor numbers, int64_t algorithm, int64_t rounding, int64_t moments,
          std::optional<Tensor> norm, double max_norm, std::optional<Tensor> grad_scale,
          std::optional<Tensor> skip, int64_t seed, bool zero_grad, Tensor workspace) {
  if (table.size(0) == 0) return;
  StepWork work{};
  work.algorithm = static_cast<Algorithm>(algorithm);
  work.rounding = static_cast<Rounding>(rounding);
  work.moments = static_cast<Moments>(moments);
  work.rows = rows_of<StepRow>(table, ScalarType::Long, "the table");
  work.count = static_cast<int>(table.size(0));
  work.groups = rows_of<GroupNumbers>(numbers, ScalarType::Double, "numbers");
  work.gate = {scalar(norm), max_norm, scalar(grad_scale), scalar(skip)};
  work.seed = static_cast<uint64_t>(seed);
  work.zero_grad = zero_grad;
  work.workspace = workspace_of(workspace, kStepWorkspace);
  run(optimizer_step, work, table.get_device_index());
}

void norm(Tensor table, Tensor out, Tensor workspace) {
  NormWork work{};
  work.rows = rows_of<StepRow>(table, ScalarType::Long, "the table");
  work.count = static_cast<int>(table.size(0));
  work.out = const_cast<float*>(scalar(out));
  work.workspace = workspace_of(workspace, kNormWorkspace);
  run(grad_norm, work, table.get_device_index());
}

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CUDA, m) {
  m.impl("optimizer_step", TORCH_BOX(&step));
  m.impl("grad_norm", TORCH_BOX(&norm));
}

}  // namespace
}  // namespace fasttrain
