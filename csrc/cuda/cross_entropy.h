// Cross-entropy on CUDA: what the ops (cross_entropy.cpp) ask of the kernels (cross_entropy.cu).
// Of the two only the first knows torch, so that the second compiles in seconds.
#pragma once

#include <cstdint>

#include "cross_entropy_math.h"

namespace fasttrain {

enum class DType { f32, bf16, f16 };

struct CrossEntropy {
  DType dtype;  // of logits and out
  int64_t rows;
  int width;
  const void* logits;  // rows of `width` adjacent elements, `logits_stride` elements apart
  int64_t logits_stride;
  void* out;  // may be logits
  int64_t out_stride;
  const int64_t* targets;     // a class, kIgnored, or any other negative number
  const float* coefficients;  // what each row's gradient is multiplied by
  float* statistics;          // (rows, kFields)
  int64_t first;              // the class of the first column
  bool wants_total;
  bool wants_entropy;
  Terms terms;
};

constexpr int64_t kIgnored = -1;
constexpr int kFields = 5;

// Each launches one kernel on `stream` (a cudaStream_t) of `device`; returns null, or the error.
const char* cross_entropy_forward(const CrossEntropy& problem, int device, void* stream);
const char* cross_entropy_backward(const CrossEntropy& problem, int device, void* stream);
const char* cross_entropy_forward_backward(const CrossEntropy& problem, int device, void* stream);

// Why no kernel of this library can run on `device`, or null.
const char* cuda_error(int device);

}  // namespace fasttrain
