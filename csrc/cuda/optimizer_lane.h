// What one thread does to its 8 neighbouring elements: a warp steps a block of 256. Without a word
// of CUDA, so that tests/ops/test_cuda_optimizer.py can run it on the host, thread after thread.
#pragma once

#include "eight.h"

namespace fasttrain {
namespace gpu {

static_assert(kBlock == 32 * kEach, "a warp steps a block");

// What the threads of a block share about the row that they step.
struct RowStep {
  StepRow row;
  Scalars scalars;
  bool aligned;  // whether blocks of the whole tensor begin at multiples of 16 bytes
  uint64_t key;  // step_key
  // Of the chunk:
  int64_t start;  // its first element in the row, before which it may begin
  uint32_t upper;  // half of that one's number in the whole tensor
  uint64_t keys[2];  // of elements of that upper half, and of the next
};

FT_INLINE bool is_aligned(const void* values, int64_t bytes_before) {
  return values == nullptr || (reinterpret_cast<uintptr_t>(values) - bytes_before) % 16 == 0;
}

// Which of the 8 elements from `begin` on the row has.
FT_INLINE Part part_of(const StepRow& row, int64_t begin) {
  const int64_t left = row.numel - begin;
  return {begin >= 0 ? 0 : begin < -kEach ? kEach : static_cast<int>(-begin),
          left >= kEach ? kEach : left < 0 ? 0 : static_cast<int>(left)};
}

FT_INLINE bool is_whole(const RowStep& at, Part part) {
  return at.aligned && part.first == 0 && part.end == kEach;
}

// How a thread steps: load, move, round, store. Before it rounds, the threads of a warp find the
// largest moments of their block, which those of 8 bits are stored as shares of.
template <Algorithm algorithm, Rounding rounding, Moments moments>
class Lane {
 public:
  static constexpr bool kHasFirst = moments != Moments::none;
  static constexpr bool kHasSecond = algorithm == Algorithm::adamw;
  static constexpr bool kCoded = moments == Moments::eight_bits;

  // What a step starts from.
  static constexpr bool kWide = rounding == Rounding::none || rounding == Rounding::master;
  using Kept = std::conditional_t<kWide, float, Bf16>;
  using Moment = std::conditional_t<kCoded, uint8_t,
                                    std::conditional_t<moments == Moments::bf16, Bf16, float>>;

  // Bytes that a thread asks for at once, with a gradient of 16 bits.
  static constexpr int kAsked = kEach * (sizeof(Kept) + (rounding == Rounding::kahan ? 2 : 0) + 2 +
                                         (kHasFirst + kHasSecond) * sizeof(Moment));

  // Makes `at` that of a row's chunk. chunk: of the row. same_row: at is of the row already.
  FT_INLINE static void enter(RowStep& at, const StepRow& row, int64_t chunk, bool same_row,
                              const GroupNumbers* groups, const Gate& gate, uint64_t seed) {
    if (!same_row) {
      at.row = row;
      const double step = *row.step + 1.0;
      at.scalars = scalars_of<algorithm>(groups[row.group], step, gate, power);
      at.key = step_key(seed, row.stream, static_cast<float>(step));
      at.aligned = is_aligned_throughout(row);
    }
    at.start = chunk * kChunk - lead_of(row);
    at.upper = static_cast<uint32_t>((row.offset + at.start) >> 32);
    at.keys[0] = keyed(at.key, at.upper);
    at.keys[1] = keyed(at.key, at.upper + uint64_t{1});
  }

  // begin: the first of the thread's elements in the row, which may lie before it.
  FT_INLINE Lane(const RowStep& at, int64_t begin) : at_(at), begin_(begin) {}

  // Asks for everything before it waits for anything.
  template <class Some>
  FT_INLINE void load(bool zero_grad, Some some) {
    const StepRow& row = at_.row;
    kept_ = gpu::load<Kept>(rounding == Rounding::master ? row.beside : row.param, begin_, some);
    if constexpr (rounding == Rounding::kahan) lacking_ = gpu::load<Bf16>(row.beside, begin_, some);
    if constexpr (kHasFirst) firsts_ = gpu::load<Moment>(row.first, begin_, some);
    if constexpr (kHasSecond) seconds_ = gpu::load<Moment>(row.second, begin_, some);
    if constexpr (kCoded) first_scale_ = row.first_scale[block()];
    if constexpr (kCoded && kHasSecond) second_scale_ = row.second_scale[block()];
    if (row.grad_is_bf16) {
      load_gradient<Bf16>(zero_grad, some);
    } else {
      load_gradient<float>(zero_grad, some);
    }
  }

