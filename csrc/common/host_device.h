// Functions that the host and a GPU run alike. Always inlined: files compiled for different
// instruction sets must not share a copy (csrc/cpu/vec.h).
#pragma once

#ifdef __CUDACC__
#define FT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FT_HOST_DEVICE inline __attribute__((always_inline))
#endif
