// Plans of the batch norm's tails: bn_act, relu_mask, bn_act_backward_reduce and bn_act_backward_apply.
// Activations are [M, C]; coefficients [C]; masks [ceil(C/32), M], see rows.h. An absent operand is a null
// pointer.
#pragma once

#include "common/plan.h"
#include "common/rows.h"

namespace resnet_fused {

// z = scale*x + shift (+ residual, or + residual_scale*residual + residual_shift); y = relu ? max(z, 0) : z
struct BnActProblem {
  DType dtype;
  int32_t relu;
  int32_t y_pitch;        // elements from a row of y to its next; 0: C
  PaddedShortcut padded;  // of the residual; its vectors are [C] all the same
  int64_t M, C;
  const void* x;
  const float* scale;
  const float* shift;
  const void* residual;         // as x, or as padded says; may be null
  const float* residual_scale;  // with residual_shift, or both null
  const float* residual_shift;
  void* y;
  uint32_t* mask;  // null: not wanted
};

// mask = the bits of y > 0
struct ReluMaskProblem {
  DType dtype;
  int64_t M, C;
  const void* y;
  uint32_t* mask;
};

// dz = dy * gate; sum_dz = sum over rows of dz; sum_dz_xc = that of dz * (x - mean), where mean is given
struct BnActBackwardReduceProblem {
  DType dtype;
  int32_t dy_pitch;  // elements from a row of dy to its next; 0: C
  int64_t M, C;
  const void* dy;
  ReluGate gate;
  const void* x;      // with gate.scale or mean
  const float* mean;  // may be null
  void* dz;           // null: not wanted
  float* sum_dz;
  float* sum_dz_xc;
  float* workspace;
};

// dx = coef_dz*dz + coef_x*(x - mean) + coef_1 (+ addend)
struct BnActBackwardApplyProblem {
  DType dtype;
  int64_t M, C;
  const void* dy;
  ReluGate gate;
  const void* x;
  const float* mean;
  const float* coef_dz;
  const float* coef_x;
  const float* coef_1;
  const void* addend;  // as dx, or null
  void* dx;
};

struct BnActParams {
  BnActProblem io;
  Rows rows;
};
struct ReluMaskParams {
  ReluMaskProblem io;
  Rows rows;
};
struct BnActBackwardReduceParams {
  BnActBackwardReduceProblem io;  // workspace: [blocks, sums, C]
  Rows rows;
};
struct BnActBackwardApplyParams {
  BnActBackwardApplyProblem io;
  Rows rows;
};

Plan plan_bn_act(const BnActProblem& problem, int arch);
Plan plan_relu_mask(const ReluMaskProblem& problem, int arch);
Plan plan_bn_act_backward_reduce(const BnActBackwardReduceProblem& problem, int arch);
Plan plan_bn_act_backward_apply(const BnActBackwardApplyProblem& problem, int arch);

}  // namespace resnet_fused
