// What the op files share: from torch's tensors and threads to plain numbers.
#pragma once

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

}  // namespace fasttrain
