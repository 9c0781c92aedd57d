// Cross-entropy of long rows on CUDA: one row for each block or, from compute capability 9.0, for
// each cluster of blocks.
//
// A logit is read from memory once and its gradient written once. What a block reads of its row
// stays in its shared memory, as it was stored, until the row's sum is known; a cluster of 8 holds
// 900 thousand bfloat16 so. What does not fit is read again, the latest first, from the L2 cache.
// Sums are added in an order that depends on the row's width, address and device alone.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <type_traits>

#include "cross_entropy.h"
#include "launch.h"

namespace fasttrain {
namespace {

constexpr int kThreads = 512;      // of a block that shares its multiprocessor with others
constexpr int kMaxThreads = 1024;  // of a block that has it alone; leaves 64 registers a thread

// Vectors that a thread loads before it works on them: 512 threads ask for 32 KB at once, where
// an H100 needs 18 KB on their way to every multiprocessor. With a softcap tanh binds, not memory.
template <bool kSoftcap>
constexpr int kBatch = kSoftcap ? 1 : 4;

template <class T>
constexpr int kLanes = sizeof(uint4) / sizeof(T);

// ---- rows: vectors of 16 bytes, and the elements before the first boundary and after the last ---

struct Columns {
  int head;
  int vectors;
  int edges;  // elements in no vector: the head's, then the tail's
};

// Where `in` and `out` lie differently within 16 bytes, all elements are edges.
template <class T>
__device__ Columns columns_of(const T* in, const T* out, int width) {
  const unsigned offset = reinterpret_cast<uintptr_t>(in) % sizeof(uint4);
  if (offset != reinterpret_cast<uintptr_t>(out) % sizeof(uint4)) return {0, 0, width};
  const int missing = (sizeof(uint4) - offset) % sizeof(uint4) / sizeof(T);
  const int head = min(width, missing);
  const int vectors = (width - head) / kLanes<T>;
  return {head, vectors, width - vectors * kLanes<T>};
}

template <class T>
__device__ int edge_column(const Columns& columns, int edge) {
  return edge < columns.head ? edge : edge + columns.vectors * kLanes<T>;
}

// What one block does of a row: vectors [begin, begin + count), the first `kept` of them held in
// shared memory between the passes; and perhaps the edges.
struct Share {
  int begin;
  int count;
  int kept;
  int edges;
};

__device__ Share share_of(const Columns& columns, int rank, int blocks, int capacity) {
  const int each = (columns.vectors + blocks - 1) / blocks;
  const int begin = min(columns.vectors, rank * each);
  const int count = min(each, columns.vectors - begin);
  return {begin, count, min(count, capacity), rank == 0 ? columns.edges : 0};
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&values)[kLanes<T>]) {
  const unsigned words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    } else {
      values[i] = __uint_as_float(words[i]);
    }
  }
}

