// Steps of optimizers over a range of a tensor, and the sum of its squares.
// Compiled once per instruction set: see vec.h for what that forbids.
#include "optimizer.h"
#include "vec.h"

namespace fasttrain {
namespace FT_ISA {

FT_INLINE VecU32 as_bits(VecF32 value) { return reinterpret_cast<VecU32>(value); }
FT_INLINE VecF32 as_value(VecU32 bits) { return reinterpret_cast<VecF32>(bits); }
FT_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
FT_INLINE float as_value(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
FT_INLINE VecF32 root(VecF32 value) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(value);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(value);
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}
FT_INLINE VecF32 larger(VecF32 one, VecF32 other) {
#if defined(__AVX512F__)
  return _mm512_max_ps(one, other);
#elif defined(__AVX2__)
  return _mm256_max_ps(one, other);
#else
  return one > other ? one : other;
#endif
}
// By the CPU's estimate of 12 bits (14 with AVX-512) and a step of Newton's. A root and a quotient
// would take 15 cycles for 8 elements, more than all else that moments of 8 bits need.
FT_INLINE VecF32 quick_root(VecF32 value) {
#if defined(__AVX2__)
  const VecF32 some = larger(value, VecF32{} + 1e-37f);
#if defined(__AVX512F__)
  const VecF32 estimate = _mm512_rsqrt14_ps(some);
#else
  const VecF32 estimate = _mm256_rsqrt_ps(some);
#endif
  const VecF32 close = some * estimate;
  return close * (1.5f - 0.5f * estimate * close);
#else
  return root(larger(value, VecF32{} + 1e-37f));
#endif
}
FT_INLINE VecF32 quick_quotient(VecF32 value, VecF32 divisor) {
#if defined(__AVX512F__)
  const VecF32 estimate = _mm512_rcp14_ps(divisor);
#elif defined(__AVX2__)
  const VecF32 estimate = _mm256_rcp_ps(divisor);
#else
  return value / divisor;
#endif
#if defined(__AVX2__)
  return value * (estimate * (2.0f - divisor * estimate));
#endif
}
FT_INLINE VecF32 product(VecF32 value, float factor) { return rounded(VecF32(value * factor)); }
template <class V>
FT_INLINE V splat(float value) {
  return V{} + value;
}

}  // namespace FT_ISA
}  // namespace fasttrain

#include "../common/optimizer_math.h"

namespace fasttrain {
namespace FT_ISA {
namespace {

constexpr int64_t kStep = kLanes<float>;

FT_INLINE VecU32 load_codes(const uint8_t* from, Whole) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU32>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU32>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  VecU32 codes;
  for (int64_t i = 0; i < kStep; ++i) codes[i] = from[i];
  return codes;
#endif
}

FT_INLINE void store_codes(uint8_t* to, VecU32 codes, Whole) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(codes)));
#elif defined(__AVX2__)
  const __m256i all = reinterpret_cast<__m256i>(codes);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  for (int64_t i = 0; i < kStep; ++i) to[i] = static_cast<uint8_t>(codes[i]);
#endif
}

FT_INLINE VecU32 load_codes(const uint8_t* from, First first) {
  uint8_t buffer[kStep] = {};
  for (int64_t i = 0; i < first.n; ++i) buffer[i] = from[i];
  return load_codes(buffer, Whole{});
}

FT_INLINE void store_codes(uint8_t* to, VecU32 codes, First first) {
  uint8_t buffer[kStep];
  store_codes(buffer, codes, Whole{});
  for (int64_t i = 0; i < first.n; ++i) to[i] = buffer[i];
}

// 16 random bits for each element of a whole block, whose first has the number `number`.
// A vector may be read from the last of them on.
struct Drawn {
  uint16_t bits[kBlock + kStep];

  FT_INLINE Drawn(int64_t number, uint64_t key) {
    VecU32 half;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStep; ++i) half[i] = static_cast<uint32_t>(i);
    half += static_cast<uint32_t>(number / 2);
    for (int64_t i = 0; i < kBlock; i += 2 * kStep) {
      const VecU32 pairs = random_bits(half, key);
      __builtin_memcpy(bits + i, &pairs, sizeof(pairs));
      half += static_cast<uint32_t>(kStep);
    }
  }

  FT_INLINE VecU32 at(int64_t i) const {
    VecU16 some;
    __builtin_memcpy(&some, bits + i, sizeof(some));
    return to_32_bits(some);
  }
};