  // All moments, and what parameters are lessened by. Elements that the row has not are 0, or with
  // codes the least that stands for something, and change no largest.
  FT_INLINE void move() {
    const Scalars& s = at_.scalars;
    largest_first = largest_second = 0.0f;
    FT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const float grad = change_[i] * s.factor;
      float first = 0.0f, second = 0.0f;
      if constexpr (kHasFirst) first = first_at(i);
      if constexpr (kHasSecond) second = second_at(i);
      if constexpr (kCoded && kHasSecond) {
        move_moments(grad, first, second, s);
        largest_second = larger(second, largest_second);
        second = quick_root(second);
        change_[i] = quick_quotient(first * s.rate, adamw_divisor(second, s));
      } else if constexpr (kHasSecond) {
        move_moments(grad, first, second, s);
        change_[i] = quotient(first * s.rate, adamw_divisor(root(second), s));
      } else {
        change_[i] = change<algorithm, kHasFirst>(value_at(kept_, i), grad, first, second, s);
      }
      if constexpr (kCoded) largest_first = larger(fabsf(first), largest_first);
      first_[i] = first;
      second_[i] = second;
    }
  }

  // All that is stored, as it is stored. largest_first, largest_second: those of the block by now.
  FT_INLINE void round() {
    round_parameter();
    if constexpr (kCoded) {
      round_to_codes();
    } else {
      if constexpr (kHasFirst) firsts_ = rounded_moment(first_);
      if constexpr (kHasSecond) seconds_ = rounded_moment(second_);
    }
  }

  template <class Some>
  FT_INLINE void store(bool keeps_scales, Some some) const {
    const StepRow& row = at_.row;
    gpu::store(rounding == Rounding::master ? row.beside : row.param, begin_, kept_, some);
    if constexpr (rounding == Rounding::master) gpu::store(row.param, begin_, narrow_, some);
    if constexpr (rounding == Rounding::kahan) gpu::store(row.beside, begin_, lacking_, some);
    if constexpr (kHasFirst) gpu::store(row.first, begin_, firsts_, some);
    if constexpr (kHasSecond) gpu::store(row.second, begin_, seconds_, some);
    if constexpr (kCoded)
      if (keeps_scales) row.first_scale[block()] = first_scale_;
    if constexpr (kCoded && kHasSecond)
      if (keeps_scales) row.second_scale[block()] = second_scale_;
  }

  float largest_first, largest_second;

 private:

  FT_INLINE static bool is_aligned_throughout(const StepRow& row) {
    constexpr int64_t kParam = rounding == Rounding::none ? 4 : 2;
    constexpr int64_t kBeside = rounding == Rounding::master ? 4 : 2;
    const int64_t lead = lead_of(row);
    return is_aligned(row.grad, lead * (row.grad_is_bf16 ? 2 : 4)) &&
           is_aligned(row.param, lead * kParam) && is_aligned(row.beside, lead * kBeside) &&
           is_aligned(row.first, lead * int64_t{sizeof(Moment)}) &&
           is_aligned(row.second, lead * int64_t{sizeof(Moment)});
  }

  // Of the row, for its scales.
  FT_INLINE int64_t block() const { return (lead_of(at_.row) + begin_) / kBlock; }

  FT_INLINE uint32_t random(Use use, int i) const {
    const int64_t number = at_.row.offset + begin_;
    const uint64_t key = at_.keys[static_cast<uint32_t>(number >> 32) == at_.upper ? 0 : 1];
    const uint32_t half = static_cast<uint32_t>(number / 2) + i / 2;
    return (random_bits(half, key_for(key, use)) >> 16 * (i % 2)) & 0xffffu;
  }

  template <class T, class Some>
  FT_INLINE void load_gradient(bool zero_grad, Some some) {
    const Eight<T> gradient = gpu::load<T>(at_.row.grad, begin_, some);
    if (zero_grad) gpu::store(at_.row.grad, begin_, Eight<T>{}, some);
    FT_UNROLL
    for (int i = 0; i < kEach; ++i) change_[i] = value_at(gradient, i);
  }

  FT_INLINE float first_at(int i) const {
    if constexpr (kCoded) {
      return first_of_code<float>(code_at(firsts_, i), first_scale_);
    } else {
      return value_at(firsts_, i);
    }
  }

  FT_INLINE float second_at(int i) const {
    if constexpr (kCoded) {
      const float root = root_of_code<float>(code_at(seconds_, i), second_scale_);
      return root * root;
    } else {
      return value_at(seconds_, i);
    }
  }

