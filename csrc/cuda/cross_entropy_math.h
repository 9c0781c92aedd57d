// Cross-entropy element by element, in float, as ops/cross_entropy/reference.py defines it.
// The kernels run it on the GPU; tests/ops/test_cuda_build.py runs the same code on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace fasttrain {

// What the terms of the loss come to for one element.
struct Terms {
  float scale;
  float softcap;  // 0: none
  float inner;    // a logit is multiplied by it first: scale, or scale / softcap
  float uniform;  // label_smoothing / classes
  float hit;      // 1 - label_smoothing
  float z_loss;
};

inline Terms terms_of(double scale, double softcap, double label_smoothing, double z_loss,
                      int64_t classes) {
  Terms terms{};
  terms.scale = static_cast<float>(scale);
  terms.softcap = static_cast<float>(softcap);
  terms.inner = static_cast<float>(softcap == 0 ? scale : scale / softcap);
  terms.uniform = static_cast<float>(label_smoothing / static_cast<double>(classes));
  terms.hit = static_cast<float>(1 - label_smoothing);
  terms.z_loss = static_cast<float>(z_loss);
  return terms;
}

// A product that no compiler fuses with the subtraction of the maximum after it. Fused, the largest
// z would be unrounded but the maximum rounded: at 1e4 exp(z - maximum) comes to 1.0006, not 1.
FT_HOST_DEVICE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;  // the host is told -ffp-contract=off
#endif
}

// NaN where either is NaN, which fmaxf is not.
FT_HOST_DEVICE float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || a > b ? a : b;
#endif
}

// e^x in two instructions where expf takes eight; two of them an element would bind, not memory.
// The product's rounding costs |x| / 2^24 of the result, which is what rounding x itself costs.
FT_HOST_DEVICE float exp_of(float x) {
  const float power = product(x, 1.44269504f);
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
  return result;
#else
  return std::exp2(power);
#endif
}

// What is subtracted before exp: the maximum, but 0 for a row of nothing but -inf.
FT_HOST_DEVICE float finite(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

struct Capped {
  float z;
  float slope;  // dz / d(scale * logit)
};

template <bool kSoftcap>
FT_HOST_DEVICE Capped capped(float logit, const Terms& terms) {
  const float inner = product(logit, terms.inner);
  if (!kSoftcap) return {inner, 1.0f};
  const float bent = tanhf(inner);
  return {product(terms.softcap, bent), 1.0f - bent * bent};
}

// The statistics of some columns of a row, but for the label's.
struct Sums {
  float maximum = -INFINITY;
  float sum = 0.0f;
  float total = 0.0f;
  float weighted = 0.0f;
};

template <int n>
FT_HOST_DEVICE void add(Sums& sums, const float (&z)[n], bool wants_total, bool wants_entropy) {
  float largest = z[0];
  for (int i = 1; i < n; ++i) largest = larger(largest, z[i]);
  if (!(largest <= sums.maximum)) {  // larger, or NaN
    const float maximum = larger(sums.maximum, largest);
    const float factor = exp_of(sums.maximum - finite(maximum));
    sums.maximum = maximum;
    sums.sum *= factor;
    sums.weighted *= factor;
  }
  const float base = finite(sums.maximum);
  float e[n];
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += e[i] = exp_of(z[i] - base);
  sums.sum += sum;
  if (wants_total) {
    float total = 0.0f;
    for (int i = 0; i < n; ++i) total += z[i];
    sums.total += total;
  }
  if (wants_entropy) {
    float weighted = 0.0f;
    for (int i = 0; i < n; ++i) weighted += e[i] == 0.0f ? 0.0f : e[i] * z[i];
    sums.weighted += weighted;
  }
}

FT_HOST_DEVICE Sums merged(const Sums& one, const Sums& other) {
  Sums both;
  both.maximum = larger(one.maximum, other.maximum);
  const float base = finite(both.maximum);
  const float one_factor = exp_of(one.maximum - base), other_factor = exp_of(other.maximum - base);
  both.sum = one.sum * one_factor + other.sum * other_factor;
  both.total = one.total + other.total;
  both.weighted = one.weighted * one_factor + other.weighted * other_factor;
  return both;
}

// What all elements of a row's gradient share.
struct RowGradient {
  float base;
  float probability;  // exp(z - base) times this: p, with the z-loss p (1 + 2 zeta lse)
  float weight;       // coefficient * scale
  float weighted_probability;
  float weighted_uniform;
};

FT_HOST_DEVICE RowGradient row_gradient(float maximum, float sum, float coefficient,
                                        const Terms& terms) {
  const float lse_term = terms.z_loss == 0.0f ? 0.0f : 2.0f * terms.z_loss * (maximum + logf(sum));
  const float probability = (1.0f + lse_term) / sum;
  const float weight = coefficient * terms.scale;
  const float uniform = terms.uniform == 0.0f ? 0.0f : terms.uniform * weight;
  return {finite(maximum), probability, weight, probability * weight, uniform};
}

// The gradient of an element that is not the label's.
FT_HOST_DEVICE float gradient(const Capped& value, const RowGradient& row) {
  return (exp_of(value.z - row.base) * row.weighted_probability - row.weighted_uniform) *
         value.slope;
}

// The label's. p and 1 meet before the weight rounds either of them.
FT_HOST_DEVICE float label_gradient(const Capped& value, const RowGradient& row,
                                    const Terms& terms) {
  const float p = exp_of(value.z - row.base) * row.probability;
  return (p - terms.uniform - terms.hit) * value.slope * row.weight;
}

}  // namespace fasttrain
