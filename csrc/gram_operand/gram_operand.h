// Plan of gram_operand: a = round(act(scale*x + shift) - center) of every stride-th pixel, and the mean of a.
#pragma once

#include "common/plan.h"
#include "common/rows.h"

namespace resnet_fused {

struct GramOperandProblem {
  DType dtype;
  int32_t relu;
  int64_t N, H, W, C;
  int64_t stride;
  const void* x;       // [N, H, W, C]
  const float* scale;  // [C], with shift, or both null: identity
  const float* shift;
  const float* center;
  void* a;      // [N, ceil(H/stride), ceil(W/stride), C]
  float* mean;  // [C]
  float* workspace;
};

struct GramOperandParams {
  const void* x;
  const float* scale;
  const float* shift;
  const float* center;
  void* a;
  float* partial;  // [blocks, 1, C]
  Rows rows;       // of a
  int32_t relu;
  int32_t stride;
  int32_t H, W;  // of x
};

Plan plan_gram_operand(const GramOperandProblem& problem, int arch);

}  // namespace resnet_fused
