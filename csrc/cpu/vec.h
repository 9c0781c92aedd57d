// Vectors for the CPU kernels, written once for every instruction set.
//
// A kernel file is compiled once per instruction set, each time with FT_ISA (a namespace) and
// FT_VECTOR_BYTES (16, 32 or 64) defined by CMake. GCC's and Clang's vector extensions turn the
// same source into SSE2 or NEON, AVX2, or AVX-512 code.
//
// Two rules keep an AVX-512 instruction from being reached on a CPU without it: everything here
// lives in namespace fasttrain::FT_ISA, and kernel files include neither torch nor any standard
// header with inline code. (The linker keeps one copy of an inline function shared by two files,
// and may well keep the one that was compiled for AVX-512.)
#pragma once

#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace fasttrain {

// How a value lies in memory. Arithmetic is in float, for double in double.
struct BFloat16 {
  uint16_t bits;
};

namespace FT_ISA {

#define FT_INLINE inline __attribute__((always_inline))

template <class Stored>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class Stored>
using Acc = typename AccumulateIn<Stored>::type;

typedef float VecF32 __attribute__((vector_size(FT_VECTOR_BYTES)));
typedef double VecF64 __attribute__((vector_size(FT_VECTOR_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(FT_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(FT_VECTOR_BYTES / 2)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF32;
};
template <>
struct VecOf<double> {
  using type = VecF64;
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int64_t kLanes = FT_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

// ---- bfloat16 <-> float: the upper half of a float, rounded to nearest even --------------------

// Between 16 and 32 bits. __builtin_convertvector says it for every instruction set, but GCC 12
// makes six instructions of it where AVX has one.
FT_INLINE VecU32 to_32_bits(VecU16 bits) {
#if defined(__AVX512BW__)
  return reinterpret_cast<VecU32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, VecU32);
#endif
}

FT_INLINE VecU16 to_16_bits(VecU32 bits) {
#if defined(__AVX512BW__)
  return reinterpret_cast<VecU16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i all = reinterpret_cast<__m256i>(bits);
  return reinterpret_cast<VecU16>(
      _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  return __builtin_convertvector(bits, VecU16);
#endif
}

FT_INLINE VecF32 widen(VecU16 bits) { return reinterpret_cast<VecF32>(to_32_bits(bits) << 16); }

// The result is in the upper halves; what is left in the lower ones means nothing.
FT_INLINE VecU32 round_upper_half(VecF32 value) {
  const VecU32 bits = reinterpret_cast<VecU32>(value);
  const VecU32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // Rounding could carry a NaN's mantissa over into infinity: keep NaN, made quiet.
  return value != value ? bits | 0x400000u : rounded;
}

FT_INLINE VecU16 narrow(VecF32 value) {
  return to_16_bits(round_upper_half(value) >> 16);
}

// What `value` becomes when it is stored as T and read back.
template <class T>
FT_INLINE Vec<Acc<T>> round_to(Vec<Acc<T>> value) {
  return value;
}
template <>
FT_INLINE VecF32 round_to<BFloat16>(VecF32 value) {
  return reinterpret_cast<VecF32>(round_upper_half(value) & 0xffff0000u);
}

// ---- contraction ---------------------------------------------------------------------------------

// The value, rounded: what is made of it later is not fused with the product that it is. (Fused,
// the largest z of a row would be unrounded but the row's maximum rounded.)
template <class V>
FT_INLINE V rounded(V value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile V stored = value;
  value = stored;
#endif
  return value;
}

// ---- loads and stores: unaligned, whole or the first n lanes -----------------------------------

struct Whole {};
struct First {
  int64_t n;
};

FT_INLINE VecF32 load(const float* from, Whole) {
  VecF32 value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
FT_INLINE VecF64 load(const double* from, Whole) {
  VecF64 value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
FT_INLINE VecF32 load(const BFloat16* from, Whole) {
  VecU16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return widen(bits);
}

FT_INLINE void store(float* to, VecF32 value, Whole) { __builtin_memcpy(to, &value, sizeof(value)); }
FT_INLINE void store(double* to, VecF64 value, Whole) {
  __builtin_memcpy(to, &value, sizeof(value));
}
FT_INLINE void store(BFloat16* to, VecF32 value, Whole) {
  const VecU16 bits = narrow(value);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// The upper half alone, of a value whose lower half is 0: no rounding is left to do.
FT_INLINE void store_upper_half(BFloat16* to, VecF32 value, Whole) {
  const VecU16 bits = to_16_bits(reinterpret_cast<VecU32>(value) >> 16);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// Lanes past the n-th read as zero; memory past them is not touched.
template <class T>
FT_INLINE Vec<Acc<T>> load(const T* from, First first) {
  T buffer[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < first.n; ++i) buffer[i] = from[i];
  return load(buffer, Whole{});
}
template <class T>
FT_INLINE void store(T* to, Vec<Acc<T>> value, First first) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, value, Whole{});
  for (int64_t i = 0; i < first.n; ++i) to[i] = buffer[i];
}

FT_INLINE void store_upper_half(BFloat16* to, VecF32 value, First first) { store(to, value, first); }

// ---- pairs: neighbours in memory, or elements of two halves --------------------------------------

template <class T>
struct Pair {
  Vec<T> first, second;
};

// Lane i is lane mask[i] of the two vectors laid side by side. The masks are constants.
template <class V, class Mask>
FT_INLINE V shuffle(V low, V high, Mask mask) {
#if defined(__clang__)
  constexpr int64_t lanes = sizeof(V) / sizeof(low[0]);
  V result{};
#pragma clang loop unroll(full)
  for (int64_t i = 0; i < lanes; ++i) result[i] = mask[i] < lanes ? low[mask[i]] : high[mask[i] - lanes];
  return result;
#else
  return __builtin_shuffle(low, high, mask);
#endif
}

template <class T>
struct IndexOf {
  typedef int32_t type __attribute__((vector_size(FT_VECTOR_BYTES)));
};
template <>
struct IndexOf<double> {
  typedef int64_t type __attribute__((vector_size(FT_VECTOR_BYTES)));
};

// Elements 0, 2, 4 ... and 1, 3, 5 ... of two vectors in a row.
template <class T>
FT_INLINE Pair<T> apart(Vec<T> low, Vec<T> high) {
  typename IndexOf<T>::type even;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes<T>; ++i) even[i] = 2 * i;
  return {shuffle(low, high, even), shuffle(low, high, even + 1)};
}

// The other way: two vectors whose elements take turns. first: the lower one.
template <class T>
FT_INLINE Pair<T> in_turn(Pair<T> pair) {
  typename IndexOf<T>::type low;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes<T>; ++i) low[i] = i / 2 + (i % 2) * kLanes<T>;
  return {shuffle(pair.first, pair.second, low),
          shuffle(pair.first, pair.second, low + kLanes<T> / 2)};
}

// As many pairs of neighbours as a vector has lanes.
template <class T>
FT_INLINE Pair<T> load_neighbours(const T* from, Whole) {
  return apart<T>(load(from, Whole{}), load(from + kLanes<T>, Whole{}));
}
FT_INLINE Pair<float> load_neighbours(const BFloat16* from, Whole) {
  VecU32 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return {reinterpret_cast<VecF32>(bits << 16), reinterpret_cast<VecF32>(bits & 0xffff0000u)};
}

template <class T>
FT_INLINE void store_neighbours(T* to, Pair<T> pair, Whole) {
  const Pair<T> rows = in_turn(pair);
  store(to, rows.first, Whole{});
  store(to + kLanes<T>, rows.second, Whole{});
}
FT_INLINE void store_neighbours(BFloat16* to, Pair<float> pair, Whole) {
  const VecU32 bits = (round_upper_half(pair.first) >> 16) |
                      (round_upper_half(pair.second) & 0xffff0000u);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// Only the first n pairs: the others read as zero, and their memory is not touched.
template <class T>
FT_INLINE Pair<Acc<T>> load_neighbours(const T* from, First first) {
  T buffer[2 * kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < 2 * first.n; ++i) buffer[i] = from[i];
  return load_neighbours(buffer, Whole{});
}
template <class T>
FT_INLINE void store_neighbours(T* to, Pair<Acc<T>> pair, First first) {
  T buffer[2 * kLanes<Acc<T>>];
  store_neighbours(buffer, pair, Whole{});
  for (int64_t i = 0; i < 2 * first.n; ++i) to[i] = buffer[i];
}

// ---- loops over a row ----------------------------------------------------------------------------

// body(offset, lanes) for each vector of a row; `lanes` is Whole, for the last one perhaps First.
template <class T, class Body>
FT_INLINE void each_vector(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) body(i, Whole{});
  if (i < width) body(i, First{width - i});
}

template <class T>
FT_INLINE T sum_lanes(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value, Whole{});
#pragma GCC unroll 4
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The sum over a row of term(offset, lanes), always in the same order. Four running sums hide the
// four cycles that an addition takes.
template <class T, class Term>
FT_INLINE T sum_over(int64_t width, Term term) {
  constexpr int64_t step = kLanes<T>;
  Vec<T> a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * step <= width; i += 4 * step) {
    a += term(i, Whole{});
    b += term(i + step, Whole{});
    c += term(i + 2 * step, Whole{});
    d += term(i + 3 * step, Whole{});
  }
  for (; i + step <= width; i += step) a += term(i, Whole{});
  if (i < width) b += term(i, First{width - i});
  return sum_lanes<T>((a + b) + (c + d));
}

}  // namespace FT_ISA
}  // namespace fasttrain
