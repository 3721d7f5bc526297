// A plan: everything a kernel launch is made of, as plain data. Plans are pure host C++ (no torch, no CUDA):
// the same ones serve the ops, the tests' emulator and, through ctypes (resnet_fused/plans.py), Python.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace resnet_fused {

// Every op launches one kernel or two (per-block partials, then their combination in a fixed order).
constexpr int kMaxSteps = 2;
constexpr int kMaxSymbol = 64;
constexpr int kMaxParams = 256;
constexpr int kMaxReason = 160;

struct Step {
  char symbol[kMaxSymbol];  // extern "C" name of the kernel
  char source[kMaxSymbol];  // its file in csrc/
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t smem;  // dynamic shared memory, bytes
  uint32_t params_size;
  alignas(8) unsigned char params[kMaxParams];  // the kernel's only argument, passed by value
};

struct Plan {
  char reason[kMaxReason];  // why there is no kernel for this problem; empty when there is one
  int64_t workspace;        // floats that the op allocates and passes in the problem
  int32_t count;            // steps; 0 if there is nothing to do
  Step steps[kMaxSteps];
};

}  // namespace resnet_fused