  FT_INLINE void round_parameter() {
    const Scalars& s = at_.scalars;
    float moved[kEach];
    if constexpr (rounding == Rounding::kahan) {
      float wanted[kEach];
      FT_UNROLL
      for (int i = 0; i < kEach; ++i) {
        wanted[i] = (value_at(kept_, i) * (s.decay - 1.0f) - change_[i]) + value_at(lacking_, i);
        moved[i] = value_at(kept_, i) + wanted[i];
      }
      const Eight<Bf16> narrow = to_nearest(moved);
      FT_UNROLL
      for (int i = 0; i < kEach; ++i) wanted[i] -= value_at(narrow, i) - value_at(kept_, i);
      kept_ = narrow;
      lacking_ = to_nearest(wanted);
    } else {
      FT_UNROLL
      for (int i = 0; i < kEach; ++i) moved[i] = moved_by(value_at(kept_, i), change_[i], s);
      if constexpr (rounding == Rounding::stochastic) {
        kept_ = at_random(moved, Use::parameter);
      } else {
        kept_ = floats_of(moved);
        narrow_ = to_nearest(moved);
      }
    }
  }

  FT_INLINE Eight<Bf16> at_random(float (&values)[kEach], Use use) const {
    FT_UNROLL
    for (int i = 0; i < kEach; ++i) values[i] = rounded_at_random(values[i], random(use, i));
    return exactly(values);
  }

  FT_INLINE Eight<Moment> rounded_moment(float (&values)[kEach]) const {
    if constexpr (moments == Moments::f32) {
      return floats_of(values);
    } else {
      return at_random(values, Use::moments);
    }
  }

  FT_INLINE void round_to_codes() {
    first_scale_ = scale_of(largest_first);
    second_scale_ = scale_of(root(largest_second));
    const float inverse = inverse_of(first_scale_), root_inverse = inverse_of(second_scale_);
    FT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const uint32_t bits = random(Use::moments, i);
      put_code(firsts_, i, code_of_first(first_[i], inverse, bits));
      put_code(seconds_, i, code_of_root(second_[i], root_inverse, bits));
    }
  }

  const RowStep& at_;
  const int64_t begin_;
  // As stored, before the step and then after it.
  Eight<Kept> kept_;
  Eight<Bf16> narrow_, lacking_;
  Eight<Moment> firsts_, seconds_;
  float first_scale_, second_scale_;
  // After the step.
  float first_[kEach], second_[kEach];  // with codes the second is a root
  float change_[kEach];                 // the gradient, then what the parameter is lessened by
};

// The sum of squares of `count` times 8 elements, `apart` elements apart, all asked for at once. In
// float; in double where they are beyond it, which begins at values of 3e18.
template <int count, class T, class Some>
FT_INLINE double squares(const StepRow& row, int64_t begin, int64_t apart, Some some) {
  Eight<T> gradient[count];
  FT_UNROLL
  for (int k = 0; k < count; ++k) gradient[k] = load<T>(row.grad, begin + k * apart, some);
  float sum = 0.0f;
  FT_UNROLL
  for (int k = 0; k < count; ++k)
    FT_UNROLL
    for (int i = 0; i < kEach; ++i) sum += value_at(gradient[k], i) * value_at(gradient[k], i);
  if (sum <= 3e38f) return sum;
  double wide = 0.0;
  FT_UNROLL
  for (int k = 0; k < count; ++k)
    FT_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const double value = value_at(gradient[k], i);
      wide += value * value;
    }
  return wide;
}

// Of one of `threads` threads' elements of the chunk that begins at element `start` of the row.
template <class T, int threads>
FT_INLINE double thread_squares(const StepRow& row, int64_t start, int thread) {
  constexpr int kAtOnce = 4;
  constexpr int64_t kApart = threads * kEach;
  static_assert(kChunk % (kAtOnce * kApart) == 0, "whole chunks have no rest");
  const int64_t begin = start + thread * kEach;
  double sum = 0.0;
  const bool aligned = is_aligned(row.grad, lead_of(row) * int64_t{sizeof(T)});
  if (aligned && start >= 0 && start + kChunk <= row.numel) {
    for (int64_t i = 0; i < kChunk; i += kAtOnce * kApart)
      sum += squares<kAtOnce, T>(row, begin + i, kApart, Whole{});
  } else {
    for (int64_t i = 0; i < kChunk && start + i < row.numel; i += kApart)
      sum += squares<1, T>(row, begin + i, kApart, part_of(row, begin + i));
  }
  return sum;
}

}  // namespace gpu
}  // namespace fasttrain