struct NotDrawn {
  FT_INLINE NotDrawn(int64_t, uint64_t) {}
  FT_INLINE VecU32 at(int64_t) const { return VecU32{}; }
};

template <bool draws>
struct DrawnIf {
  using type = NotDrawn;
};
template <>
struct DrawnIf<true> {
  using type = Drawn;
};

FT_INLINE VecF32 size_of(VecF32 value) { return as_value(as_bits(value) & 0x7fffffffu); }

FT_INLINE float largest_lane(VecF32 value) {
  float lanes[kStep], largest = 0.0f;
  store(lanes, value, Whole{});
  for (int64_t i = 0; i < kStep; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// One block of a tensor, or the part of it that the row has.
template <Algorithm algorithm, Rounding rounding, Moments moments>
struct Block {
  static constexpr bool kHasFirst = moments != Moments::none;
  static constexpr bool kHasSecond = algorithm == Algorithm::adamw;
  using ForParameter = typename DrawnIf<rounding == Rounding::stochastic>::type;
  using ForMoments = typename DrawnIf<moments == Moments::eight_bits || moments == Moments::bf16>::type;

  // Copies, which stay in registers: what is stored might otherwise have changed them.
  const StepRow row;
  const Scalars scalars;
  const bool zero_grad;
  const int64_t begin;
  const int64_t block;   // of the row
  const int64_t before;  // elements of the block that lie before `begin`
  const ForParameter for_parameter;
  const ForMoments for_moments;
  // number: of the block's first element, in the whole tensor.
  FT_INLINE Block(const StepChunk& chunk, const Scalars& scalars, uint64_t key, int64_t begin,
                  int64_t number)
      : row(*chunk.row),
        scalars(scalars),
        zero_grad(chunk.zero_grad),
        begin(begin),
        block((lead_of(row) + begin) / kBlock),
        before(row.offset + begin - number),
        for_parameter(number, key_for(key, Use::parameter)),
        for_moments(number, key_for(key, Use::moments)) {}

  template <class Lanes>
  FT_INLINE VecF32 gradient(int64_t i, Lanes lanes) {
    VecF32 value;
    if (row.grad_is_bf16) {
      BFloat16* grad = static_cast<BFloat16*>(row.grad) + i;
      value = load(grad, lanes);
      if (zero_grad) store(grad, VecF32{}, lanes);
    } else {
      float* grad = static_cast<float*>(row.grad) + i;
      value = load(grad, lanes);
      if (zero_grad) store(grad, VecF32{}, lanes);
    }
    return value * scalars.factor;
  }

  template <class Lanes>
  FT_INLINE VecF32 parameter(int64_t i, Lanes lanes) {
    if constexpr (rounding == Rounding::none) return load(static_cast<float*>(row.param) + i, lanes);
    if constexpr (rounding == Rounding::master) return load(static_cast<float*>(row.beside) + i, lanes);
    return load(static_cast<BFloat16*>(row.param) + i, lanes);
  }

  template <class Lanes>
  FT_INLINE void keep(int64_t i, VecF32 param, VecF32 lessened, VecU32 random, Lanes lanes) {
    const VecF32 moved = moved_by(param, lessened, scalars);
    BFloat16* narrow = static_cast<BFloat16*>(row.param) + i;
    if constexpr (rounding == Rounding::none) {
      store(static_cast<float*>(row.param) + i, moved, lanes);
    } else if constexpr (rounding == Rounding::master) {
      store(static_cast<float*>(row.beside) + i, moved, lanes);
      store(narrow, moved, lanes);
    } else if constexpr (rounding == Rounding::stochastic) {
      store_upper_half(narrow, rounded_at_random(moved, random), lanes);
    } else {
      BFloat16* lacking = static_cast<BFloat16*>(row.beside) + i;
      const VecF32 wanted =
          (param * (scalars.decay - 1.0f) - lessened) + load(lacking, lanes);
      const VecF32 kept = round_to<BFloat16>(rounded(param + wanted));
      store_upper_half(narrow, kept, lanes);
      store(lacking, wanted - (kept - param), lanes);
    }
  }

  template <class Lanes>
  FT_INLINE VecF32 moment(void* values, int64_t i, Lanes lanes) {
    if constexpr (moments == Moments::f32) return load(static_cast<float*>(values) + i, lanes);
    return load(static_cast<BFloat16*>(values) + i, lanes);
  }

  template <class Lanes>
  FT_INLINE void keep_moment(void* values, int64_t i, VecF32 value, VecU32 random, Lanes lanes) {
    if constexpr (moments == Moments::f32) store(static_cast<float*>(values) + i, value, lanes);
    if constexpr (moments == Moments::bf16)
      store_upper_half(static_cast<BFloat16*>(values) + i, rounded_at_random(value, random), lanes);
  }

  FT_INLINE void run(int64_t count) {
    each_vector<float>(count, [&](int64_t i, auto lanes) {
      const int64_t at = begin + i;
      const VecF32 param = parameter(at, lanes);
      VecF32 first{}, second{};
      if constexpr (kHasFirst) first = moment(row.first, at, lanes);
      if constexpr (kHasSecond) second = moment(row.second, at, lanes);
      const VecF32 lessened =
          change<algorithm, kHasFirst>(param, gradient(at, lanes), first, second, scalars);
      keep(at, param, lessened, for_parameter.at(before + i), lanes);
      const VecU32 bits = for_moments.at(before + i);
      if constexpr (kHasFirst) keep_moment(row.first, at, first, bits, lanes);
      if constexpr (kHasSecond) keep_moment(row.second, at, second, bits, lanes);
    });
  }

  // The next block, which the loops of this one would otherwise wait for each in its turn.
  FT_INLINE void prefetch_next() {
    const auto lines = [&](void* values, int64_t width) {
      char* next = static_cast<char*>(values) + (begin + kBlock) * width;
      for (int64_t i = 0; i < kBlock * width; i += 64) __builtin_prefetch(next + i, 1);
    };
    lines(row.grad, row.grad_is_bf16 ? 2 : 4);
    lines(row.param, rounding == Rounding::none ? 4 : 2);
    lines(row.first, 1);
    if constexpr (kHasSecond) lines(row.second, 1);
  }

  // With moments of 8 bits: short loops, of which a CPU has several turns in flight at once. The
  // scales are known after the first, in which moments get as far as they come.
  FT_INLINE void run_coded(int64_t count) {
    float firsts[kBlock], seconds[kBlock];
    const float first_scale = row.first_scale[block];
    const float second_scale = kHasSecond ? row.second_scale[block] : 0.0f;
    uint8_t* const first_codes = static_cast<uint8_t*>(row.first) + begin;
    uint8_t* const second_codes = static_cast<uint8_t*>(row.second) + begin;
    VecF32 largest_first{}, largest_second{};
    prefetch_next();
    each_vector<float>(count, [&](int64_t i, auto lanes) {
      const VecF32 grad = gradient(begin + i, lanes);
      VecF32 first = first_of_code<VecF32>(load_codes(first_codes + i, lanes), first_scale);
      VecF32 second{};
      if constexpr (kHasSecond) {
        second = root_of_code<VecF32>(load_codes(second_codes + i, lanes), second_scale);
        second = second * second;
        move_moments(grad, first, second, scalars);
        largest_second = larger(second, largest_second);
        store(seconds + i, second, Whole{});
      } else {
        const VecF32 param = parameter(begin + i, lanes);
        const VecF32 lessened = change<algorithm, true>(param, grad, first, second, scalars);
        keep(begin + i, param, lessened, for_parameter.at(before + i), lanes);
      }
      largest_first = larger(size_of(first), largest_first);
      store(firsts + i, first, Whole{});
    });
    const float scale = scale_of(largest_lane(largest_first)), inverse = inverse_of(scale);
    const float root_scale = scale_of(__builtin_sqrtf(largest_lane(largest_second)));
    const float root_inverse = inverse_of(root_scale);
    row.first_scale[block] = scale;
    if constexpr (kHasSecond) {
      row.second_scale[block] = root_scale;
      each_vector<float>(count, [&](int64_t i, auto lanes) {
        const VecF32 root_of_second = quick_root(load(seconds + i, Whole{}));
        const VecF32 lessened = quick_quotient(load(firsts + i, Whole{}) * scalars.rate,
                                               adamw_divisor(root_of_second, scalars));
        keep(begin + i, parameter(begin + i, lanes), lessened, for_parameter.at(before + i), lanes);
        store_codes(second_codes + i,
                    code_of_root(root_of_second, root_inverse, for_moments.at(before + i)), lanes);
      });
    }
    each_vector<float>(count, [&](int64_t i, auto lanes) {
      store_codes(first_codes + i,
                  code_of_first(load(firsts + i, Whole{}), inverse, for_moments.at(before + i)),
                  lanes);
    });
  }
};

template <Algorithm algorithm, Rounding rounding, Moments moments>
void step(const StepChunk& chunk, double (*power)(double, double)) {
  const Scalars scalars = scalars_of<algorithm>(*chunk.numbers, chunk.step, *chunk.gate, power);
  const uint64_t key = step_key(chunk.seed, chunk.row->stream, static_cast<float>(chunk.step));
  const int64_t lead = lead_of(*chunk.row);
  for (int64_t begin = chunk.begin; begin < chunk.end;) {
    const int64_t edge = ((lead + begin) / kBlock + 1) * kBlock - lead;
    const int64_t end = edge < chunk.end ? edge : chunk.end;
    const int64_t number = chunk.row->offset + edge - kBlock;
    const uint64_t upper = static_cast<uint64_t>(number) >> 32;
    Block<algorithm, rounding, moments> block(chunk, scalars, keyed(key, upper), begin, number);
    if constexpr (moments == Moments::eight_bits) {
      block.run_coded(end - begin);
    } else {
      block.run(end - begin);
    }
    begin = end;
  }
}

template <Algorithm algorithm, Rounding rounding>
void step(const StepChunk& chunk, double (*power)(double, double)) {
  switch (chunk.moments) {
    case Moments::f32:
      return step<algorithm, rounding, Moments::f32>(chunk, power);
    case Moments::bf16:
      return step<algorithm, rounding, Moments::bf16>(chunk, power);
    case Moments::eight_bits:
      return step<algorithm, rounding, Moments::eight_bits>(chunk, power);
    default:
      if constexpr (algorithm == Algorithm::sgd)
        return step<algorithm, rounding, Moments::none>(chunk, power);
  }
}

template <Algorithm algorithm>
void step(const StepChunk& chunk, double (*power)(double, double)) {
  switch (chunk.rounding) {
    case Rounding::none:
      return step<algorithm, Rounding::none>(chunk, power);
    case Rounding::master:
      return step<algorithm, Rounding::master>(chunk, power);
    case Rounding::stochastic:
      return step<algorithm, Rounding::stochastic>(chunk, power);
    case Rounding::kahan:
      return step<algorithm, Rounding::kahan>(chunk, power);
  }
}

double as_double(float value) { return value; }
double as_double(BFloat16 value) { return as_value(static_cast<uint32_t>(value.bits) << 16); }

// Sums of 1024 squares in float, of those in double: the error is that of 32 additions a lane.
// Squares beyond float, of values beyond 1.8e19, are formed anew in double.
template <class T>
double squares(const T* values, int64_t count) {
  double sum = 0.0;
  for (int64_t begin = 0; begin < count; begin += 1024) {
    const int64_t width = count - begin < 1024 ? count - begin : 1024;
    double part = sum_over<float>(width, [&](int64_t i, auto lanes) {
      const VecF32 value = load(values + begin + i, lanes);
      return value * value;
    });
    if (part > 3e38) {
      part = 0.0;
      for (int64_t i = begin; i < begin + width; ++i)
        part += as_double(values[i]) * as_double(values[i]);
    }
    sum += part;
  }
  return sum;
}

}  // namespace

void optimizer_step(const StepChunk& chunk, double (*power)(double, double)) {
  switch (chunk.algorithm) {
    case Algorithm::adamw:
      return step<Algorithm::adamw>(chunk, power);
    case Algorithm::lion:
      return step<Algorithm::lion>(chunk, power);
    case Algorithm::sgd:
      return step<Algorithm::sgd>(chunk, power);
  }
}

double sum_of_squares(const void* values, bool is_bf16, int64_t begin, int64_t end) {
  if (is_bf16) return squares(static_cast<const BFloat16*>(values) + begin, end - begin);
  return squares(static_cast<const float*>(values) + begin, end - begin);
}

}  // namespace FT_ISA
}  // namespace fasttrain
