// What a step of an optimizer is told, on a CPU and on a GPU alike: a row for each tensor, numbers
// for each group of them, and what decides at the step itself. The formulas are in
// kernels/fasttrain_kernels/ops/optimizer_step/reference.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fasttrain {

enum class Algorithm : int64_t { adamw, lion, sgd };
// How a parameter is kept: in float32 (or in 16 bits, where a step starts from a master in float32);
// in 16 bits with what it lacks beside it, or rounded at random.
enum class Rounding : int64_t { none, master, stochastic, kahan };
enum class Moments : int64_t { none, f32, bf16, eight_bits };

// Moments of 8 bits share a power of two in blocks of 256 elements, counted from the beginning of
// the whole tensor, of which a row may be a part.
constexpr int64_t kBlock = 256;

// Elements that are one unit of work: few enough that small tensors and a large one are shared out
// alike. A tensor is cut where elements' numbers within it are multiples of it, less its lead.
constexpr int64_t kChunk = 64 * kBlock;

// A row of the table, as Python writes it (ops/optimizer_step/table.py): int64 each, pointers too.
struct StepRow {
  void* param;
  void* grad;
  void* beside;  // float32 master, or bfloat16 compensation; null: none
  void* first;   // exp_avg, momentum_buffer
  void* second;  // exp_avg_sq; with 8 bits its root
  float* first_scale;
  float* second_scale;
  float* step;  // steps taken before this one
  int64_t numel;
  int64_t offset;  // the element of the whole tensor that this one begins at
  int64_t stream;  // of random bits: a number for each whole tensor
  int64_t group;
  int64_t first_chunk;  // chunks of the rows before this one
  int64_t grad_is_bf16;
};

// Numbers of a group, float64 each.
struct GroupNumbers {
  double lr;
  double beta1;  // sgd: momentum
  double beta2;  // sgd: dampening
  double eps;
  double weight_decay;
  double nesterov;  // 0 or 1
  double sign;      // -1: maximize
};

// What is known on the device alone. Null: not asked for.
struct Gate {
  const float* norm;  // of the gradients as they lie there
  double max_norm;    // 0: no clipping
  const float* grad_scale;
  const float* skip;  // other than 0: leave everything as it is
};

// Whether everything is to stay as it is.
FT_HOST_DEVICE bool skips(const Gate& gate) {
  if (gate.skip != nullptr && *gate.skip != 0.0f) return true;
  return gate.norm != nullptr && !(*gate.norm - *gate.norm == 0.0f);  // infinite or NaN
}

// How many elements of its first block lie before the row.
FT_HOST_DEVICE int64_t lead_of(const StepRow& row) { return row.offset % kBlock; }

FT_HOST_DEVICE int64_t chunks_of(const StepRow& row) {
  return (lead_of(row) + row.numel + kChunk - 1) / kChunk;
}

// Of all rows, of which there are `count`.
FT_HOST_DEVICE int64_t chunks_of(const StepRow* rows, int64_t count) {
  return count == 0 ? 0 : rows[count - 1].first_chunk + chunks_of(rows[count - 1]);
}

// What kernels of a GPU need beside the table, int64 and 0 before and after a launch: a number that
// blocks count themselves by as they finish and, for a norm, partial sums.
constexpr int64_t kPartials = 2048;
constexpr int64_t kStepWorkspace = 1, kNormWorkspace = 1 + kPartials;

}  // namespace fasttrain
