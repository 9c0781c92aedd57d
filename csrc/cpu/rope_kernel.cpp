// Rotary position embedding, forward and backward, over a range of tokens.
// Compiled once per instruction set: see vec.h for what that forbids.
#include "rope.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// A token's row of the table.
template <class A>
struct Angles {
  const A *cos, *sin;
  A direction;
};

template <class A>
Angles<A> angles_of(const Rope& args, int64_t token, double direction) {
  return {static_cast<const A*>(args.cos) + token * args.cos_stride,
          static_cast<const A*>(args.sin) + token * args.sin_stride, static_cast<A>(direction)};
}

// The pairs from the i-th on, as many as `lanes` has.
template <bool interleaved, class T, class Lanes>
FT_INLINE Pair<Acc<T>> load_pairs(const T* head, int64_t i, int64_t half, Lanes lanes) {
  if constexpr (interleaved) return load_neighbours(head + 2 * i, lanes);
  return {load(head + i, lanes), load(head + half + i, lanes)};
}

template <bool interleaved, class T, class Lanes>
FT_INLINE void store_pairs(T* head, int64_t i, int64_t half, Pair<Acc<T>> pair, Lanes lanes) {
  if constexpr (interleaved) return store_neighbours(head + 2 * i, pair, lanes);
  store(head + i, pair.first, lanes);
  store(head + half + i, pair.second, lanes);
}

template <class A, class Lanes>
FT_INLINE Pair<A> turn(Pair<A> pair, const Angles<A>& angles, int64_t i, Lanes lanes) {
  const Vec<A> cos = load(angles.cos + i, lanes);
  const Vec<A> sin = load(angles.sin + i, lanes) * angles.direction;
  return {pair.first * cos - pair.second * sin, pair.second * cos + pair.first * sin};
}

template <class T>
Acc<T> reciprocal_rms(const T* head, int64_t head_dim, double eps) {
  using A = Acc<T>;
  const A square_sum = sum_over<A>(head_dim, [&](int64_t i, auto lanes) {
    const Vec<A> value = load(head + i, lanes);
    return value * value;
  });
  const A mean_square = square_sum / static_cast<A>(head_dim);
  return A(1) / static_cast<A>(__builtin_sqrt(mean_square + static_cast<A>(eps)));
}

template <class T, bool interleaved>
void turn_head(const Rope& args, const Angles<Acc<T>>& angles, const T* x, T* out) {
  const int64_t half = args.half, rest = args.head_dim - 2 * half;
  each_vector<Acc<T>>(half, [&](int64_t i, auto lanes) {
    const auto pair = load_pairs<interleaved>(x, i, half, lanes);
    store_pairs<interleaved>(out, i, half, turn(pair, angles, i, lanes), lanes);
  });
  if (rest > 0) __builtin_memcpy(out + 2 * half, x + 2 * half, rest * sizeof(T));
}

template <class T, bool interleaved>
void normalize_and_turn_head(const Rope& args, const Angles<Acc<T>>& angles, const T* x,
                             const Acc<T>* weight, T* out) {
  using A = Acc<T>;
  const int64_t half = args.half, rotary = 2 * half;
  const A rstd = reciprocal_rms(x, args.head_dim, args.eps);
  each_vector<A>(half, [&](int64_t i, auto lanes) {
    auto pair = load_pairs<interleaved>(x, i, half, lanes);
    const auto scale = load_pairs<interleaved>(weight, i, half, lanes);
    pair.first *= rstd * scale.first;
    pair.second *= rstd * scale.second;
    store_pairs<interleaved>(out, i, half, turn(pair, angles, i, lanes), lanes);
  });
  each_vector<A>(args.head_dim - rotary, [&](int64_t i, auto lanes) {
    store(out + rotary + i,
          load(x + rotary + i, lanes) * (rstd * load(weight + rotary + i, lanes)), lanes);
  });
}

