// Steps of optimizers on the CPU: from a table of tensors to chunks, which torch's threads share.
#include "optimizer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "tensors.h"

namespace fasttrain {
namespace {

using torch::stable::Tensor;

double power(double base, double exponent) { return std::pow(base, exponent); }

struct Table {
  const StepRow* rows;
  int64_t count;
  int64_t chunks;

  const StepRow& row_of(int64_t chunk) const {
    const StepRow* after = std::upper_bound(
        rows, rows + count, chunk,
        [](int64_t wanted, const StepRow& row) { return wanted < row.first_chunk; });
    return *(after - 1);
  }
};

Table table_of(const Tensor& table) {
  STD_TORCH_CHECK(table.is_contiguous() && table.size(1) * 8 == sizeof(StepRow),
                  "optimizer on the CPU: the table must have ", sizeof(StepRow) / 8, " columns");
  const auto* rows = static_cast<const StepRow*>(table.const_data_ptr());
  const int64_t count = table.size(0);
  return {rows, count, chunks_of(rows, count)};
}

// run(chunk, row, begin, end) for every chunk of every row.
template <class Run>
void each_chunk_of(const Table& table, const Run& run) {
  torch::stable::parallel_for(0, table.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const StepRow& row = table.row_of(chunk);
      const int64_t begin = (chunk - row.first_chunk) * kChunk - lead_of(row);
      run(chunk, row, std::max<int64_t>(0, begin), std::min(row.numel, begin + kChunk));
    }
  });
}

const float* scalar(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

void step(Tensor table_tensor, Tensor numbers, int64_t algorithm, int64_t rounding, int64_t moments,
          std::optional<Tensor> norm, double max_norm, std::optional<Tensor> grad_scale,
          std::optional<Tensor> skip, int64_t seed, bool zero_grad, Tensor /*workspace*/) {
  const Table table = table_of(table_tensor);
  const auto* groups = static_cast<const GroupNumbers*>(numbers.const_data_ptr());
  STD_TORCH_CHECK(numbers.is_contiguous() && numbers.size(1) * 8 == sizeof(GroupNumbers),
                  "optimizer on the CPU: numbers must have ", sizeof(GroupNumbers) / 8, " columns");
  const Gate gate{scalar(norm), max_norm, scalar(grad_scale), scalar(skip)};
  if (skips(gate)) return;
  const auto run = FT_BEST(optimizer_step);
  each_chunk_of(table, [&](int64_t, const StepRow& row, int64_t begin, int64_t end) {
    run({static_cast<Algorithm>(algorithm), static_cast<Rounding>(rounding),
         static_cast<Moments>(moments), &row, groups + row.group, &gate, *row.step + 1.0,
         static_cast<uint64_t>(seed), zero_grad, begin, end},
        power);
  });
  for (int64_t i = 0; i < table.count; ++i) *table.rows[i].step += 1.0f;
}

// Partial sums in double, one a chunk, added up in their order whatever the number of threads.
void norm(Tensor table_tensor, Tensor out, Tensor /*workspace*/) {
  const Table table = table_of(table_tensor);
  std::vector<double> partial(table.chunks);
  const auto run = FT_BEST(sum_of_squares);
  each_chunk_of(table, [&](int64_t chunk, const StepRow& row, int64_t begin, int64_t end) {
    partial[chunk] = run(row.grad, row.grad_is_bf16 != 0, begin, end);
  });
  double sum = 0.0;
  for (double value : partial) sum += value;
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(std::sqrt(sum));
}

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CPU, m) {
  m.impl("optimizer_step", TORCH_BOX(&step));
  m.impl("grad_norm", TORCH_BOX(&norm));
}

}  // namespace
}  // namespace fasttrain
