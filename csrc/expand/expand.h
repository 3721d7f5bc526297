// Plans of the block's end in one product: expand, the last 1x1 convolution with its batch norm, the shortcut
// (a tensor, or a projection: the dual GEMM) and the ReLU; and expand_dgrad, the gradient of an operand whose
// batch norm's statistics came from its Gram matrix (pass D).
#pragma once

#include "common/plan.h"
#include "gemm/gemm.h"

namespace resnet_fused {

// y = act(out_scale * (a W') + out_shift + shortcut) with a = relu(scale*x + shift), or x; the shortcut is
// residual, or out_scale2 * (x2 W2') with the pixels of x2 [N, H2, W2, C2] that the stride names. Weights [K,
// C] and [K, C2].
struct ExpandProblem {
  DType dtype;
  int32_t relu;
  int64_t N, H, W, C, K;  // of y
  int64_t H2, W2, C2, stride;
  const void* x;
  const float* scale;  // [C], with shift, or both null; with x2 always given
  const float* shift;
  const void* weight;
  const float* out_scale;  // [K]
  const float* out_shift;
  const void* x2;
  const void* weight2;
  const float* out_scale2;
  const void* residual;
  void* y;
  uint32_t* mask;  // [ceil(K/32), M] or null
  int32_t tile;    // 0: the plan chooses; else one of gemm.h's, counted from 1
};

// da = (dy * mask) W + a Q + constant with a = relu(scale*x + shift), or x's strided pixels; then
//   with scale   dz = da * relu'(scale*x + shift), and its sums (stride 1)
//   otherwise    dx = da at those pixels, 0 at the others, + addend * addend_mask
struct ExpandDgradProblem {
  DType dtype;
  int64_t N, H, W, C, K, stride;  // x [N, H, W, C], dy [N, H', W', K]
  const void* dy;
  const uint32_t* mask;  // or null
  const void* weight;    // [K, C]
  const void* x;
  const float* scale;
  const float* shift;
  const void* q;          // [C, C], symmetric
  const float* constant;  // [C]
  const float* mean;      // [C] of x, with scale
  const void* addend;
  const uint32_t* addend_mask;
  void* dx;
  float* sum_dz;     // [C]
  float* sum_dz_xc;  // [C]: of dz * (x - mean)
  float* workspace;
  int32_t tile;
};

Plan plan_expand(const ExpandProblem& problem, int arch);
Plan plan_expand_dgrad(const ExpandDgradProblem& problem, int arch);

}  // namespace resnet_fused
