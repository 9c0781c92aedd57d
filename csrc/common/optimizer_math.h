// What a step does to an element, written once for the CPU's vectors and for a GPU's threads.
//
// V is a float or a vector of floats, U as many uint32_t. The includer provides, in namespace
// FT_ISA: FT_INLINE, as_bits(V) -> U, as_value(U) -> V, root(V), larger(V, V), splat<V>(float);
// product(V, float), which is not fused with what follows; and for moments of 8 bits quick_root(V)
// of at least 1e-37 and quick_quotient(V, V), within 2^-21 of what is exact. A GPU's version is run
// on the host by tests/ops/test_cuda_optimizer.py.
#pragma once

#include "optimizer.h"

namespace fasttrain {
namespace FT_ISA {

// ---- random bits, by counting -------------------------------------------------------------------

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
FT_INLINE uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

FT_INLINE uint64_t keyed(uint64_t key, uint64_t counter) {
  return mixed(key + (counter + 1) * 0x9e3779b97f4a7c15u);
}

// The key of a tensor's step. Elements add the upper half of their number to it.
FT_INLINE uint64_t step_key(uint64_t seed, int64_t stream, float step) {
  return keyed(keyed(seed, static_cast<uint64_t>(stream)), static_cast<uint64_t>(step));
}

// 16 bits for each of two neighbours, the lower ones for that of the even number: a permutation of
// half that number, chosen by the key. The multipliers are those of C. Wellons' search for the least
// biased ones (2018, 2022).
template <class U>
FT_INLINE U random_bits(U half, uint64_t key) {
  U x = half ^ static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = x + static_cast<uint32_t>(key >> 32);
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

// Parameters and moments are rounded by bits of their own.
enum class Use : uint32_t { parameter, moments };
FT_INLINE uint64_t key_for(uint64_t key, Use use) {
  return key + static_cast<uint32_t>(use) * 0x5851f42d4c957f2du;
}

// ---- roundings ----------------------------------------------------------------------------------

// `value` rounded to bfloat16, up with the probability that makes it right on average.
// random, here and below: 16 bits.
template <class V, class U>
FT_INLINE V rounded_at_random(V value, U random) {
  const V sum = as_value((as_bits(value) + random) & 0xffff0000u);
  return value != value ? value : sum;
}

// Eight bits that stand for a share of a block's scale, a power of two; e has 4 bits:
//   root of the second moment  2^-16 (1 + f/16) 2^e, f of 4 bits: never 0, for it divides;
//   first moment, its size     2^-16 ((1 + f/8) 2^e - 1), f of 3 bits, and a sign.
// Rounded at random, for averages move by less than half a step at a time and would stand still.
// The scale is a power of two so that what is stored stays what it is when the scale changes.
constexpr uint32_t kRootShift = 19, kRootBase = 111 * 16;
constexpr uint32_t kSizeShift = 20, kSizeBase = 111 * 8;
constexpr float kLeast = 1.0f / 65536.0f;

// The scale of a block whose largest number is `largest`: so large that rounding it up still fits.
// 0 for a block of zeros, and for one so small (2^-125) that its inverse would be infinite.
FT_INLINE float scale_of(float largest) {
  uint32_t exponent = ((as_bits(largest * 1.0001f) + (1u << kSizeShift)) >> 23) & 0xffu;
  if (exponent < 2) return 0.0f;
  if (exponent > 252) exponent = 252;
  return as_value((exponent + 1) << 23);
}

FT_INLINE float inverse_of(float scale) {
  return scale == 0.0f ? 0.0f : as_value((254u << 23) - as_bits(scale));
}

template <class V, class U>
FT_INLINE V root_of_code(U code, float scale) {
  return as_value((code + kRootBase) << kRootShift) * scale;
}

template <class V, class U>
FT_INLINE U code_of_root(V value, float inverse, U random) {
  const V share = larger(V(value * inverse), splat<V>(kLeast));
  return ((as_bits(share) + (random << 3)) >> kRootShift) - kRootBase;
}

template <class V, class U>
FT_INLINE V first_of_code(U code, float scale) {
  const V size = (as_value(((code & 0x7fu) + kSizeBase) << kSizeShift) - kLeast) * scale;
  return as_value(as_bits(size) | ((code & 0x80u) << 24));
}

template <class V, class U>
FT_INLINE U code_of_first(V value, float inverse, U random) {
  const U bits = as_bits(value);
  const V size = as_value(bits & 0x7fffffffu) * inverse + kLeast;
  const U code = ((as_bits(size) + (random << 4)) >> kSizeShift) - kSizeBase;
  return code | ((bits >> 24) & 0x80u);
}

// ---- the step -----------------------------------------------------------------------------------

// The numbers of one tensor's step.
struct Scalars {
  float factor;  // of gradients
  float decay;   // the parameter is multiplied by it
  float rate;
  float beta1, rest1, beta2, rest2;
  float root_factor, eps;
  float weight_decay;  // added to the gradient
  bool nesterov;
};

// `step`: the number of this step, from 1.
template <Algorithm algorithm>
FT_INLINE Scalars scalars_of(const GroupNumbers& g, double step, const Gate& gate,
                             double (*power)(double, double)) {
  Scalars s{};
  const double scale = gate.grad_scale == nullptr ? 1.0 : static_cast<double>(*gate.grad_scale);
  double factor = g.sign / scale;
  if (gate.norm != nullptr) {
    const double norm = static_cast<double>(*gate.norm) / scale;
    if (gate.max_norm > 0 && gate.max_norm < norm + 1e-6) factor *= gate.max_norm / (norm + 1e-6);
  }
  s.factor = static_cast<float>(factor);
  s.decay = 1.0f;
  s.rate = static_cast<float>(g.lr);
  s.beta1 = static_cast<float>(g.beta1);
  s.rest1 = static_cast<float>(1 - g.beta1);
  s.beta2 = static_cast<float>(g.beta2);
  s.rest2 = static_cast<float>(1 - g.beta2);
  if (algorithm == Algorithm::sgd) {
    s.weight_decay = static_cast<float>(g.weight_decay);
    s.nesterov = g.nesterov != 0;
    s.rest1 = step == 1 ? 1.0f : s.rest2;  // torch's: the first gradient isn't dampened
  } else {
    s.decay = static_cast<float>(1 - g.lr * g.weight_decay);
  }
  if (algorithm == Algorithm::adamw) {
    s.rate = static_cast<float>(g.lr / (1 - power(g.beta1, step)));
    const double correction = 1 - power(g.beta2, step);
    s.root_factor = static_cast<float>(1 / __builtin_sqrt(correction));
    s.eps = static_cast<float>(g.eps);
  }
  return s;
}

// AdamW in two halves, for who keeps the moments in between.
template <class V>
FT_INLINE void move_moments(V grad, V& first, V& second, const Scalars& s) {
  first = first + (grad - first) * s.rest1;
  second = second * s.beta2 + grad * grad * s.rest2;
}

template <class V>
FT_INLINE V adamw_divisor(V root_of_second, const Scalars& s) {
  return root_of_second * s.root_factor + s.eps;
}

// What the parameter is lessened by, beside its decay. first, second: as they are, and become.
// grad: multiplied by the factor already.
template <Algorithm algorithm, bool has_first, class V>
FT_INLINE V change(V param, V grad, V& first, V& second, const Scalars& s) {
  if constexpr (algorithm == Algorithm::adamw) {
    move_moments(grad, first, second, s);
    return first * s.rate / adamw_divisor(root(second), s);
  } else if constexpr (algorithm == Algorithm::lion) {
    const V mix = first * s.beta1 + grad * s.rest1;
    first = first * s.beta2 + grad * s.rest2;
    const V up = splat<V>(s.rate), none = splat<V>(0.0f);
    return mix > 0.0f ? up : (mix < 0.0f ? V(-up) : none);
  } else {
    grad = grad + param * s.weight_decay;
    if constexpr (!has_first) return grad * s.rate;
    first = first * s.beta1 + grad * s.rest1;
    return (s.nesterov ? V(grad + first * s.beta1) : first) * s.rate;
  }
}

// The parameter after its step. Two roundings, as torch makes: with a decay that stays the same,
// other ones than torch's would add up to 6e-6 in 200 steps.
template <class V>
FT_INLINE V moved_by(V param, V lessened, const Scalars& s) {
  return product(param, s.decay) - lessened;
}

}  // namespace FT_ISA
}  // namespace fasttrain
