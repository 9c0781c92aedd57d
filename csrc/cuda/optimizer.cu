// Steps of optimizers and the norm of gradients on CUDA: one launch each for all tensors.
//
// Both are memory traffic: a parameter in float32 takes 28 bytes a step, one of bfloat16 with
// moments of 8 bits 10. At 4.3 TB/s, which is what an H200 copies at, that is 6.5 and 2.4 ms for
// 1e9 of them, and each of 132 multiprocessors must have some 25 KB on their way to it: 33 bytes a
// nanosecond, for which it waits 750. Arithmetic hides behind that while a parameter of 10 bytes
// takes at most 69 instructions; it takes 80, which 86 % of the bandwidth leave time for.
//
// Grids are of a fixed size; chunks of the table are dealt out to thread blocks in turn, so that
// those at work are in the same part of memory. The host reads nothing of the table, nor waits.
#include <algorithm>

#include "launch.h"
#include "optimizer.h"
#include "optimizer_lane.h"

namespace fasttrain {
namespace {

using gpu::kEach;
using gpu::Part;
using gpu::RowStep;
using gpu::Whole;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = kChunk / kBlock;

// ---- what a thread block does next, and who is the last -----------------------------------------

// The row of a chunk: the last whose first chunk isn't beyond it. For a whole warp, which asks 32
// rows at once: 2 or 3 turns for all tensors of a model.
__device__ int row_of(const StepRow* rows, int count, int chunk) {
  int low = 0;
  while (count > 1) {
    const int stride = (count + kWarp - 1) / kWarp, mine = (threadIdx.x % kWarp) * stride;
    const bool before = mine < count && rows[low + mine].first_chunk <= chunk;
    const int skipped = (__popc(__ballot_sync(kWholeWarp, before)) - 1) * stride;
    low += skipped;
    count = min(stride, count - skipped);
  }
  return low;
}

// Whether this is the last of `blocks` thread blocks to come here. It sees what all have written.
__device__ bool is_last(int64_t* workspace, int blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    auto* const arrived = reinterpret_cast<unsigned long long*>(workspace);
    last = atomicAdd(arrived, 1ull) == static_cast<unsigned long long>(blocks - 1);
    if (last) *arrived = 0;  // for the next launch, or the next replay of a CUDA graph
    __threadfence();
  }
  __syncthreads();
  return last;
}

// ---- steps --------------------------------------------------------------------------------------

// Of all threads of a warp.
__device__ __forceinline__ float warp_largest(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = gpu::larger(value, __shfl_xor_sync(kWholeWarp, value, distance));
  return value;
}

// The block of the row that begins at `start`, by a warp.
template <class Lane>
__device__ __forceinline__ void step_block(const RowStep& at, int64_t start, bool zero_grad) {
  // What `at` says is read anew where it is needed: kept in registers from block to block, there
  // would not be enough of them.
  asm volatile("" ::: "memory");
  const int rank = threadIdx.x % kWarp;
  const int64_t begin = start + rank * kEach;
  const Part part = gpu::part_of(at.row, begin);
  const bool whole = gpu::is_whole(at, part);
  Lane lane(at, begin);
  if (whole) {
    lane.load(zero_grad, Whole{});
  } else {
    lane.load(zero_grad, part);
  }
  lane.move();
  if constexpr (Lane::kCoded) lane.largest_first = warp_largest(lane.largest_first);
  if constexpr (Lane::kCoded && Lane::kHasSecond)
    lane.largest_second = warp_largest(lane.largest_second);
  lane.round();
  if (whole) {
    lane.store(rank == 0, Whole{});
  } else {
    lane.store(rank == 0, part);
  }
}

// Thread blocks on a multiprocessor: threads that ask for much need registers for it, 96 where
// there are five blocks, 80 where there are six; they ask for 40 KB and 36 KB, and for 24 KB where
// parameters have no moments. GeForce has slower memory, and a compiler that needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <class Lane>
constexpr int kThreadBlocks = 5;
#else
template <class Lane>
constexpr int kThreadBlocks = Lane::kAsked < 64 ? 6 : 5;
#endif

template <class Lane>
__global__ void __launch_bounds__(kThreads, kThreadBlocks<Lane>) step_kernel(const StepWork work) {
  __shared__ RowStep at;
  __shared__ int row;
  if (skips(work.gate)) return;
  const int warp = threadIdx.x / kWarp;
  const int chunks = static_cast<int>(chunks_of(work.rows, work.count));
  if (threadIdx.x == 0) row = -1;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    __syncthreads();  // the last chunk is done with `at`
    if (warp == 0) {
      const int found = row_of(work.rows, work.count, chunk);
      if (threadIdx.x == 0) {
        const StepRow& next = work.rows[found];
        Lane::enter(at, next, chunk - next.first_chunk, found == row, work.groups, work.gate,
                    work.seed);
        row = found;
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int block = warp; block < kBlocks; block += kWarps) {
      const int64_t begin = at.start + block * kBlock;
      if (begin < at.row.numel) step_block<Lane>(at, begin, work.zero_grad);
    }
  }
  // Only when no thread block needs the number of this step any more.
  if (!is_last(work.workspace, gridDim.x)) return;
  for (int i = threadIdx.x; i < work.count; i += kThreads) *work.rows[i].step += 1.0f;
}

template <class Lane>
cudaError_t launch(const StepWork& work, int device, cudaStream_t stream) {
  int multiprocessors = 0, blocks = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, step_kernel<Lane>, kThreads, 0);
  if (error != cudaSuccess) return error;
  step_kernel<Lane><<<multiprocessors * blocks, kThreads, 0, stream>>>(work);
  return cudaGetLastError();
}

