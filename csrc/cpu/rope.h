// Rotary position embedding: what the op (rope.cpp) asks of the kernels (rope_kernel.cpp).
// The formulas are in kernels/fasttrain_kernels/ops/rope/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "heads.h"
#include "isa.h"

namespace fasttrain {

// The queries or the keys of a call.
struct RopeSide {
  int64_t heads;       // 0: nothing to do
  Heads x;             // what is turned; in the backward pass of a norm, what was normalised
  Heads grad;          // of that backward pass alone: the gradient of what was turned
  const void* weight;  // float, or double where x is; 1 + w for the Gemma style; null: no norm
  void* out;           // contiguous; null: not wanted
};

struct Rope {
  DType dtype;
  int64_t head_dim;
  int64_t half;      // pairs of a head that are turned
  bool interleaved;  // pairs are neighbours; else elements half apart
  const void *cos, *sin;  // (T, half), float, or double where dtype is
  int64_t cos_stride, sin_stride;
  double direction;  // 1, or -1 for the opposite angles
  double eps;
  RopeSide sides[2];  // queries, keys
};

// Tokens [begin, end). rope_norm_backward also writes the tokens' share of the weights' gradients,
// `head_dim` values for q and as many for k, to dweight.
#define FT_DECLARE_ROPE(isa)                                                              \
  namespace isa {                                                                         \
  void rope_forward(const Rope& args, int64_t begin, int64_t end);                        \
  void rope_norm_backward(const Rope& args, void* dweight, int64_t begin, int64_t end);   \
  }
FT_EACH_ISA(FT_DECLARE_ROPE)
#undef FT_DECLARE_ROPE

}  // namespace fasttrain
