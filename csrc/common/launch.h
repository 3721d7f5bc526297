// The one place where kernels are launched. No torch and no CUDA header here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/plan.h"

namespace resnet_fused {

struct Launch {
  const char* symbol;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t smem;       // dynamic shared memory, bytes
  const void* params;  // the kernel's only argument
  size_t params_size;
};

// Starts a kernel on a stream; 0, or an error number.
using Launcher = int (*)(const Launch*, void* stream);

// Enters a kernel under its name; made at load time by RESNET_FUSED_KERNEL.
struct KernelEntry {
  KernelEntry(const char* symbol, const void* function);
};

constexpr int kHost = -1;

// True while a test's launcher stands in for CUDA's: the ops then take the kernels for CPU tensors too.
bool launcher_replaced();

// The tile that this thread's next plans are to have, where an op's problem names none; 0: their own choice.
int wanted_tile();

// Compute capability times ten of a device; 80 for kHost, where only a replaced launcher runs kernels.
int device_arch(int device);

// Launches every step of a plan on the device's current stream. Throws std::runtime_error with the plan's
// reason if it has one, and with the kernel's name if a launch fails.
void run(const Plan& plan, int device);

}  // namespace resnet_fused

extern "C" {
// Replaces the launcher; nullptr brings CUDA's back.
__attribute__((visibility("default"))) void resnet_fused_set_launcher(resnet_fused::Launcher launcher);
// One launch on the device's current stream, for tools that run plans of their own; null, or what went wrong.
__attribute__((visibility("default"))) const char* resnet_fused_launch(const resnet_fused::Launch* launch,
                                                                       int device);
// What wanted_tile() gives from now on, in this thread.
__attribute__((visibility("default"))) void resnet_fused_want_tile(int tile);
// 1 if the extension was built with CUDA kernels.
__attribute__((visibility("default"))) int resnet_fused_has_cuda();
}
