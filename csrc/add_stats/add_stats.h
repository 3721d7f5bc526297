// Plan of add_stats: y = x + u, or x + scale*u + shift, and the mean and biased variance of y. All are [M,
// C].
#pragma once

#include "common/plan.h"
#include "common/rows.h"

namespace resnet_fused {

struct AddStatsProblem {
  DType dtype;
  int64_t M, C;
  const void* x;
  const void* u;
  const float* scale;  // [C], with shift, or both null
  const float* shift;
  void* y;
  float* mean;  // [C]
  float* var;   // [C]
  float* workspace;
};

struct AddStatsParams {
  const void* x;
  const void* u;
  const float* scale;
  const float* shift;
  void* y;
  float* partial;  // [blocks, 2, C]
  Rows rows;
};

Plan plan_add_stats(const AddStatsProblem& problem, int arch);

}  // namespace resnet_fused
