// Products of small matrices that lie in the cache, for the CPU kernels: C (+)= A B.
//
// One micro-kernel holds a tile of C in registers: kTileRows rows of two vectors. Its B has the
// tile's columns side by side; its A is read element by element, along rows or along columns, so
// that a transposed A costs nothing. Matrices are in scratch memory, with room for whole tiles:
// what a tile reads past the last row or column only makes values there that nobody reads.
#pragma once

#include "vec.h"

namespace fasttrain {
namespace FT_ISA {

// As many as the registers hold: 12, 16 or 8 sums, a row of B and an element of A.
constexpr int64_t kTileRows = FT_VECTOR_BYTES == 32 ? 6 : FT_VECTOR_BYTES == 64 ? 8 : 4;
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;  // columns of a tile

enum class Along { rows, columns };  // where A's k-th element of a tile's row lies

// [begin, end); empty where end <= begin.
struct Range {
  int64_t begin, end;

  FT_INLINE bool empty() const { return end <= begin; }
  // What is left of it between 0 and size, counted from `origin`.
  FT_INLINE Range within(int64_t origin, int64_t size) const {
    const int64_t first = begin - origin, last = end - origin;
    return {first < 0 ? 0 : first, last > size ? size : last};
  }
};

template <class T>
struct Matrix {
  T* data;
  int64_t stride;  // from row to row

  FT_INLINE T* row(int64_t i) const { return data + i * stride; }
  FT_INLINE Matrix from(int64_t i) const { return {row(i), stride}; }
};

FT_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The stride of rows of `width` elements in scratch memory: an odd number of cache lines, so that
// a column spreads over all sets of the cache.
template <class T>
FT_INLINE int64_t scratch_stride(int64_t width) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  return ((width + line - 1) / line | 1) * line;
}

// C = A B, or with `add` C += A B, of kTileRows rows, kVectors vectors and `depth` terms, at least
// one.
template <class T, int64_t kVectors, Along along, bool add>
void multiply_tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t depth, T* c,
                   int64_t c_stride) {
  Vec<T> sum[kTileRows][kVectors] = {};
  do {
    Vec<T> row[kVectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<T>, Whole{});
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const T element = along == Along::rows ? a[i * a_stride] : a[i];
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) sum[i][v] += element * row[v];
    }
    a += along == Along::rows ? 1 : a_stride;
    b += b_stride;
  } while (--depth > 0);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      if (add) sum[i][v] += load(c + v * kLanes<T>, Whole{});
      store(c + v * kLanes<T>, sum[i][v], Whole{});
    }
    c += c_stride;
  }
}

// The same of up to two vectors of columns.
template <class T, Along along, bool add>
FT_INLINE void multiply_panel(int64_t columns, const T* a, int64_t a_stride, const T* b,
                              int64_t b_stride, int64_t depth, T* c, int64_t c_stride) {
  (columns > kLanes<T> ? multiply_tile<T, 2, along, add> : multiply_tile<T, 1, along, add>)(
      a, a_stride, b, b_stride, depth, c, c_stride);
}

// C (rows x columns) = A (rows x depth) B, where of each tile of rows only the columns
// wanted(first row, row after the last) are needed; others may be left as they are. B lies in
// panels: kPanel columns after kPanel columns, each depth x kPanel.
template <class T, class Wanted>
void multiply_columns(Matrix<T> a, const T* b, int64_t rows, int64_t columns, int64_t depth,
                      Matrix<T> c, Wanted wanted) {
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Range range = wanted(i, i + kTileRows < rows ? i + kTileRows : rows);
      if (range.end <= j || range.begin >= j + kPanel<T> || range.empty()) continue;
      multiply_panel<T, Along::rows, false>(range.end - j, a.row(i), a.stride, b + j * depth,
                                            kPanel<T>, depth, c.row(i) + j, c.stride);
    }
  }
}

// C (rows x columns) += A B, where of each tile of rows only the terms
// wanted(first row, row after the last) are not 0.
template <Along along, class T, class Wanted>
void add_terms(Matrix<T> a, Matrix<T> b, int64_t rows, int64_t columns, Matrix<T> c,
               Wanted wanted) {
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Range range = wanted(i, i + kTileRows < rows ? i + kTileRows : rows);
      if (range.empty()) continue;
      const T* first = along == Along::rows ? a.row(i) + range.begin : a.row(range.begin) + i;
      multiply_panel<T, along, true>(columns - j, first, a.stride, b.row(range.begin) + j, b.stride,
                                     range.end - range.begin, c.row(i) + j, c.stride);
    }
  }
}

}  // namespace FT_ISA
}  // namespace fasttrain