// Rounds to nearest.
template <class T>
__device__ __forceinline__ uint4 pack(const float (&values)[kLanes<T>]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      words[i] = reinterpret_cast<const unsigned&>(pair);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      words[i] = reinterpret_cast<const unsigned&>(pair);
    } else {
      words[i] = __float_as_uint(values[i]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- sums over a row ----------------------------------------------------------------------------

// This thread's part of the sums over `share`; `kept` receives what is to be held.
template <class T, bool kSoftcap>
__device__ __forceinline__ Sums thread_sums(const CrossEntropy& problem, const T* row,
                                            const Columns& columns, const Share& share,
                                            uint4* kept) {
  constexpr int n = kBatch<kSoftcap>;
  const uint4* vectors = reinterpret_cast<const uint4*>(row + columns.head) + share.begin;
  Sums sums;
  for (int start = threadIdx.x; start < share.count; start += n * blockDim.x) {
    uint4 raw[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int i = start + k * blockDim.x;
      if (i < share.count) raw[k] = vectors[i];
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int i = start + k * blockDim.x;
      if (i >= share.count) continue;
      if (i < share.kept) kept[i] = raw[k];
      float z[kLanes<T>];
      unpack<T>(raw[k], z);
      for (float& value : z) value = capped<kSoftcap>(value, problem.terms).z;
      add(sums, z, problem.wants_total, problem.wants_entropy);
    }
  }
  for (int edge = threadIdx.x; edge < share.edges; edge += blockDim.x) {
    const float logit = static_cast<float>(row[edge_column<T>(columns, edge)]);
    const float z[] = {capped<kSoftcap>(logit, problem.terms).z};
    add(sums, z, problem.wants_total, problem.wants_entropy);
  }
  return sums;
}

// All lanes' sums, in every lane. Lane 0's is taken, as lanes add in different orders.
__device__ Sums warp_sums(Sums sums) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Sums other;
    other.maximum = __shfl_down_sync(kWholeWarp, sums.maximum, distance);
    other.sum = __shfl_down_sync(kWholeWarp, sums.sum, distance);
    other.total = __shfl_down_sync(kWholeWarp, sums.total, distance);
    other.weighted = __shfl_down_sync(kWholeWarp, sums.weighted, distance);
    sums = merged(sums, other);
  }
  sums.maximum = __shfl_sync(kWholeWarp, sums.maximum, 0);
  sums.sum = __shfl_sync(kWholeWarp, sums.sum, 0);
  sums.total = __shfl_sync(kWholeWarp, sums.total, 0);
  sums.weighted = __shfl_sync(kWholeWarp, sums.weighted, 0);
  return sums;
}

// All threads' sums, in every thread: each warp adds up what all warps have found. Once a kernel.
__device__ Sums block_sums(const Sums& mine) {
  __shared__ float4 found[kMaxThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Sums warps = warp_sums(mine);
  if (lane == 0) found[warp] = make_float4(warps.maximum, warps.sum, warps.total, warps.weighted);
  __syncthreads();
  Sums sums;
  if (lane < blockDim.x / kWarp) {
    const float4 one = found[lane];
    sums = {one.x, one.y, one.z, one.w};
  }
  return warp_sums(sums);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// The sums of all blocks of the cluster. A block may not end before the others have read what it
// found, so that it arrives at a second barrier here and waits for the rest at the end.
__device__ Sums cluster_sums(const Sums& mine) {
  __shared__ float4 found;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) found = make_float4(mine.maximum, mine.sum, mine.total, mine.weighted);
  cluster.sync();
  Sums sums;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
    const float4 one = *cluster.map_shared_rank(&found, rank);
    sums = merged(sums, {one.x, one.y, one.z, one.w});
  }
  cluster.barrier_arrive();
  return sums;
}

__device__ void wait_for_cluster() { cooperative_groups::this_cluster().barrier_wait(); }
#else
// Never called: the host asks for one block a row.
__device__ Sums cluster_sums(const Sums& mine) { return mine; }
__device__ void wait_for_cluster() {}
#endif

// z of the label, where its column is one of these; else 0.
template <class T, bool kSoftcap>
__device__ float label_of(const CrossEntropy& problem, const T* row, int column) {
  return column < 0 ? 0.0f : capped<kSoftcap>(static_cast<float>(row[column]), problem.terms).z;
}

// The label's column among these; -1 where it is not.
__device__ int label_column(const CrossEntropy& problem, int64_t target) {
  const int64_t column = target - problem.first;
  return target >= 0 && column >= 0 && column < problem.width ? static_cast<int>(column) : -1;
}

__device__ void write_statistics(float* at, const Sums& sums, float label) {
  at[0] = sums.maximum;
  at[1] = sums.sum;
  at[2] = label;
  at[3] = sums.total;
  at[4] = sums.weighted;
}

// ---- the gradient of a row ----------------------------------------------------------------------

