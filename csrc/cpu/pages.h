// Large pages for large outputs.
#pragma once

#include <torch/csrc/stable/tensor.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace fasttrain {

// Asks the system to back a tensor that is about to be written by 2 MB pages. Above 32 MB the
// allocator gives memory back when it is freed, so that each call touches fresh pages, and a fault
// per 4 KB takes twice as long as all else here. A hint: where the system doesn't know large
// pages, or always takes them, nothing changes. (Stores past the caches gained nothing.)
inline void prefer_large_pages(const torch::stable::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kSmall = 4096, kLarge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kSmall - 1) & ~(kSmall - 1);
  const uintptr_t last = (begin + tensor.numel() * tensor.element_size()) & ~(kSmall - 1);
  if (last > first + kLarge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fasttrain
