// RMS normalisation: what the op (rms_norm.cpp) asks of the kernels (rms_norm_kernel.cpp).
// The formulas are in kernels/fasttrain_kernels/ops/rms_norm/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fasttrain {

// x, residual: rows of `width` elements, rows a stride apart. sum, y: contiguous.
struct RmsNormForward {
  int64_t width;
  const void* x;
  int64_t x_stride;
  DType x_dtype;
  const void* residual;  // null: none
  int64_t residual_stride;
  DType residual_dtype;
  void* sum;  // x + residual, what is normalised then; null where residual is
  DType sum_dtype;
  const void* weight;  // float, or double where the sum is double; 1 + w for the Gemma style
  bool cast_first;     // round to the input's dtype before multiplying by weight
  double eps;
  void* y;
  DType y_dtype;
  void* rstd;  // 1 / rms of each row, in weight's dtype
};

// dy, dsum, dx are contiguous; x is what forward normalised (x + residual if there was one).
struct RmsNormBackward {
  int64_t width;
  const void* dy;
  DType dy_dtype;
  const void* dsum;  // gradient that reaches x beside the norm, in x's dtype; null: none
  const void* x;
  int64_t x_stride;
  DType x_dtype;
  const void* weight;
  const void* rstd;
  void* dx;  // null: not wanted
};

// forward: rows [begin, end). backward: the same, and the rows' share of dweight (`width` values,
// null: not wanted) is written to dweight. add_partials: total[j] = sum over rows of partials
// (rows, width), for columns [begin, end); in doubles where `wide`.
#define FT_DECLARE_RMS_NORM(isa)                                                                \
  namespace isa {                                                                               \
  void rms_norm_forward(const RmsNormForward& args, int64_t begin, int64_t end);                \
  void rms_norm_backward(const RmsNormBackward& args, void* dweight, int64_t begin, int64_t end); \
  void add_partials(const void* partials, int64_t rows, int64_t width, bool wide, void* total,  \
                    int64_t begin, int64_t end);                                                \
  }
FT_EACH_ISA(FT_DECLARE_RMS_NORM)
#undef FT_DECLARE_RMS_NORM

}  // namespace fasttrain
