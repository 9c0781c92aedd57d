// 8 neighbouring elements, in memory and in a thread's registers. Without a word of CUDA, as
// optimizer_lane.h.
#pragma once

#include <type_traits>

#include "optimizer_math.h"

namespace fasttrain {
namespace gpu {

// The host's compiler knows nothing of it.
#ifdef __CUDA_ARCH__
#define FT_UNROLL _Pragma("unroll")
#else
#define FT_UNROLL
#endif

constexpr int kEach = 8;

struct Bf16 {
  uint16_t bits;
};

// As they are stored, in 8, 4 or 2 registers.
template <class T>
struct Eight {
  static constexpr int kWords = kEach * sizeof(T) / 4;
  uint32_t words[kWords];
};

// Vectors that a thread reads and writes at once.
struct alignas(16) Quad {
  uint32_t x, y, z, w;
};
struct alignas(8) Pair {
  uint32_t x, y;
};

// Which of the 8 there are: all, at an address that is a multiple of their size or of 16 bytes.
struct Whole {};
// Or those from `first` to before `end`, anywhere.
struct Part {
  int first, end;
  FT_INLINE bool has(int i) const { return first <= i && i < end; }
};

// Addresses from a table might be of any kind of memory, for all that the compiler knows. It is
// also kept from computing an address anew for each element, which takes 16 registers.
template <class T>
FT_INLINE T* in_global_memory(T* address) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// begin: the number of the first, which may lie before `values` where it isn't read.
template <class T>
FT_INLINE Eight<T> load(const void* values, int64_t begin, Whole) {
  const T* from = in_global_memory(static_cast<const T*>(values) + begin);
  Eight<T> found;
  if constexpr (Eight<T>::kWords == 2) {
    const Pair pair = *reinterpret_cast<const Pair*>(from);
    found.words[0] = pair.x;
    found.words[1] = pair.y;
  } else {
    FT_UNROLL
    for (int i = 0; i < Eight<T>::kWords; i += 4) {
      const Quad quad = reinterpret_cast<const Quad*>(from)[i / 4];
      found.words[i] = quad.x;
      found.words[i + 1] = quad.y;
      found.words[i + 2] = quad.z;
      found.words[i + 3] = quad.w;
    }
  }
  return found;
}

template <class T>
FT_INLINE void store(void* values, int64_t begin, const Eight<T>& eight, Whole) {
  T* to = in_global_memory(static_cast<T*>(values) + begin);
  if constexpr (Eight<T>::kWords == 2) {
    *reinterpret_cast<Pair*>(to) = {eight.words[0], eight.words[1]};
  } else {
    FT_UNROLL
    for (int i = 0; i < Eight<T>::kWords; i += 4)
      reinterpret_cast<Quad*>(to)[i / 4] = {eight.words[i], eight.words[i + 1], eight.words[i + 2],
                                            eight.words[i + 3]};
  }
}

// An unsigned number as wide as T.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t,
                                std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;

template <class T>
FT_INLINE Eight<T> load(const void* values, int64_t begin, Part part) {
  constexpr int kInWord = 4 / sizeof(T);
  const Bits<T>* from = in_global_memory(static_cast<const Bits<T>*>(values) + begin);
  Eight<T> found{};
  FT_UNROLL
  for (int i = 0; i < kEach; ++i)
    if (part.has(i))
      found.words[i / kInWord] |= static_cast<uint32_t>(from[i]) << 8 * sizeof(T) * (i % kInWord);
  return found;
}

template <class T>
FT_INLINE void store(void* values, int64_t begin, const Eight<T>& eight, Part part) {
  constexpr int kInWord = 4 / sizeof(T);
  Bits<T>* to = in_global_memory(static_cast<Bits<T>*>(values) + begin);
  FT_UNROLL
  for (int i = 0; i < kEach; ++i)
    if (part.has(i))
      to[i] = static_cast<Bits<T>>(eight.words[i / kInWord] >> 8 * sizeof(T) * (i % kInWord));
}

FT_INLINE float value_at(const Eight<float>& eight, int i) { return as_value(eight.words[i]); }
FT_INLINE float value_at(const Eight<Bf16>& eight, int i) {
  const uint32_t word = eight.words[i / 2];
  return as_value(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}
// Codes are bytes, which a GPU takes from words and puts there in one instruction, not in two.
FT_INLINE uint32_t code_at(const Eight<uint8_t>& eight, int i) {
#ifdef __CUDA_ARCH__
  return __byte_perm(eight.words[i / 4], 0, 0x4440 + i % 4);
#else
  return (eight.words[i / 4] >> 8 * (i % 4)) & 0xffu;
#endif
}

// One after the other, from the first on: what `code` has beyond a byte is overwritten by the next.
FT_INLINE void put_code(Eight<uint8_t>& eight, int i, uint32_t code) {
  uint32_t& word = eight.words[i / 4];
#ifdef __CUDA_ARCH__
  constexpr uint32_t kSecond = 0x3240, kThird = 0x3410, kFourth = 0x4210;
  const int place = i % 4;
  word = place == 0   ? code
         : place == 1 ? __byte_perm(word, code, kSecond)
         : place == 2 ? __byte_perm(word, code, kThird)
                      : __byte_perm(word, code, kFourth);
#else
  word = (i % 4 == 0 ? 0 : word) | (code & 0xffu) << 8 * (i % 4);
#endif
}

FT_INLINE Eight<float> floats_of(const float (&values)[kEach]) {
  Eight<float> eight;
  FT_UNROLL
  for (int i = 0; i < kEach; ++i) eight.words[i] = as_bits(values[i]);
  return eight;
}

FT_INLINE Eight<Bf16> to_nearest(const float (&values)[kEach]) {
  Eight<Bf16> eight;
  FT_UNROLL
  for (int i = 0; i < kEach; i += 2) eight.words[i / 2] = pair_of(values[i], values[i + 1]);
  return eight;
}

// Values that are bfloat16 already.
FT_INLINE Eight<Bf16> exactly(const float (&values)[kEach]) {
  Eight<Bf16> eight;
  FT_UNROLL
  for (int i = 0; i < kEach; i += 2)
    eight.words[i / 2] = (as_bits(values[i]) >> 16) | (as_bits(values[i + 1]) & 0xffff0000u);
  return eight;
}

}  // namespace gpu
}  // namespace fasttrain