// `label`: the label's place in the vector, if it is there. Tested once a vector, not once an
// element.
template <class T, bool kSoftcap>
__device__ __forceinline__ uint4 vector_gradient(const uint4& raw, int label,
                                                 const RowGradient& row, const Terms& terms) {
  float logits[kLanes<T>], result[kLanes<T>];
  unpack<T>(raw, logits);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) result[i] = gradient(capped<kSoftcap>(logits[i], terms), row);
  if (label >= 0 && label < kLanes<T>) {
#pragma unroll
    for (int i = 1; i < kLanes<T>; ++i) logits[0] = i == label ? logits[i] : logits[0];
    const float found = label_gradient(capped<kSoftcap>(logits[0], terms), row, terms);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) result[i] = i == label ? found : result[i];
  }
  return pack<T>(result);
}

// Goes backwards: of what was not held, what was read last is the likeliest to be in the cache.
template <class T, bool kSoftcap>
__device__ __forceinline__ void write_gradients(const CrossEntropy& problem, const T* in, T* out,
                                                const Columns& columns, const Share& share,
                                                const uint4* kept, int label,
                                                const RowGradient& row) {
  constexpr int n = kBatch<kSoftcap>;
  const int first = columns.head + share.begin * kLanes<T>;
  const uint4* in_vectors = reinterpret_cast<const uint4*>(in + first);
  uint4* out_vectors = reinterpret_cast<uint4*>(out + first);
  // This thread's vectors are those that it read: threadIdx.x, threadIdx.x + blockDim.x, ...
  const int own = (share.count + blockDim.x - 1 - threadIdx.x) / blockDim.x;
  for (int last = own - 1; last >= 0; last -= n) {
    uint4 raw[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int i = threadIdx.x + (last - k) * static_cast<int>(blockDim.x);
      if (last >= k) raw[k] = i < share.kept ? kept[i] : in_vectors[i];
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int i = threadIdx.x + (last - k) * static_cast<int>(blockDim.x);
      if (last < k) continue;
      out_vectors[i] = vector_gradient<T, kSoftcap>(
          raw[k], label - (first + i * kLanes<T>), row, problem.terms);
    }
  }
  for (int edge = threadIdx.x; edge < share.edges; edge += blockDim.x) {
    const int column = edge_column<T>(columns, edge);
    const Capped value = capped<kSoftcap>(static_cast<float>(in[column]), problem.terms);
    out[column] = static_cast<T>(column == label ? label_gradient(value, row, problem.terms)
                                                 : gradient(value, row));
  }
}

template <class T>
__device__ void write_zeros(T* out, const Columns& columns, const Share& share) {
  uint4* vectors = reinterpret_cast<uint4*>(out + columns.head) + share.begin;
  for (int i = threadIdx.x; i < share.count; i += blockDim.x) vectors[i] = make_uint4(0, 0, 0, 0);
  for (int edge = threadIdx.x; edge < share.edges; edge += blockDim.x) {
    out[edge_column<T>(columns, edge)] = static_cast<T>(0.0f);
  }
}

// ---- kernels ------------------------------------------------------------------------------------

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) forward_kernel(const CrossEntropy problem) {
  const int64_t row = blockIdx.x;
  const int64_t target = problem.targets[row];
  float* statistics = problem.statistics + row * kFields;
  if (target == kIgnored) {
    if (threadIdx.x < kFields) statistics[threadIdx.x] = 0.0f;
    return;
  }
  const T* logits = static_cast<const T*>(problem.logits) + row * problem.logits_stride;
  const Columns columns = columns_of(logits, logits, problem.width);
  const Share share = share_of(columns, 0, 1, 0);
  Sums sums = block_sums(thread_sums<T, kSoftcap>(problem, logits, columns, share, nullptr));
  if (threadIdx.x != 0) return;
  float label = label_of<T, kSoftcap>(problem, logits, label_column(problem, target));
  if (problem.first > 0) {
    sums = merged({statistics[0], statistics[1], statistics[3], statistics[4]}, sums);
    label += statistics[2];
  }
  write_statistics(statistics, sums, label);
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) backward_kernel(const CrossEntropy problem) {
  const int64_t row = blockIdx.x;
  const int64_t target = problem.targets[row];
  const T* logits = static_cast<const T*>(problem.logits) + row * problem.logits_stride;
  T* out = static_cast<T*>(problem.out) + row * problem.out_stride;
  const Columns columns = columns_of(logits, out, problem.width);
  const Share share = share_of(columns, 0, 1, 0);
  if (target == kIgnored) return write_zeros(out, columns, share);
  const float* statistics = problem.statistics + row * kFields;
  const RowGradient gradient_terms =
      row_gradient(statistics[0], statistics[1], problem.coefficients[row], problem.terms);
  write_gradients<T, kSoftcap>(problem, logits, out, columns, share, nullptr,
                               label_column(problem, target), gradient_terms);
}

