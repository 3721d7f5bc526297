#pragma once

#include "../common/dtype.h"

namespace resnet_fused {

// Activations are [M, C] of type dtype, masks [ceil(C/32), M] or null.

struct GateActCpu {
  DType dtype;
  int64_t m, c;
  const void *v, *x, *f;
  bool relu;
  void* y;
  uint32_t* mask;
};
void gate_act_cpu(const GateActCpu& args);

struct GateActBackwardCpu {
  DType dtype;
  int64_t m, c;
  const void* dy;
  const uint32_t* mask;
  const void *v, *x, *f;
  void *dv, *dx, *df;
};
void gate_act_backward_cpu(const GateActBackwardCpu& args);

}  // namespace resnet_fused
