// The stream that torch works on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace fasttrain {

// A cudaStream_t.
inline void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace fasttrain
