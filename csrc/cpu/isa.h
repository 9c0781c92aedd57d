// Which instruction set the CPU kernels run in, chosen once when first asked.
#pragma once

namespace fasttrain {

enum class Isa { generic, avx2, avx512 };

Isa current_isa();

}  // namespace fasttrain

// FT_EACH_ISA(X) expands X once per instruction set that this build carries; FT_BEST(function)
// is that function in the current one. CMake defines FT_X86 where it compiled all three.
#ifdef FT_X86
#define FT_EACH_ISA(X) X(generic) X(avx2) X(avx512)
#define FT_BEST(function)                                                \
  (::fasttrain::current_isa() == ::fasttrain::Isa::avx512 ? avx512::function \
   : ::fasttrain::current_isa() == ::fasttrain::Isa::avx2 ? avx2::function   \
                                                          : generic::function)
#else
#define FT_EACH_ISA(X) X(generic)
#define FT_BEST(function) (generic::function)
#endif
