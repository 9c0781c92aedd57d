#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <string>

namespace fasttrain {
namespace {

bool cpu_has(Isa isa) {
  if (isa == Isa::generic) return true;
#ifdef FT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa best_isa() {
  if (cpu_has(Isa::avx512)) return Isa::avx512;
  return cpu_has(Isa::avx2) ? Isa::avx2 : Isa::generic;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

// Makes every kernel run in `name` from now on ("auto": the best again), so that one machine can
// test them all. Throws where the CPU lacks it. Not to be called while a kernel runs.
std::string set_cpu_isa(std::string name) {
  Isa wanted = best_isa();
  bool known = name == "auto";
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa)) {
      wanted = isa;
      known = true;
    }
  }
  STD_TORCH_CHECK(known, "set_cpu_isa: expected auto, generic, avx2 or avx512, got ", name);
  STD_TORCH_CHECK(cpu_has(wanted), "set_cpu_isa: this CPU or this build has no ", name);
  chosen().store(wanted);
  return isa_name(wanted);
}

std::string cpu_isa() { return isa_name(chosen().load()); }

STABLE_TORCH_LIBRARY_IMPL(fasttrain_native, CompositeExplicitAutograd, m) {
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

}  // namespace fasttrain
