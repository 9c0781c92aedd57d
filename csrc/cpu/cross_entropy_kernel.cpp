// Cross-entropy of rows of logits, forward and backward, over a range of rows.
// Compiled once per instruction set: see vec.h for what that forbids.
#include "cross_entropy.h"
#include "vec.h"
#include "vec_math.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

constexpr int64_t kIgnored = -1;

// One row of the statistics.
template <class T>
struct Statistics {
  T maximum, sum, label, total, weighted;
};

// z, from what is stored.
template <class T, bool softcap>
struct Capped {
  T scale, cap;
  FT_INLINE Vec<T> operator()(Vec<T> logit) const {
    const Vec<T> z = logit * scale;
    return rounded(softcap ? tanh(z / cap) * cap : z);
  }
};

template <class T>
FT_INLINE T lowest() {
  return -static_cast<T>(__builtin_inf());
}

// Lanes past the end of a row take part in no maximum and in no sum: exp(-inf) is 0.
template <class T>
FT_INLINE Vec<T> without_tail(Vec<T> value, Whole) {
  return value;
}
template <class T>
FT_INLINE Vec<T> without_tail(Vec<T> value, First lanes) {
  for (int64_t i = lanes.n; i < kLanes<T>; ++i) value[i] = lowest<T>();
  return value;
}

// NaN is passed over: it shows in the sum.
template <class T>
FT_INLINE Vec<T> larger(Vec<T> one, Vec<T> other) {
  return other > one ? other : one;
}

// What is subtracted before exp: 0 for a row of nothing but -inf.
template <class T>
FT_INLINE T subtracted(T maximum) {
  return maximum == lowest<T>() ? T(0) : maximum;
}

template <class Stored, bool softcap>
Acc<Stored> row_maximum(const Stored* logits, int64_t columns, Capped<Acc<Stored>, softcap> capped) {
  using T = Acc<Stored>;
  Vec<T> a = Vec<T>{} + lowest<T>(), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= columns; i += 2 * kLanes<T>) {
    a = larger<T>(a, capped(load(logits + i, Whole{})));
    b = larger<T>(b, capped(load(logits + i + kLanes<T>, Whole{})));
  }
  each_vector<T>(columns - i, [&](int64_t j, auto lanes) {
    a = larger<T>(a, without_tail<T>(capped(load(logits + i + j, lanes)), lanes));
  });
  a = larger<T>(a, b);
  T result = a[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) result = a[lane] > result ? a[lane] : result;
  return result;
}

// The statistics of these columns. With `keep`, each exp(z - maximum) is stored there.
template <class Stored, bool softcap>
Statistics<Acc<Stored>> row_statistics(const CrossEntropy& args, const Stored* logits,
                                       int64_t target, Stored* keep) {
  using T = Acc<Stored>;
  const Capped<T, softcap> capped{static_cast<T>(args.scale), static_cast<T>(args.softcap)};
  Statistics<T> found{};
  const int64_t column = target - args.first;
  if (target >= 0 && column >= 0 && column < args.columns)
    found.label = capped(load(logits + column, First{1}))[0];
  if (args.wants_total)
    found.total = sum_over<T>(args.columns, [&](int64_t i, auto lanes) {
      return capped(load(logits + i, lanes));  // the tail's zeros stay zeros
    });
  found.maximum = row_maximum<Stored, softcap>(logits, args.columns, capped);
  const T offset = subtracted(found.maximum);
  if (args.wants_entropy)
    found.weighted = sum_over<T>(args.columns, [&](int64_t i, auto lanes) {
      const Vec<T> z = capped(load(logits + i, lanes));
      const Vec<T> e = exp(without_tail<T>(z - offset, lanes));
      return e == T(0) ? Vec<T>{} : e * z;
    });
  found.sum = sum_over<T>(args.columns, [&](int64_t i, auto lanes) {
    const Vec<T> e = exp(without_tail<T>(capped(load(logits + i, lanes)) - offset, lanes));
    if (keep != nullptr) store(keep + i, e, lanes);
    return e;
  });
  return found;
}

// Statistics of a row whose columns have been counted in two parts.
template <class T>
Statistics<T> merged(const Statistics<T>& one, const Statistics<T>& other) {
  Statistics<T> result{};
  result.maximum = other.maximum > one.maximum ? other.maximum : one.maximum;
  const T offset = subtracted(result.maximum);
  const T one_factor = exp(Vec<T>{} + (one.maximum - offset))[0];
  const T other_factor = exp(Vec<T>{} + (other.maximum - offset))[0];
  result.sum = one.sum * one_factor + other.sum * other_factor;
  result.label = one.label + other.label;
  result.total = one.total + other.total;
  result.weighted = one.weighted * one_factor + other.weighted * other_factor;
  return result;
}

// coefficient * dloss/da = (exp(z - maximum) * factor - shift) * (1 - (z / cap)^2), and at the
// target `hot` less before the last factor.
template <class Stored, bool softcap>
struct Gradient {
  using T = Acc<Stored>;
  Capped<T, softcap> capped;
  T offset, factor, shift, hot;

  Gradient(const CrossEntropy& args, const Statistics<T>& row, T coefficient)
      : capped{static_cast<T>(args.scale), static_cast<T>(args.softcap)} {
    const T smoothing = static_cast<T>(args.label_smoothing);
    const T scaled = coefficient * static_cast<T>(args.scale);
    T weight = 1;
    if (args.z_loss != 0)
      weight += 2 * static_cast<T>(args.z_loss) * (row.maximum + log(row.sum));
    offset = subtracted(row.maximum);
    factor = scaled * weight / row.sum;
    shift = scaled * smoothing / static_cast<T>(args.classes);
    hot = scaled * (1 - smoothing);
  }

