// The CUDA kernels of steps and norms on the host (test_cuda_optimizer.py): what a thread does is
// the same code; warps, thread blocks and their order are made up here.
#include <utility>
#include <vector>

#include "optimizer_lane.h"

using namespace fasttrain;
using namespace fasttrain::gpu;

namespace {

constexpr int kWarp = 32, kThreads = 128;

struct Call {
  const StepRow* rows;
  int64_t count;
  const GroupNumbers* groups;
  Gate gate;
  uint64_t seed;
  bool zero_grad;
};

// run(row, number of the chunk in it) for each chunk of the table.
template <class Run>
void each_chunk(const StepRow* rows, int64_t count, const Run& run) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t chunk = 0; chunk < chunks_of(rows[i]); ++chunk) run(rows[i], chunk);
}

// Addresses that a GPU would have refused, since run_misaligned() was last asked.
int64_t misaligned = 0;

template <class T>
void expect_aligned(const void* values, int64_t begin) {
  const uintptr_t vector = sizeof(T) == 1 ? kEach : 16;
  if (values != nullptr && (reinterpret_cast<uintptr_t>(values) + begin * sizeof(T)) % vector != 0)
    ++misaligned;
}

template <class L, Rounding r>
void expect_aligned(const StepRow& row, int64_t begin) {
  if (row.grad_is_bf16) expect_aligned<Bf16>(row.grad, begin);
  if (!row.grad_is_bf16) expect_aligned<float>(row.grad, begin);
  expect_aligned<std::conditional_t<r == Rounding::none, float, Bf16>>(row.param, begin);
  expect_aligned<std::conditional_t<r == Rounding::master, float, Bf16>>(row.beside, begin);
  expect_aligned<typename L::Moment>(row.first, begin);
  expect_aligned<typename L::Moment>(row.second, begin);
}

template <class L, Rounding r>
void step_block(const RowStep& at, int64_t start, bool zero_grad) {
  std::vector<L> lanes;
  std::vector<Part> parts;
  float first = 0.0f, second = 0.0f;
  for (int rank = 0; rank < kWarp; ++rank) {
    const int64_t begin = start + rank * kEach;
    parts.push_back(part_of(at.row, begin));
    lanes.emplace_back(at, begin);
    if (is_whole(at, parts[rank])) {
      expect_aligned<L, r>(at.row, begin);
      lanes[rank].load(zero_grad, Whole{});
    } else {
      lanes[rank].load(zero_grad, parts[rank]);
    }
    lanes[rank].move();
    first = larger(lanes[rank].largest_first, first);
    second = larger(lanes[rank].largest_second, second);
  }
  for (int rank = 0; rank < kWarp; ++rank) {
    lanes[rank].largest_first = first;
    lanes[rank].largest_second = second;
    lanes[rank].round();
    if (is_whole(at, parts[rank])) {
      lanes[rank].store(rank == 0, Whole{});
    } else {
      lanes[rank].store(rank == 0, parts[rank]);
    }
  }
}

template <class L, Rounding r>
void step(const Call& call) {
  RowStep at;
  const StepRow* last = nullptr;
  each_chunk(call.rows, call.count, [&](const StepRow& row, int64_t chunk) {
    L::enter(at, row, chunk, &row == last, call.groups, call.gate, call.seed);
    last = &row;
    for (int64_t begin = at.start; begin < at.start + kChunk && begin < row.numel; begin += kBlock)
      step_block<L, r>(at, begin, call.zero_grad);
  });
  for (int64_t i = 0; i < call.count; ++i) *call.rows[i].step += 1.0f;
}

template <Algorithm a, Rounding r>
void step(const Call& call, Moments moments) {
  if (moments == Moments::f32) step<Lane<a, r, Moments::f32>, r>(call);
  if (moments == Moments::bf16) step<Lane<a, r, Moments::bf16>, r>(call);
  if (moments == Moments::eight_bits) step<Lane<a, r, Moments::eight_bits>, r>(call);
  if constexpr (a == Algorithm::sgd)
    if (moments == Moments::none) step<Lane<a, r, Moments::none>, r>(call);
}

template <Algorithm a>
void step(const Call& call, Rounding rounding, Moments moments) {
  if (rounding == Rounding::none) step<a, Rounding::none>(call, moments);
  if (rounding == Rounding::master) step<a, Rounding::master>(call, moments);
  if (rounding == Rounding::stochastic) step<a, Rounding::stochastic>(call, moments);
  if (rounding == Rounding::kahan) step<a, Rounding::kahan>(call, moments);
}

}  // namespace

extern "C" void run_step(const StepRow* rows, int64_t count, const GroupNumbers* groups,
                         int64_t algorithm, int64_t rounding, int64_t moments, const float* norm,
                         double max_norm, const float* grad_scale, const float* skip, int64_t seed,
                         bool zero_grad) {
  const Call call{rows, count, groups, {norm, max_norm, grad_scale, skip},
                  static_cast<uint64_t>(seed), zero_grad};
  if (skips(call.gate)) return;
  const auto r = static_cast<Rounding>(rounding);
  const auto m = static_cast<Moments>(moments);
  const auto a = static_cast<Algorithm>(algorithm);
  if (a == Algorithm::adamw) step<Algorithm::adamw>(call, r, m);
  if (a == Algorithm::lion) step<Algorithm::lion>(call, r, m);
  if (a == Algorithm::sgd) step<Algorithm::sgd>(call, r, m);
}

extern "C" int64_t run_misaligned() { return std::exchange(misaligned, 0); }

extern "C" float run_norm(const StepRow* rows, int64_t count) {
  double sum = 0.0;
  each_chunk(rows, count, [&](const StepRow& row, int64_t chunk) {
    const int64_t start = chunk * kChunk - lead_of(row);
    for (int thread = 0; thread < kThreads; ++thread)
      sum += row.grad_is_bf16 ? thread_squares<Bf16, kThreads>(row, start, thread)
                              : thread_squares<float, kThreads>(row, start, thread);
  });
  return static_cast<float>(std::sqrt(sum));
}

extern "C" double run_power(double base, double exponent) { return power(base, exponent); }

// The scale of `largest`, and for each value its codes as a root and as a first moment.
extern "C" float run_codes(float largest, const float* values, const int32_t* random, int64_t count,
                           uint8_t* roots, uint8_t* firsts) {
  const float scale = scale_of(largest), inverse = inverse_of(scale);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random[i]);
    roots[i] = static_cast<uint8_t>(code_of_root(values[i], inverse, bits));
    firsts[i] = static_cast<uint8_t>(code_of_first(values[i], inverse, bits));
  }
  return scale;
}