// `blocks` blocks share a row, and each holds up to `capacity` vectors of it.
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads)
    forward_backward_kernel(const CrossEntropy problem, int blocks, int capacity) {
  extern __shared__ uint4 kept[];
  const int64_t row = blockIdx.x / blocks;
  const int rank = blockIdx.x % blocks;
  const int64_t target = problem.targets[row];
  T* logits = static_cast<T*>(problem.out) + row * problem.out_stride;
  const Columns columns = columns_of(logits, logits, problem.width);
  const Share share = share_of(columns, rank, blocks, capacity);
  float* statistics = problem.statistics + row * kFields;
  if (target == kIgnored) {  // all blocks of the row leave here, before any waits for another
    if (rank == 0 && threadIdx.x < kFields) statistics[threadIdx.x] = 0.0f;
    return write_zeros(logits, columns, share);
  }
  // Read before the barriers below, after which its owner overwrites it.
  const int label = label_column(problem, target);
  const bool writes_statistics = rank == 0 && threadIdx.x == 0;
  const float label_z = writes_statistics ? label_of<T, kSoftcap>(problem, logits, label) : 0.0f;
  Sums sums = block_sums(thread_sums<T, kSoftcap>(problem, logits, columns, share, kept));
  if (blocks > 1) sums = cluster_sums(sums);
  if (writes_statistics) write_statistics(statistics, sums, label_z);
  const RowGradient gradient_terms =
      row_gradient(sums.maximum, sums.sum, problem.coefficients[row], problem.terms);
  write_gradients<T, kSoftcap>(problem, logits, logits, columns, share, kept, label,
                               gradient_terms);
  if (blocks > 1) wait_for_cluster();
}

// ---- launches -----------------------------------------------------------------------------------

constexpr int kVector = sizeof(uint4);
// Shared memory of a block that holds nothing of its row: 0.5 KB, and 1 KB that the system takes.
constexpr int kOtherShared = 2048;

struct Device {
  int shared_of_multiprocessor;
  int shared_of_block;
  int max_cluster;
};

cudaError_t ask(int device, Device& facts) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&facts.shared_of_multiprocessor,
                                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&facts.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
  }
  facts.max_cluster = major == 9 || major == 10 ? 8 : 1;  // 8: what every such device can do
  return error;
}

cudaError_t facts_of(int device, Device& facts) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    facts = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = ask(device, facts);
  if (error == cudaSuccess) known[device] = facts;
  return error;
}

struct Plan {
  int blocks;  // that share a row
  int threads;
  int capacity;  // vectors that a block holds
};

// The fewest blocks a row with which every multiprocessor holds two blocks, one of which reads
// while the other writes. Where that can't be, the most, with a multiprocessor each.
Plan plan(int64_t row_bytes, const Device& device, int max_cluster) {
  const int64_t vectors = row_bytes / kVector;
  for (int blocks = 1;; blocks *= 2) {
    const int64_t each = (vectors + blocks - 1) / blocks;
    if (2 * (each * kVector + kOtherShared) <= device.shared_of_multiprocessor) {
      return {blocks, kThreads, static_cast<int>(each)};
    }
    if (blocks >= max_cluster) {
      const int64_t most = (device.shared_of_block - kOtherShared) / kVector;
      return {blocks, kMaxThreads, static_cast<int>(std::min(each, most))};
    }
  }
}