  FT_INLINE Vec<T> slope(Vec<T> z) const {
    const Vec<T> ratio = z / capped.cap;
    return softcap ? T(1) - ratio * ratio : Vec<T>{} + T(1);
  }
  FT_INLINE Vec<T> operator()(Vec<T> logit, T less) const {
    const Vec<T> z = capped(logit);
    const Vec<T> grad = exp(z - offset) * factor - shift - less;
    return softcap ? grad * slope(z) : grad;
  }
};

template <class Stored>
void row_of_zeros(Stored* out, int64_t columns) {
  using T = Acc<Stored>;
  each_vector<T>(columns, [&](int64_t i, auto lanes) { store(out + i, Vec<T>{}, lanes); });
}

// `kept`: out holds exp(z - maximum) already, and the logit at the target was `label_logit`.
template <class Stored, bool softcap>
void row_gradient(const CrossEntropy& args, const Stored* logits, const Statistics<Acc<Stored>>& row,
                  int64_t target, Acc<Stored> coefficient, Stored* out, bool kept,
                  Vec<Acc<Stored>> label_logit) {
  using T = Acc<Stored>;
  if (target == kIgnored) return row_of_zeros(out, args.columns);
  const Gradient<Stored, softcap> gradient(args, row, coefficient);
  if (kept) {
    each_vector<T>(args.columns, [&](int64_t i, auto lanes) {
      store(out + i, load(out + i, lanes) * gradient.factor - gradient.shift, lanes);
    });
  } else {
    each_vector<T>(args.columns, [&](int64_t i, auto lanes) {
      store(out + i, gradient(load(logits + i, lanes), T(0)), lanes);
    });
  }
  const int64_t column = target - args.first;
  if (target >= 0 && column >= 0 && column < args.columns)
    store(out + column, gradient(label_logit, gradient.hot), First{1});
}

// The logit at the target, if it is among these columns; else 0, which is not used.
template <class Stored>
FT_INLINE Vec<Acc<Stored>> logit_at(const CrossEntropy& args, const Stored* logits, int64_t target) {
  const int64_t column = target - args.first;
  const bool inside = target >= 0 && column >= 0 && column < args.columns;
  return inside ? load(logits + column, First{1}) : Vec<Acc<Stored>>{};
}

template <class Stored, bool softcap>
void forward_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
  using T = Acc<Stored>;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* logits = static_cast<const Stored*>(args.logits) + row * args.stride;
    Statistics<T>& result = static_cast<Statistics<T>*>(args.statistics)[row];
    const Statistics<T> found =
        row_statistics<Stored, softcap>(args, logits, args.targets[row], nullptr);
    result = args.first == 0 ? found : merged(result, found);
  }
}

template <class Stored, bool softcap>
void backward_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
  using T = Acc<Stored>;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* logits = static_cast<const Stored*>(args.logits) + row * args.stride;
    const int64_t target = args.targets[row];
    row_gradient<Stored, softcap>(
        args, logits, static_cast<const Statistics<T>*>(args.statistics)[row], target,
        static_cast<const T*>(args.coefficients)[row],
        static_cast<Stored*>(args.out) + row * args.out_stride, false,
        logit_at(args, logits, target));
  }
}

template <class Stored, bool softcap>
void forward_backward_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
  using T = Acc<Stored>;
  // exp(z - maximum) can be kept where the logits were if nothing is lost by storing it, and if z
  // is not needed again: one exp per element instead of two.
  constexpr bool keeps = !softcap && sizeof(Stored) == sizeof(T);
  for (int64_t row = begin; row < end; ++row) {
    Stored* logits = static_cast<Stored*>(args.out) + row * args.out_stride;
    const int64_t target = args.targets[row];
    Statistics<T>& result = static_cast<Statistics<T>*>(args.statistics)[row];
    const Vec<T> label_logit = logit_at(args, logits, target);
    result = row_statistics<Stored, softcap>(args, logits, target, keeps ? logits : nullptr);
    row_gradient<Stored, softcap>(args, logits, result, target,
                                  static_cast<const T*>(args.coefficients)[row], logits, keeps,
                                  label_logit);
  }
}

using Rows = void (*)(const CrossEntropy&, int64_t, int64_t);

void run(const CrossEntropy& args, int64_t begin, int64_t end, Rows f32, Rows f64, Rows bf16) {
  (args.dtype == DType::f64 ? f64 : args.dtype == DType::f32 ? f32 : bf16)(args, begin, end);
}

}  // namespace

#define FT_DEFINE(name)                                                                        \
  void cross_entropy_##name(const CrossEntropy& args, int64_t begin, int64_t end) {            \
    if (args.softcap != 0)                                                                     \
      run(args, begin, end, name##_rows<float, true>, name##_rows<double, true>,               \
          name##_rows<BFloat16, true>);                                                        \
    else                                                                                       \
      run(args, begin, end, name##_rows<float, false>, name##_rows<double, false>,             \
          name##_rows<BFloat16, false>);                                                       \
  }
FT_DEFINE(forward)
FT_DEFINE(backward)
FT_DEFINE(forward_backward)

}  // namespace FT_ISA
}  // namespace fasttrain
