// Rows of a tensor into scratch memory, as they are or transposed, for the CPU kernels.
#pragma once

#include "small_gemm.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {

typedef uint64_t VecU64 __attribute__((vector_size(FT_VECTOR_BYTES)));

#ifdef __clang__
#define FT_SHUFFLE(a, b, Index, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FT_SHUFFLE(a, b, Index, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// Lanes of a and of b by turns: those of their first halves, then those of their second halves.
#if FT_VECTOR_BYTES == 16
#define FT_FIRST_32 0, 4, 1, 5
#define FT_SECOND_32 2, 6, 3, 7
#define FT_FIRST_64 0, 2
#define FT_SECOND_64 1, 3
#elif FT_VECTOR_BYTES == 32
#define FT_FIRST_32 0, 8, 1, 9, 2, 10, 3, 11
#define FT_SECOND_32 4, 12, 5, 13, 6, 14, 7, 15
#define FT_FIRST_64 0, 4, 1, 5
#define FT_SECOND_64 2, 6, 3, 7
#else
#define FT_FIRST_32 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FT_SECOND_32 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define FT_FIRST_64 0, 8, 1, 9, 2, 10, 3, 11
#define FT_SECOND_64 4, 12, 5, 13, 6, 14, 7, 15
#endif

FT_INLINE void interleave(VecF32 a, VecF32 b, VecF32& first, VecF32& second) {
  first = FT_SHUFFLE(a, b, VecU32, FT_FIRST_32);
  second = FT_SHUFFLE(a, b, VecU32, FT_SECOND_32);
}
FT_INLINE void interleave(VecF64 a, VecF64 b, VecF64& first, VecF64& second) {
  first = FT_SHUFFLE(a, b, VecU64, FT_FIRST_64);
  second = FT_SHUFFLE(a, b, VecU64, FT_SECOND_64);
}

// A square of vectors. Interleaving the upper half of the rows with the lower turns the digits of
// (row, column), as one binary number, by one place; log2(lanes) times, and they are exchanged.
template <class T>
FT_INLINE void transpose(Vec<T>* rows) {
#pragma GCC unroll 4
  for (int64_t turn = 1; turn < kLanes<T>; turn *= 2) {
    Vec<T> turned[kLanes<T>];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes<T> / 2; ++i)
      interleave(rows[i], rows[i + kLanes<T> / 2], turned[2 * i], turned[2 * i + 1]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes<T>; ++i) rows[i] = turned[i];
  }
}

// Asks for rows that will be read soon: rows of one head lie too far apart for the processor to
// guess.
template <class Stored>
FT_INLINE void prefetch_rows(const Stored* from, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(Stored)))
      __builtin_prefetch(from + i * stride + j, 0, 2);
}

// Rows of `width` elements, a stride apart, as rows of scratch memory in the accumulator's type.
template <class Stored>
void copy_rows(const Stored* from, int64_t stride, int64_t rows, int64_t width,
               Matrix<Acc<Stored>> to) {
  using T = Acc<Stored>;
  for (int64_t i = 0; i < rows; ++i)
    each_vector<T>(width, [&](int64_t j, auto lanes) {
      store(to.row(i) + j, load(from + i * stride + j, lanes), Whole{});
    });
}

// kLanes rows and columns of `from`, of which `rows` and `lanes` exist, transposed.
template <class Stored, class Lanes>
FT_INLINE void transpose_square(const Stored* from, int64_t stride, int64_t rows, Lanes lanes,
                                int64_t columns, Acc<Stored>* to) {
  using T = Acc<Stored>;
  Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes<T>; ++i)
    square[i] = i < rows ? load(from + i * stride, lanes) : Vec<T>{};
  transpose<T>(square);
#pragma GCC unroll 16
  for (int64_t j = 0; j < kLanes<T>; ++j)
    if (j < columns) store(to + j * kPanel<T>, square[j], Whole{});
}

// Rows of `width` elements, a stride apart, as the columns of a matrix in panels
// (multiply_columns). Columns are added up to a whole vector, of zeros.
template <class Stored>
void transpose_rows(const Stored* from, int64_t stride, int64_t rows, int64_t width,
                    Acc<Stored>* to) {
  using T = Acc<Stored>;
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    T* panel = to + i / kPanel<T> * kPanel<T> * width + i % kPanel<T>;
    const Stored* first = from + i * stride;
    each_vector<T>(width, [&](int64_t j, auto lanes) {
      const int64_t columns = width - j < kLanes<T> ? width - j : kLanes<T>;
      transpose_square(first + j, stride, rows - i, lanes, columns, panel + j * kPanel<T>);
    });
  }
}

}  // namespace FT_ISA
}  // namespace fasttrain
