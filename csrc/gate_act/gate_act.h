// Plans of the gate: y = relu((1 - g) x + g f) with g = sigmoid(v), and its gradients. All are [M, C]; the
// mask is [ceil(C/32), M], see rows.h.
#pragma once

#include "common/plan.h"
#include "common/rows.h"

namespace resnet_fused {

struct GateActProblem {
  DType dtype;
  int32_t relu;
  int64_t M, C;
  const void* v;
  const void* x;
  const void* f;
  void* y;
  uint32_t* mask;  // null: not wanted
};

// With dz = dy * mask: df = g dz, dx = (1 - g) dz, dv = g (1 - g) (f - x) dz.
struct GateActBackwardProblem {
  DType dtype;
  int64_t M, C;
  const void* dy;
  const uint32_t* mask;  // null: no ReLU
  const void* v;
  const void* x;
  const void* f;
  void* dv;
  void* dx;
  void* df;
};

struct GateActParams {
  GateActProblem io;
  Rows rows;
};
struct GateActBackwardParams {
  GateActBackwardProblem io;
  Rows rows;
};

Plan plan_gate_act(const GateActProblem& problem, int arch);
Plan plan_gate_act_backward(const GateActBackwardProblem& problem, int arch);

}  // namespace resnet_fused
