// The gradient of an embedding: what the op (embedding.cpp) asks of the kernel
// (embedding_kernel.cpp). The formulas are in kernels/fasttrain_kernels/ops/embedding/reference.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fasttrain {

// Columns that are added up at a time: a sum of 4 KB (float) stays in the nearest cache, and what is
// read of a row is long enough to be read ahead.
constexpr int64_t kEmbeddingColumns = 1024;

// A place is a position among the tokens, sorted by row. dy: rows of `width` elements, a stride
// apart. dweight (rows, width) is contiguous.
struct EmbeddingBackward {
  int64_t count;  // of tokens
  int64_t rows;
  int64_t width;
  const void* dy;
  int64_t dy_stride;
  DType dtype;            // of dy and dweight
  const int32_t* owners;  // the row of dweight that each place adds to; `rows`: none
  const int64_t* tokens;  // the token at each place
  void* dweight;
};

// Adds up the rows that begin at one of the places [begin, end): the first `count` places are those
// of the first block of columns, the next those of the second.
#define FT_DECLARE_EMBEDDING(isa)                                                      \
  namespace isa {                                                                      \
  void embedding_backward(const EmbeddingBackward& args, int64_t begin, int64_t end);  \
  }
FT_EACH_ISA(FT_DECLARE_EMBEDDING)
#undef FT_DECLARE_EMBEDDING

}  // namespace fasttrain
