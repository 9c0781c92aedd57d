// Gated linear units: what the op (glu.cpp) asks of the kernels (glu_kernel.cpp).
// The formulas are in kernels/fasttrain_kernels/ops/swiglu/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fasttrain {

enum class Activation { silu, gelu_tanh, gelu };

// Rows of one dtype, each without gaps; how far apart they lie, in elements.
struct GluForward {
  DType dtype;
  Activation activation;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;
  int64_t y_stride;
};

struct GluBackward {
  DType dtype;
  Activation activation;
  const void* dy;
  int64_t dy_stride;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* dgate;  // null: not wanted
  int64_t dgate_stride;
  void* dup;  // null: not wanted
  int64_t dup_stride;
};

// Elements [begin, end) of one row.
#define FT_DECLARE_GLU(isa)                                                              \
  namespace isa {                                                                        \
  void glu_forward(const GluForward& args, int64_t row, int64_t begin, int64_t end);   \
  void glu_backward(const GluBackward& args, int64_t row, int64_t begin, int64_t end); \
  }
FT_EACH_ISA(FT_DECLARE_GLU)
#undef FT_DECLARE_GLU

}  // namespace fasttrain
