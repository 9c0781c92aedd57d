// Gated linear units, forward and backward, over a range of a row.
// Compiled once per instruction set: see vec.h for what that forbids.
#include "glu.h"
#include "vec.h"
#include "vec_math.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// An activation is g * share(g); slope is the derivative of share.
template <class V>
struct Passed {
  V share, slope;
};

// The logistic function, by an exponential that can't overflow.
template <class V>
FT_INLINE Passed<V> logistic(V x) {
  const V e = exp(x < 0 ? x : -x);
  const V larger = 1 / (1 + e);
  const V smaller = e * larger;
  return {x < 0 ? smaller : larger, smaller * larger};
}

template <Activation activation, class V>
FT_INLINE Passed<V> passed(V g) {
  if constexpr (activation == Activation::silu) {
    return logistic(g);
  } else if constexpr (activation == Activation::gelu_tanh) {
    // (1 + tanh(a)) / 2 is the logistic function of 2a.
    constexpr double k2RootTwoOverPi = 1.5957691216057308, kCubic = 0.044715 * k2RootTwoOverPi;
    using T = decltype(g[0] + g[0]);
    const V square = g * g;
    const Passed<V> at = logistic(g * (T(k2RootTwoOverPi) + T(kCubic) * square));
    return {at.share, at.slope * (T(k2RootTwoOverPi) + T(3 * kCubic) * square)};
  } else {
    using T = decltype(g[0] + g[0]);
    constexpr double kOneOverRootTwoPi = 0.39894228040143268;
    const V gaussian = exp(g * g * T(-0.5));
    const V tail = normal_tail(g < 0 ? -g : g, gaussian);
    return {g < 0 ? tail : 1 - tail, gaussian * T(kOneOverRootTwoPi)};
  }
}

// From here on share is 0 or 1, and slope 0, in float and in double. Gates are clipped to it, since
// an infinite one times 0 would be NaN; where share is 1 only the slope's needs to be.
constexpr float kSaturated = 1000.0f;

template <class V>
FT_INLINE V clipped_below(V g) {
  return g < -kSaturated ? V{} - kSaturated : g;
}
template <class V>
FT_INLINE V clipped_above(V g) {
  return g > kSaturated ? V{} + kSaturated : g;
}

template <class X, Activation activation>
void forward_row(const X* gate, const X* up, X* y, int64_t width) {
  each_vector<Acc<X>>(width, [&](int64_t i, auto lanes) {
    const auto g = clipped_below(load(gate + i, lanes));
    store(y + i, g * passed<activation>(g).share * load(up + i, lanes), lanes);
  });
}

template <class X, Activation activation>
void backward_row(const X* dy, const X* gate, const X* up, X* dgate, X* dup, int64_t width) {
  each_vector<Acc<X>>(width, [&](int64_t i, auto lanes) {
    const auto g = clipped_below(load(gate + i, lanes));
    const auto within = clipped_above(g);
    const auto found = passed<activation>(within);
    const auto grad = load(dy + i, lanes);
    if (dgate != nullptr) {
      const auto slope = found.share + within * found.slope;
      store(dgate + i, grad * load(up + i, lanes) * slope, lanes);
    }
    if (dup != nullptr) store(dup + i, grad * (g * found.share), lanes);
  });
}

template <class X>
const X* at(const void* base, int64_t offset) {
  return static_cast<const X*>(base) + offset;
}
template <class X>
X* at(void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<X*>(base) + offset;
}

template <class X, Activation activation>
void forward(const GluForward& args, int64_t row, int64_t begin, int64_t width) {
  forward_row<X, activation>(at<X>(args.gate, row * args.gate_stride + begin),
                             at<X>(args.up, row * args.up_stride + begin),
                             at<X>(args.y, row * args.y_stride + begin), width);
}

template <class X, Activation activation>
void backward(const GluBackward& args, int64_t row, int64_t begin, int64_t width) {
  backward_row<X, activation>(at<X>(args.dy, row * args.dy_stride + begin),
                              at<X>(args.gate, row * args.gate_stride + begin),
                              at<X>(args.up, row * args.up_stride + begin),
                              at<X>(args.dgate, row * args.dgate_stride + begin),
                              at<X>(args.dup, row * args.dup_stride + begin), width);
}

// The same function for every dtype and activation.
#define FT_EACH_ACTIVATION(function, X, ...)                                                   \
  switch (args.activation) {                                                                   \
    case Activation::silu:                                                                     \
      return function<X, Activation::silu>(__VA_ARGS__);                                       \
    case Activation::gelu_tanh:                                                                \
      return function<X, Activation::gelu_tanh>(__VA_ARGS__);                                  \
    case Activation::gelu:                                                                     \
      return function<X, Activation::gelu>(__VA_ARGS__);                                       \
  }
#define FT_EACH_DTYPE(function, ...)                    \
  switch (args.dtype) {                                 \
    case DType::f32:                                    \
      FT_EACH_ACTIVATION(function, float, __VA_ARGS__)  \
      break;                                            \
    case DType::f64:                                    \
      FT_EACH_ACTIVATION(function, double, __VA_ARGS__) \
      break;                                            \
    case DType::bf16:                                   \
      FT_EACH_ACTIVATION(function, BFloat16, __VA_ARGS__) \
  }

}  // namespace

void glu_forward(const GluForward& args, int64_t row, int64_t begin, int64_t end) {
  FT_EACH_DTYPE(forward, args, row, begin, end - begin)
}

void glu_backward(const GluBackward& args, int64_t row, int64_t begin, int64_t end) {
  FT_EACH_DTYPE(backward, args, row, begin, end - begin)
}

}  // namespace FT_ISA
}  // namespace fasttrain
