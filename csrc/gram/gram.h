// Plan of gram: mean and covariance of a convolution's operand, from which the batch statistics of its output
// follow.
#pragma once

#include "common/plan.h"
#include "gemm/gemm.h"

namespace resnet_fused {

// a = round(relu(scale*x + shift)), or x, of every stride-th pixel, minus center, rounded.
struct GramProblem {
  DType dtype;
  int64_t N, H, W, C;
  int64_t stride;
  const void* x;       // [N, H, W, C]
  const float* scale;  // [C], with shift, or both null
  const float* shift;
  const float* center;  // [C]
  float* cov;           // [C, C], biased
  float* mean;          // [C], of a
  float* workspace;
  int32_t tile;  // 0: the plan chooses; else one of gemm.h's, counted from 1
};

using GramParams = PixelsParams<Center, Center>;

struct GramFinalizeParams {
  const float* partial;  // [splits, C, C], tiles on and above the diagonal; then [splits, C]
  float* cov;
  float* mean;
  int64_t splits;
  float inverse_count;
  int32_t C;
  int32_t tile;
};

Plan plan_gram(const GramProblem& problem, int arch);

}  // namespace resnet_fused
