// How the heads of a tensor lie in memory, as kernels are told it.
#pragma once

#include <cstdint>

namespace fasttrain {

// (T, H, width): element e of head h of token t lies at t * token_stride + h * head_stride + e.
// Inputs are read only.
struct Heads {
  void* data;
  int64_t token_stride, head_stride;
};

}  // namespace fasttrain
