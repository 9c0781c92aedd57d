// What forward and backward attention share: which keys a query sees, rows of scores of which a
// part is seen, and scratch memory.
#pragma once

#include "packed_attention.h"
#include "small_gemm.h"
#include "vec.h"
#include "vec_math.h"

namespace fasttrain {
namespace FT_ISA {

// What queries and keys of one document see of each other; positions count from its begin.
struct Seen {
  bool causal;
  int64_t window;
  int64_t length;

  FT_INLINE Range keys(int64_t query) const {
    const int64_t last = causal ? query + 1 : query + window;
    return {query < window ? 0 : query - window + 1, last < length ? last : length};
  }
  FT_INLINE Range queries(int64_t key) const {
    const int64_t last = key + window;
    return {causal ? key : key < window ? 0 : key - window + 1, last < length ? last : length};
  }
  // Of several, begin to end - 1. Both ends of a range rise with its position.
  FT_INLINE Range keys(int64_t begin, int64_t end) const {
    return {keys(begin).begin, keys(end - 1).end};
  }
  FT_INLINE Range queries(int64_t begin, int64_t end) const {
    return {queries(begin).begin, queries(end - 1).end};
  }
};

// ---- rows of scores --------------------------------------------------------------------------

template <class T>
FT_INLINE T lowest() {
  return -static_cast<T>(__builtin_inf());
}

template <class T>
FT_INLINE T exp_of(T x) {
  return exp(Vec<T>{} + x)[0];
}

// s = scale * x, or softcap * tanh(scale * x / softcap).
template <class T, bool softcap>
struct Score {
  T factor, cap;

  explicit Score(const PackedAttention& args)
      : factor(static_cast<T>(softcap ? args.scale / args.softcap : args.scale)),
        cap(static_cast<T>(args.softcap)) {}
  FT_INLINE Vec<T> operator()(Vec<T> product) const {
    return softcap ? tanh(product * factor) * cap : product * factor;
  }
  // ds/dx / scale.
  FT_INLINE Vec<T> slope(Vec<T> score) const {
    const Vec<T> ratio = score / cap;
    return T(1) - ratio * ratio;
  }
};

// The lanes of a vector that are seen: [begin, end).
struct Between {
  int64_t begin, end;
};

template <class T>
FT_INLINE Vec<T> unseen_as(T, Vec<T> value, Whole) {
  return value;
}
template <class T>
FT_INLINE Vec<T> unseen_as(T other, Vec<T> value, Between lanes) {
  Vec<T> number{};
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes<T>; ++i) number[i] = static_cast<T>(i);
  const Vec<T> others = Vec<T>{} + other;
  const Vec<T> from_begin = number < static_cast<T>(lanes.begin) ? others : value;
  return number < static_cast<T>(lanes.end) ? from_begin : others;
}

// body(offset, lanes) for each vector of a row that holds something seen; the first and the last
// may hold something else as well.
template <class T, class Body>
FT_INLINE void each_seen(Range seen, Body body) {
  int64_t i = seen.begin / kLanes<T> * kLanes<T>;
  if (i < seen.begin && i < seen.end) {
    body(i, Between{seen.begin - i, seen.end - i});
    i += kLanes<T>;
  }
  for (; i + kLanes<T> <= seen.end; i += kLanes<T>) body(i, Whole{});
  if (i < seen.end) body(i, Between{0, seen.end - i});
}

// Zero in every vector of a row that each_seen leaves out.
template <class T>
FT_INLINE void clear_unseen(T* row, Range seen, int64_t columns) {
  const int64_t begin = seen.empty() ? columns : seen.begin / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < begin; i += kLanes<T>) store(row + i, Vec<T>{}, Whole{});
  if (seen.empty()) return;
  for (int64_t i = round_up(seen.end, kLanes<T>); i < columns; i += kLanes<T>)
    store(row + i, Vec<T>{}, Whole{});
}

// ---- scratch memory --------------------------------------------------------------------------

template <class T>
void clear(Matrix<T> matrix, int64_t rows) {
  __builtin_memset(matrix.data, 0, rows * matrix.stride * sizeof(T));
}

// Hands out memory piece by piece; from address 0, to find how much there has to be.
struct Scratch {
  uintptr_t next;

  template <class T>
  T* values(int64_t count) {
    T* const result = reinterpret_cast<T*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return result;
  }
  // With room for the rows of a last tile.
  template <class T>
  Matrix<T> matrix(int64_t rows, int64_t width) {
    const int64_t stride = scratch_stride<T>(width);
    return {values<T>(round_up(rows, kTileRows) * stride), stride};
  }
  // For transpose_rows.
  template <class T>
  T* panels(int64_t columns, int64_t width) {
    return values<T>(round_up(columns, kPanel<T>) * width);
  }
};

template <class Stored>
FT_INLINE Stored* row_of(const Heads& heads, int64_t token, int64_t head) {
  return static_cast<Stored*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

// Scratch rows times `factor`, as they are stored.
template <class Stored>
FT_INLINE void store_row(const Acc<Stored>* from, Acc<Stored> factor, int64_t width, Stored* to) {
  using T = Acc<Stored>;
  each_vector<T>(width, [&](int64_t i, auto lanes) {
    store(to + i, load(from + i, Whole{}) * factor, lanes);
  });
}

FT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace FT_ISA
}  // namespace fasttrain
