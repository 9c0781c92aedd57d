// Steps of optimizers: what the ops (optimizer.cpp) ask of the kernels (optimizer_kernel.cpp).
#pragma once

#include "../common/optimizer.h"
#include "isa.h"

namespace fasttrain {

// Elements [begin, end) of a row. begin: at the edge of a block of the whole tensor, or 0.
struct StepChunk {
  Algorithm algorithm;
  Rounding rounding;
  Moments moments;
  const StepRow* row;
  const GroupNumbers* numbers;
  const Gate* gate;
  double step;  // the number of this step, from 1
  uint64_t seed;
  bool zero_grad;
  int64_t begin, end;
};

#define FT_DECLARE_OPTIMIZER(isa)                                                    \
  namespace isa {                                                                    \
  void optimizer_step(const StepChunk& chunk, double (*power)(double, double));      \
  double sum_of_squares(const void* values, bool is_bf16, int64_t begin, int64_t end); \
  }
FT_EACH_ISA(FT_DECLARE_OPTIMIZER)
#undef FT_DECLARE_OPTIMIZER

}  // namespace fasttrain
