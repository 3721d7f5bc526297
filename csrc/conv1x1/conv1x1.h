// Plans of the 1x1 convolution: fprop, dgrad and wgrad with what comes before and after each.
// Activations are NHWC, weights [K, C]. x is [N, H, W, C]; out and dy have the strided pixels, [N, H', W',
// K].
#pragma once

#include "common/plan.h"
#include "gemm/gemm.h"

namespace resnet_fused {

// out = conv(a) with a = relu(scale*x + shift), or x; with mean, also the statistics of out.
struct Conv1x1Problem {
  DType dtype;
  int64_t N, H, W, C, K, stride;
  const void* x;
  const float* scale;  // [C], with shift, or both null
  const float* shift;
  const void* weight;
  void* out;
  float* mean;  // [K], with var, or both null
  float* var;
  float* workspace;
  int32_t tile;  // 0: the plan chooses; else one of gemm.h's, counted from 1
};

// dx = the gradient of x for du = backward(dy), or dy where coef_dz is null; then
//   with gate_u   dz = dx * relu'(gate_scale*gate_u + gate_shift) in its place, and its sums (stride 1)
//   otherwise     + addend_scale * addend * addend_mask
struct Conv1x1DgradProblem {
  DType dtype;
  PaddedAddend padded;  // of the addend
  int64_t N, H, W, C, K, stride;
  const void* dy;
  BnBackward backward;
  const void* weight;
  const void* addend;  // as dx, or as padded says; or null
  const uint32_t* addend_mask;
  const void* gate_u;  // as dx, or null; with the vectors [C]
  const float* gate_scale;
  const float* gate_shift;
  const float* gate_mean;
  void* dx;
  float* sum_dz;     // [C]
  float* sum_dz_xc;  // [C]: of dz * (gate_u - gate_mean)
  float* workspace;
  int32_t tile;        // 0: the plan chooses; else one of gemm.h's, counted from 1
  float addend_scale;  // 0 stands for 1
};

// dw = sum over pixels of du' a, with du = backward(dy), or dy * backward.gate.mask where coef_dz is null,
// and a = relu(scale*x + shift), or x; float32 if `wide`. With sum_dz, also the sums of dy * mask.
struct Conv1x1WgradProblem {
  DType dtype;
  int32_t wide;
  int64_t N, H, W, C, K, stride;
  const void* dy;
  BnBackward backward;
  const void* x;
  const float* scale;
  const float* shift;
  void* dw;       // [K, C]
  float* sum_dz;  // [K] or null
  float* workspace;
  int32_t tile;  // 0: the plan chooses; else one of gemm.h's, counted from 1
};

Plan plan_conv1x1(const Conv1x1Problem& problem, int arch);
Plan plan_conv1x1_dgrad(const Conv1x1DgradProblem& problem, int arch);
Plan plan_conv1x1_wgrad(const Conv1x1WgradProblem& problem, int arch);

}  // namespace resnet_fused
