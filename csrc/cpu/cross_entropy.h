// Cross-entropy of rows of logits: what the op (cross_entropy.cpp) asks of the kernels
// (cross_entropy_kernel.cpp). The formulas, and what the statistics are, stand in
// kernels/fasttrain_kernels/ops/cross_entropy/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fasttrain {

// Columns [first, first + columns) of rows of logits, which lie a stride apart.
struct CrossEntropy {
  const void* logits;
  int64_t stride;
  int64_t columns;
  int64_t first;
  int64_t classes;  // columns of a whole row
  DType dtype;
  const int64_t* targets;    // a class, or -1: ignored, or -2: invalid
  void* statistics;          // (rows, 5), float, or double where the logits are
  const void* coefficients;  // (rows), in the statistics' dtype
  void* out;                 // the gradient, in the logits' dtype; may be the logits
  int64_t out_stride;
  double scale;
  double softcap;  // 0: none
  double label_smoothing;
  double z_loss;
  bool wants_total;
  bool wants_entropy;
};

// Rows [begin, end). forward writes statistics; backward reads them and writes `out`;
// forward_backward does one after the other while a row is still in the cache.
#define FT_DECLARE_CROSS_ENTROPY(isa)                                                           \
  namespace isa {                                                                               \
  void cross_entropy_forward(const CrossEntropy& args, int64_t begin, int64_t end);             \
  void cross_entropy_backward(const CrossEntropy& args, int64_t begin, int64_t end);            \
  void cross_entropy_forward_backward(const CrossEntropy& args, int64_t begin, int64_t end);    \
  }
FT_EACH_ISA(FT_DECLARE_CROSS_ENTROPY)
#undef FT_DECLARE_CROSS_ENTROPY

}  // namespace fasttrain
