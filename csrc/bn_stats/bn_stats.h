// Plan of bn_stats: mean and biased variance of every channel of x [M, C].
#pragma once

#include "common/plan.h"
#include "common/rows.h"

namespace resnet_fused {

struct BnStatsProblem {
  DType dtype;
  int64_t M, C;
  const void* x;     // [M, C]
  float* mean;       // [C]
  float* var;        // [C]
  float* workspace;  // [plan.workspace]
};

struct BnStatsParams {
  const void* x;
  float* partial;  // [blocks, 2, C]: mean and sum of squared deviations of each block's rows
  Rows rows;
};

struct BnStatsFinalizeParams {
  const float* partial;
  float* mean;
  float* var;
  int64_t blocks;
  Rows rows;
};

Plan plan_bn_stats(const BnStatsProblem& problem, int arch);

}  // namespace resnet_fused