template <Algorithm algorithm, Rounding rounding>
cudaError_t launch(const StepWork& work, int device, cudaStream_t stream) {
  using gpu::Lane;
  switch (work.moments) {
    case Moments::f32:
      return launch<Lane<algorithm, rounding, Moments::f32>>(work, device, stream);
    case Moments::bf16:
      return launch<Lane<algorithm, rounding, Moments::bf16>>(work, device, stream);
    case Moments::eight_bits:
      return launch<Lane<algorithm, rounding, Moments::eight_bits>>(work, device, stream);
    default:
      if constexpr (algorithm == Algorithm::sgd)
        return launch<Lane<algorithm, rounding, Moments::none>>(work, device, stream);
  }
  return cudaErrorInvalidValue;
}

template <Algorithm algorithm>
cudaError_t launch(const StepWork& work, int device, cudaStream_t stream) {
  switch (work.rounding) {
    case Rounding::none:
      return launch<algorithm, Rounding::none>(work, device, stream);
    case Rounding::master:
      return launch<algorithm, Rounding::master>(work, device, stream);
    case Rounding::stochastic:
      return launch<algorithm, Rounding::stochastic>(work, device, stream);
    case Rounding::kahan:
      return launch<algorithm, Rounding::kahan>(work, device, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch(const StepWork& work, int device, cudaStream_t stream) {
  switch (work.algorithm) {
    case Algorithm::adamw:
      return launch<Algorithm::adamw>(work, device, stream);
    case Algorithm::lion:
      return launch<Algorithm::lion>(work, device, stream);
    case Algorithm::sgd:
      return launch<Algorithm::sgd>(work, device, stream);
  }
  return cudaErrorInvalidValue;
}

// ---- the norm -----------------------------------------------------------------------------------

// In thread 0: the sum over all threads, always in the same order.
__device__ double block_sum(double value) {
  __shared__ double of_warps[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_down_sync(kWholeWarp, value, distance);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp];
  return sum;
}

// kPartials thread blocks on every device, so that the order of additions is the same on all.
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormWork work) {
  __shared__ int row;
  const int chunks = static_cast<int>(chunks_of(work.rows, work.count));
  const int blocks = max(1, min(chunks, static_cast<int>(gridDim.x)));
  if (blockIdx.x >= blocks) return;
  double sum = 0.0;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    __syncthreads();  // all have read the last row's number
    if (threadIdx.x < kWarp) row = row_of(work.rows, work.count, chunk);
    __syncthreads();
    const StepRow& at = work.rows[row];
    const int64_t start = (chunk - at.first_chunk) * kChunk - lead_of(at);
    sum += at.grad_is_bf16
               ? gpu::thread_squares<gpu::Bf16, kThreads>(at, start, threadIdx.x)
               : gpu::thread_squares<float, kThreads>(at, start, threadIdx.x);
  }
  auto* const partials = reinterpret_cast<double*>(work.workspace + 1);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
  if (!is_last(work.workspace, blocks)) return;
  sum = 0.0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) sum += __ldcg(partials + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *work.out = static_cast<float>(sqrt(sum));
}

}  // namespace

const char* optimizer_step(const StepWork& work, int device, void* stream) {
  // The runtime in this library is its own copy, which must know the device as torch's does.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return text_of(error);
  return text_of(launch(work, device, static_cast<cudaStream_t>(stream)));
}

const char* grad_norm(const NormWork& work, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    norm_kernel<<<kPartials, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work);
    error = cudaGetLastError();
  }
  return text_of(error);
}

}  // namespace fasttrain
