// What all launches of the CUDA library share.
#pragma once

#include <cuda_runtime.h>

namespace fasttrain {

constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kWarp = 32;

// Null for success. Forgets the error, so that no later call reports it as its own.
inline const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace fasttrain