cudaLaunchConfig_t configuration(int64_t blocks, int threads, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

// Lets a block have as much shared memory as there is, and several blocks theirs at once. Always
// the same amount: another thread may be about to launch the same kernel for another width.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, const Device& device) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           device.shared_of_block - kOtherShared);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// Launches, with as many blocks a row as planned, or fewer where the device can't run so many at
// once: a part of it (MIG) may have no eight multiprocessors that can form a cluster.
template <class Kernel>
cudaError_t launch_rows(Kernel kernel, const CrossEntropy& problem, int64_t row_bytes, int device,
                        void* stream) {
  Device facts{};
  cudaError_t error = facts_of(device, facts);
  if (error == cudaSuccess) error = allow_shared_memory(kernel, facts);
  for (int max_cluster = facts.max_cluster; error == cudaSuccess; max_cluster /= 2) {
    const Plan chosen = plan(row_bytes, facts, max_cluster);
    cudaLaunchConfig_t config =
        configuration(problem.rows * chosen.blocks, chosen.threads, stream);
    config.dynamicSmemBytes = static_cast<size_t>(chosen.capacity) * kVector;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = chosen.blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = chosen.blocks > 1 ? 1 : 0;
    int clusters = 0;
    if (chosen.blocks == 1 ||
        (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess &&
         clusters > 0)) {
      return cudaLaunchKernelEx(&config, kernel, problem, chosen.blocks, chosen.capacity);
    }
    cudaGetLastError();  // forgets what the question met
  }
  return error;
}

template <class T>
struct Stored {
  using type = T;
};

// Calls `launch` with the type of the logits and whether there is a softcap.
template <class Launch>
const char* with_types(const CrossEntropy& problem, int device, Launch launch) {
  // The runtime in this library is its own copy, which must know the device as torch's does.
  cudaError_t error = cudaSetDevice(device);
  const auto with_softcap = [&](auto type) {
    return problem.terms.softcap == 0.0f ? launch(type, std::false_type())
                                         : launch(type, std::true_type());
  };
  if (error == cudaSuccess) {
    error = problem.dtype == DType::bf16  ? with_softcap(Stored<__nv_bfloat16>())
            : problem.dtype == DType::f16 ? with_softcap(Stored<__half>())
                                          : with_softcap(Stored<float>());
  }
  return text_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace

const char* cross_entropy_forward(const CrossEntropy& problem, int device, void* stream) {
  const cudaLaunchConfig_t config = configuration(problem.rows, kThreads, stream);
  return with_types(problem, device, [&](auto type, auto softcap) {
    using T = typename decltype(type)::type;
    return cudaLaunchKernelEx(&config, forward_kernel<T, softcap()>, problem);
  });
}

const char* cross_entropy_backward(const CrossEntropy& problem, int device, void* stream) {
  const cudaLaunchConfig_t config = configuration(problem.rows, kThreads, stream);
  return with_types(problem, device, [&](auto type, auto softcap) {
    using T = typename decltype(type)::type;
    return cudaLaunchKernelEx(&config, backward_kernel<T, softcap()>, problem);
  });
}

const char* cross_entropy_forward_backward(const CrossEntropy& problem, int device, void* stream) {
  return with_types(problem, device, [&](auto type, auto softcap) {
    using T = typename decltype(type)::type;
    const int64_t row_bytes = static_cast<int64_t>(problem.width) * sizeof(T);
    return launch_rows(forward_backward_kernel<T, softcap()>, problem, row_bytes, device, stream);
  });
}

const char* cuda_error(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, forward_kernel<float, false>);
  }
  return text_of(error);
}

}  // namespace fasttrain
