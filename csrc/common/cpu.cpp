#include "cpu.h"

#include <atomic>

namespace resnet_fused {
namespace {

Isa detect() {
#ifdef RF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{detect()};
  return isa;
}

}  // namespace

Isa current_isa() { return isa_in_use().load(std::memory_order_relaxed); }

}  // namespace resnet_fused

// Lets a test run the kernels of a lower instruction set than the machine's; returns the one now in use.
extern "C" __attribute__((visibility("default"))) int resnet_fused_limit_isa(int isa) {
  using resnet_fused::Isa;
  const int best = static_cast<int>(resnet_fused::detect());
  const int chosen = std::clamp(isa, 0, best);
  resnet_fused::isa_in_use().store(static_cast<Isa>(chosen), std::memory_order_relaxed);
  return chosen;
}
