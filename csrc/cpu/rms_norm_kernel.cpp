// RMS normalisation, forward and backward, over a range of rows.
// Compiled once per instruction set: see vec.h for what that forbids.
#include "rms_norm.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

// sum = x + residual, rounded to sum's dtype.
template <class X, class Residual, class Sum>
void add_row(const void* x_row, const void* residual_row, void* sum_row, int64_t width) {
  const X* x = static_cast<const X*>(x_row);
  const Residual* residual = static_cast<const Residual*>(residual_row);
  Sum* sum = static_cast<Sum*>(sum_row);
  each_vector<Acc<Sum>>(width, [&](int64_t i, auto lanes) {
    store(sum + i, load(x + i, lanes) + load(residual + i, lanes), lanes);
  });
}

// y = x * rstd * weight; returns rstd = 1 / sqrt(mean(x^2) + eps).
template <class X, class Y, bool cast_first>
Acc<X> normalize_row(const X* x, const Acc<X>* weight, Y* y, int64_t width, double eps) {
  using T = Acc<X>;
  const T square_sum = sum_over<T>(width, [&](int64_t i, auto lanes) {
    const Vec<T> value = load(x + i, lanes);
    return value * value;
  });
  const T mean_square = square_sum / static_cast<T>(width);
  const T rstd = T(1) / static_cast<T>(__builtin_sqrt(mean_square + static_cast<T>(eps)));
  each_vector<T>(width, [&](int64_t i, auto lanes) {
    Vec<T> value = load(x + i, lanes) * rstd;
    if (cast_first) value = round_to<X>(value);
    store(y + i, value * load(weight + i, lanes), lanes);
  });
  return rstd;
}

template <class X, class Y, bool cast_first>
void normalize_one(const RmsNormForward& args, const void* x_row, int64_t row) {
  using T = Acc<X>;
  static_cast<T*>(args.rstd)[row] = normalize_row<X, Y, cast_first>(
      static_cast<const X*>(x_row), static_cast<const T*>(args.weight),
      static_cast<Y*>(args.y) + row * args.width, args.width, args.eps);
}

using AddRow = void (*)(const void*, const void*, void*, int64_t);
using NormalizeOne = void (*)(const RmsNormForward&, const void*, int64_t);

AddRow choose_add(const RmsNormForward& args) {
  if (args.sum_dtype == DType::f64) return add_row<double, double, double>;
  if (args.sum_dtype == DType::bf16) return add_row<BFloat16, BFloat16, BFloat16>;
  if (args.x_dtype == DType::bf16) return add_row<BFloat16, float, float>;
  if (args.residual_dtype == DType::bf16) return add_row<float, BFloat16, float>;
  return add_row<float, float, float>;
}

// In float and double, rounding to the input's own dtype changes nothing.
NormalizeOne choose_normalize(const RmsNormForward& args) {
  if (args.sum_dtype == DType::f64) return normalize_one<double, double, false>;
  if (args.sum_dtype == DType::f32) return normalize_one<float, float, false>;
  if (args.y_dtype == DType::f32) return normalize_one<BFloat16, float, true>;
  if (args.cast_first) return normalize_one<BFloat16, BFloat16, true>;
  return normalize_one<BFloat16, BFloat16, false>;
}

int64_t bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

const char* row_of(const void* base, int64_t row, int64_t stride, DType dtype) {
  return static_cast<const char*>(base) + row * stride * bytes(dtype);
}

// With g = dy * weight and n = x * rstd:  dx = rstd * (g - n * mean(g * n)) + dsum,
// and dweight += dy * n.
template <class DY, class X>
void backward_row(const DY* dy, const X* dsum, const X* x, const Acc<X>* weight, Acc<X> rstd, X* dx,
                  Acc<X>* dweight, int64_t width) {
  using T = Acc<X>;
  const T dot = sum_over<T>(width, [&](int64_t i, auto lanes) {
    const Vec<T> share = load(dy + i, lanes) * (load(x + i, lanes) * rstd);
    if (dweight != nullptr) store(dweight + i, load(dweight + i, lanes) + share, lanes);
    return share * load(weight + i, lanes);
  });
  if (dx == nullptr) return;
  const T mean = dot / static_cast<T>(width);
  each_vector<T>(width, [&](int64_t i, auto lanes) {
    const Vec<T> grad = load(dy + i, lanes) * load(weight + i, lanes);
    Vec<T> result = (grad - (load(x + i, lanes) * rstd) * mean) * rstd;
    if (dsum != nullptr) result += load(dsum + i, lanes);
    store(dx + i, result, lanes);
  });
}

template <class DY, class X>
void backward_rows(const RmsNormBackward& args, void* dweight, int64_t begin, int64_t end) {
  using T = Acc<X>;
  T* dweight_sum = static_cast<T*>(dweight);
  if (dweight_sum != nullptr)
    for (int64_t i = 0; i < args.width; ++i) dweight_sum[i] = T(0);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * args.width;
    backward_row<DY, X>(
        static_cast<const DY*>(args.dy) + at,
        args.dsum == nullptr ? nullptr : static_cast<const X*>(args.dsum) + at,
        static_cast<const X*>(args.x) + row * args.x_stride, static_cast<const T*>(args.weight),
        static_cast<const T*>(args.rstd)[row],
        args.dx == nullptr ? nullptr : static_cast<X*>(args.dx) + at, dweight_sum, args.width);
  }
}

template <class T>
void add_columns(const T* partials, int64_t rows, int64_t width, T* total, int64_t begin,
                 int64_t end) {
  each_vector<T>(end - begin, [&](int64_t i, auto lanes) {
    Vec<T> sum{};
    for (int64_t row = 0; row < rows; ++row)
      sum += load(partials + row * width + begin + i, lanes);
    store(total + begin + i, sum, lanes);
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  const AddRow add = args.residual == nullptr ? nullptr : choose_add(args);
  const NormalizeOne normalize = choose_normalize(args);
  for (int64_t row = begin; row < end; ++row) {
    const char* x = row_of(args.x, row, args.x_stride, args.x_dtype);
    if (add != nullptr) {
      char* sum = static_cast<char*>(args.sum) + row * args.width * bytes(args.sum_dtype);
      add(x, row_of(args.residual, row, args.residual_stride, args.residual_dtype), sum,
          args.width);
      x = sum;
    }
    normalize(args, x, row);
  }
}

void rms_norm_backward(const RmsNormBackward& args, void* dweight, int64_t begin, int64_t end) {
  if (args.x_dtype == DType::f64) return backward_rows<double, double>(args, dweight, begin, end);
  if (args.x_dtype == DType::f32) return backward_rows<float, float>(args, dweight, begin, end);
  if (args.dy_dtype == DType::f32)
    return backward_rows<float, BFloat16>(args, dweight, begin, end);
  return backward_rows<BFloat16, BFloat16>(args, dweight, begin, end);
}

void add_partials(const void* partials, int64_t rows, int64_t width, bool wide, void* total,
                  int64_t begin, int64_t end) {
  if (wide) {
    add_columns(static_cast<const double*>(partials), rows, width, static_cast<double*>(total),
                begin, end);
  } else {
    add_columns(static_cast<const float*>(partials), rows, width, static_cast<float*>(total),
                begin, end);
  }
}

}  // namespace FT_ISA
}  // namespace fasttrain
