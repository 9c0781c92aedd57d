// exp, tanh and the normal distribution of vectors, for the CPU kernels. See vec.h for what kernel files must not do.
#pragma once

#include "vec.h"

namespace fasttrain {
namespace FT_ISA {

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87, where floats get denormal.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 7 for exp(r): the coefficients are
// those of the Cephes library (S. Moshier), which minimise the largest error.
FT_INLINE VecF32 exp(VecF32 x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
  const VecF32 shifted = x * 1.44269504088896341f + kRound;
  const VecF32 n = shifted - kRound;
  const VecF32 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  VecF32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Times 2^n: n added to the exponent. (The bits of kRound itself are shifted out.)
  const VecU32 bits = reinterpret_cast<VecU32>(p) + (reinterpret_cast<VecU32>(shifted) << 23);
  const VecF32 result = x < -87.0f ? VecF32{} : reinterpret_cast<VecF32>(bits);
  return x != x ? x : result;
}

// tanh(x), within 3 units in the last place: the odd polynomial of Cephes near 0, where the other
// form would cancel.
FT_INLINE VecF32 tanh(VecF32 x) {
  const VecF32 size = reinterpret_cast<VecF32>(reinterpret_cast<VecU32>(x) & 0x7fffffffu);
  const VecF32 square = x * x;
  VecF32 p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const VecF32 small = p * square * x + x;
  const VecF32 clipped = size > 10.0f ? VecF32{} + 10.0f : size;  // 1 - tanh(10) is 4e-9
  const VecF32 large = 1.0f - 2.0f / (exp(clipped + clipped) + 1.0f);
  return size < 0.625f ? small : x < 0.0f ? -large : large;
}

// The chance that a normal variable exceeds x >= 0: (1 - erf(x / sqrt 2)) / 2, where gaussian is
// exp(-x^2 / 2). Beside the error of gaussian, within 3 units in the last place. It falls as
// gaussian / x, so the quotient of both is a polynomial in t = 1 / (1 + 0.34 x), of degree 9, fitted
// for x <= 13.5 (where gaussian is 0) so as to minimise the largest relative error.
FT_INLINE VecF32 normal_tail(VecF32 x, VecF32 gaussian) {
  const VecF32 t = 1.0f / (1.0f + 0.34f * x);
  VecF32 p = t * -2.637027390e-2f + 1.406721771e-1f;
  p = p * t - 2.754624486e-1f;
  p = p * t + 2.047328055e-1f;
  p = p * t - 4.639515281e-2f;
  p = p * t + 1.160349920e-1f;
  p = p * t + 1.150350869e-1f;
  p = p * t + 1.361334771e-1f;
  p = p * t + 1.356193423e-1f;
  return p * t * gaussian;
}

// In double, for checks of the formulas rather than for speed: the C library's, lane by lane.
FT_INLINE VecF64 exp(VecF64 x) {
  VecF64 result;
  for (int64_t i = 0; i < kLanes<double>; ++i) result[i] = __builtin_exp(x[i]);
  return result;
}
FT_INLINE VecF64 tanh(VecF64 x) {
  VecF64 result;
  for (int64_t i = 0; i < kLanes<double>; ++i) result[i] = __builtin_tanh(x[i]);
  return result;
}
FT_INLINE VecF64 normal_tail(VecF64 x, VecF64) {
  VecF64 result;
  for (int64_t i = 0; i < kLanes<double>; ++i)
    result[i] = 0.5 * __builtin_erfc(x[i] * 0.70710678118654752);
  return result;
}

FT_INLINE float log(float x) { return __builtin_logf(x); }
FT_INLINE double log(double x) { return __builtin_log(x); }

}  // namespace FT_ISA
}  // namespace fasttrain
