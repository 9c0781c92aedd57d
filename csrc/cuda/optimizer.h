// Steps of optimizers on CUDA: what the ops (optimizer.cpp) ask of the kernels (optimizer.cu).
// Of the two only the first knows torch.
#pragma once

#include "../common/optimizer.h"

namespace fasttrain {

struct StepWork {
  Algorithm algorithm;
  Rounding rounding;
  Moments moments;
  const StepRow* rows;  // all of these lie on the device
  int count;            // of rows
  const GroupNumbers* groups;
  Gate gate;
  uint64_t seed;
  bool zero_grad;
  int64_t* workspace;  // kStepWorkspace
};

struct NormWork {
  const StepRow* rows;
  int count;
  float* out;
  int64_t* workspace;  // kNormWorkspace
};

// Each launches one kernel on `stream` (a cudaStream_t) of `device`; returns null, or the error.
const char* optimizer_step(const StepWork& work, int device, void* stream);
const char* grad_norm(const NormWork& work, int device, void* stream);

}  // namespace fasttrain
