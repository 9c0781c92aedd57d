// What the op files share: from torch's tensors and threads to plain numbers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "dtype.h"
#include "heads.h"

namespace fasttrain {

inline DType dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "the CPU kernels take float32, float64 and bfloat16");
      return DType::f32;
  }
}

// tensor (T, H, width), of heads without gaps.
inline Heads heads_of(const torch::stable::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// How many rows are worth a thread of their own: below 16384 elements a second thread costs more
// than it saves (a parallel region takes about 5 us).
inline int64_t rows_per_thread(int64_t width) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
}

// run(chunk, begin, end) for each of `chunks` ranges of rows, the same ones whatever the number of
// threads, so that sums over a chunk don't depend on it. `worth`: rows that are worth a thread.
template <class Run>
void each_chunk(int64_t rows, int64_t chunks, int64_t worth, const Run& run) {
  const int64_t chunk_rows = (rows + chunks - 1) / std::max<int64_t>(1, chunks);
  const int64_t grain = std::max<int64_t>(1, worth / std::max<int64_t>(1, chunk_rows));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      run(chunk, std::min(rows, chunk * chunk_rows), std::min(rows, (chunk + 1) * chunk_rows));
  });
}

}  // namespace fasttrain
