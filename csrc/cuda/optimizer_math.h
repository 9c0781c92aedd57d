// What csrc/common/optimizer_math.h needs of a GPU's thread, and that file. On the host, where
// tests/ops/test_cuda_optimizer.py runs the same code, what a GPU estimates is exact.
#pragma once

#include "../common/host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#define FT_ISA gpu
#define FT_INLINE FT_HOST_DEVICE

namespace fasttrain {
namespace gpu {

FT_INLINE uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

FT_INLINE float as_value(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// A root and a quotient that are exact but for a last bit now and then, by an estimate and a step
// of Newton's. The compiler's own call subroutines for what is subnormal, which costs registers.
FT_INLINE float root(float value) {
#ifdef __CUDA_ARCH__
  const float estimate = rsqrtf(value), close = value * estimate;
  const float result = fmaf(fmaf(-close, close, value), 0.5f * estimate, close);
  return value > 0.0f && value < INFINITY ? result : value;
#else
  return sqrtf(value);
#endif
}

FT_INLINE float quotient(float value, float divisor) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  const float close = value * inverse;
  const float result = fmaf(fmaf(-close, divisor, value), inverse, close);
  return divisor < INFINITY ? result : close;
#else
  return value / divisor;
#endif
}

// The second where the first is NaN, as the CPU's.
FT_INLINE float larger(float one, float other) { return fmaxf(one, other); }

FT_INLINE float product(float value, float factor) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(value, factor);
#else
  return value * factor;  // the host is told -ffp-contract=off
#endif
}

template <class V>
FT_INLINE V splat(float value) {
  return value;
}

// Two and three instructions, where the exact ones take some ten each: with moments of 8 bits a
// parameter moves 10 bytes, in whose time an H200 runs 69 instructions.
FT_INLINE float quick_root(float value) {
  const float some = larger(value, 1e-37f);
#ifdef __CUDA_ARCH__
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(some));
  return result;
#else
  return sqrtf(some);
#endif
}

// Divisors are roots and more, so at least 3e-19.
FT_INLINE float quick_quotient(float value, float divisor) {
#ifdef __CUDA_ARCH__
  float result;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(divisor));
  return result;
#else
  return value / divisor;
#endif
}

// A whole number as exponent, by squaring: within 1e-10 of what is exact for any number of steps,
// and a hundredth of the code that pow() is.
FT_INLINE double power(double base, double exponent) {
  double result = 1.0;
  for (int64_t left = static_cast<int64_t>(exponent); left > 0; left /= 2) {
    if (left % 2 == 1) result *= base;
    base *= base;
  }
  return result;
}

// Two values as bfloat16 in a word, the first below; rounded to nearest even.
FT_INLINE uint32_t pair_of(float low, float high) {
#ifdef __CUDA_ARCH__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
#else
  const auto upper_half = [](float value) {
    const uint32_t bits = as_bits(value);
    return value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return upper_half(low) | (upper_half(high) << 16);
#endif
}

}  // namespace gpu
}  // namespace fasttrain

#include "../common/optimizer_math.h"
