// Plans of the concatenation: y = [x | relu?(scale*u + shift)] along the channels, and its gradient. x is [M,
// C], u [M, K], y [M, C + K]; vectors are [K]; the mask, [ceil(K/32), M], is that of the second part: see
// rows.h.
#pragma once

#include "common/plan.h"
#include "common/rows.h"

namespace resnet_fused {

struct ConcatActProblem {
  DType dtype;
  int32_t relu;
  int64_t M, C, K;
  const void* x;
  const void* u;
  const float* scale;
  const float* shift;
  void* y;
  uint32_t* mask;  // null: not wanted
};

// dz = dy * mask of the second part of dy, its sum over rows and that of dz * (u - mean).
struct ConcatActBackwardProblem {
  DType dtype;
  int64_t M, C, K;
  const void* dy;        // [M, C + K]
  const uint32_t* mask;  // null: no ReLU
  const void* u;         // with mean, or both null
  const float* mean;
  void* dz;          // [M, K]
  float* sum_dz;     // [K]
  float* sum_dz_xc;  // [K]
  float* workspace;
};

struct CopyRowsParams {
  const void* x;  // [M, C]
  void* y;        // rows `pitch` elements apart
  int64_t pitch;
  Rows rows;
};

Plan plan_concat_act(const ConcatActProblem& problem, int arch);
Plan plan_concat_act_backward(const ConcatActBackwardProblem& problem, int arch);

}  // namespace resnet_fused