// With g = the gradient turned back, v = weight and n = x * rstd:
// dx = rstd * (g * v - n * mean(g * v * n)), and dweight += g * n.
template <class T, bool interleaved>
void backward_head(const Rope& args, const Angles<Acc<T>>& angles, const T* grad, const T* x,
                   const Acc<T>* weight, T* dx, Acc<T>* dweight) {
  using A = Acc<T>;
  const int64_t half = args.half, rotary = 2 * half, rest = args.head_dim - rotary;
  const A rstd = reciprocal_rms(x, args.head_dim, args.eps);
  Vec<A> dot{};
  each_vector<A>(half, [&](int64_t i, auto lanes) {
    const auto g = turn(load_pairs<interleaved>(grad, i, half, lanes), angles, i, lanes);
    const auto value = load_pairs<interleaved>(x, i, half, lanes);
    const auto scale = load_pairs<interleaved>(weight, i, half, lanes);
    auto sum = load_pairs<interleaved>(dweight, i, half, lanes);
    const Vec<A> first = g.first * (value.first * rstd), second = g.second * (value.second * rstd);
    sum.first += first;
    sum.second += second;
    store_pairs<interleaved>(dweight, i, half, sum, lanes);
    dot += first * scale.first + second * scale.second;
  });
  each_vector<A>(rest, [&](int64_t i, auto lanes) {
    const int64_t at = rotary + i;
    const Vec<A> share = load(grad + at, lanes) * (load(x + at, lanes) * rstd);
    store(dweight + at, load(dweight + at, lanes) + share, lanes);
    dot += share * load(weight + at, lanes);
  });
  if (dx == nullptr) return;
  const A mean = sum_lanes<A>(dot) / static_cast<A>(args.head_dim);
  each_vector<A>(half, [&](int64_t i, auto lanes) {
    const auto g = turn(load_pairs<interleaved>(grad, i, half, lanes), angles, i, lanes);
    const auto value = load_pairs<interleaved>(x, i, half, lanes);
    const auto scale = load_pairs<interleaved>(weight, i, half, lanes);
    const Pair<A> result = {(g.first * scale.first - value.first * rstd * mean) * rstd,
                            (g.second * scale.second - value.second * rstd * mean) * rstd};
    store_pairs<interleaved>(dx, i, half, result, lanes);
  });
  each_vector<A>(rest, [&](int64_t i, auto lanes) {
    const int64_t at = rotary + i;
    const Vec<A> g = load(grad + at, lanes) * load(weight + at, lanes);
    store(dx + at, (g - load(x + at, lanes) * rstd * mean) * rstd, lanes);
  });
}

template <class T>
const T* head_of(const Heads& heads, int64_t token, int64_t head) {
  return static_cast<const T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

template <class T>
T* out_of(const Rope& args, const RopeSide& side, int64_t token, int64_t head) {
  if (side.out == nullptr) return nullptr;
  return static_cast<T*>(side.out) + (token * side.heads + head) * args.head_dim;
}

template <class T, bool interleaved>
void forward_tokens(const Rope& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const auto angles = angles_of<Acc<T>>(args, token, args.direction);
    for (const RopeSide& side : args.sides) {
      const auto* weight = static_cast<const Acc<T>*>(side.weight);
      for (int64_t head = 0; head < side.heads; ++head) {
        const T* x = head_of<T>(side.x, token, head);
        T* out = out_of<T>(args, side, token, head);
        if (weight == nullptr) {
          turn_head<T, interleaved>(args, angles, x, out);
        } else {
          normalize_and_turn_head<T, interleaved>(args, angles, x, weight, out);
        }
      }
    }
  }
}

template <class T, bool interleaved>
void backward_tokens(const Rope& args, void* dweight, int64_t begin, int64_t end) {
  using A = Acc<T>;
  A* shares = static_cast<A*>(dweight);
  for (int64_t i = 0; i < 2 * args.head_dim; ++i) shares[i] = A(0);
  for (int64_t token = begin; token < end; ++token) {
    const auto angles = angles_of<A>(args, token, -1.0);
    A* share = shares;
    for (const RopeSide& side : args.sides) {
      for (int64_t head = 0; head < side.heads; ++head)
        backward_head<T, interleaved>(
            args, angles, head_of<T>(side.grad, token, head), head_of<T>(side.x, token, head),
            static_cast<const A*>(side.weight), out_of<T>(args, side, token, head), share);
      share += args.head_dim;
    }
  }
}

}  // namespace

void rope_forward(const Rope& args, int64_t begin, int64_t end) {
  const bool interleaved = args.interleaved;
  const auto run = args.dtype == DType::f64
                       ? (interleaved ? forward_tokens<double, true> : forward_tokens<double, false>)
                   : args.dtype == DType::f32
                       ? (interleaved ? forward_tokens<float, true> : forward_tokens<float, false>)
                       : (interleaved ? forward_tokens<BFloat16, true>
                                      : forward_tokens<BFloat16, false>);
  run(args, begin, end);
}

void rope_norm_backward(const Rope& args, void* dweight, int64_t begin, int64_t end) {
  const bool interleaved = args.interleaved;
  const auto run =
      args.dtype == DType::f64
          ? (interleaved ? backward_tokens<double, true> : backward_tokens<double, false>)
      : args.dtype == DType::f32
          ? (interleaved ? backward_tokens<float, true> : backward_tokens<float, false>)
          : (interleaved ? backward_tokens<BFloat16, true> : backward_tokens<BFloat16, false>);
  run(args, dweight, begin, end);
}

}  // namespace FT_ISA
}  // namespace fasttrain
