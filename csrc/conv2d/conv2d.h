// Plans of the k x k convolution: fprop, dgrad and wgrad with what comes before and after each.
// Activations are NHWC, weights KRSC [K, R, S, C / groups]. x is [N, H, W, C]; out and dy are [N, P, Q, K].
#pragma once

#include "common/plan.h"
#include "gemm/gemm.h"

namespace resnet_fused {

struct ConvShape {
  int64_t N, H, W, C, K, R, S;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;

  int64_t P() const { return (H + 2 * padding_h - dilation_h * (R - 1) - 1) / stride_h + 1; }
  int64_t Q() const { return (W + 2 * padding_w - dilation_w * (S - 1) - 1) / stride_w + 1; }
};

// out = conv(a) with a = relu(scale*x + shift), or x, zero outside of the image; with mean, also the
// statistics of out.
struct Conv2dProblem {
  DType dtype;
  ConvShape shape;
  const void* x;
  const float* scale;  // [C], with shift, or both null
  const float* shift;
  const void* weight;
  void* out;
  float* mean;  // [K], with var, or both null
  float* var;
  float* workspace;
  int32_t tile;  // 0: the plan chooses; else one of conv_tiles.h's, counted from 1
};

// y = act(out_scale*conv(a) + out_shift + residual) and its mask, a as above.
struct Conv2dBnActProblem {
  DType dtype;
  int32_t relu;
  ConvShape shape;
  const void* x;
  const float* scale;
  const float* shift;
  const void* weight;
  const float* out_scale;  // [K]
  const float* out_shift;
  const void* residual;  // as y, or null
  void* y;
  uint32_t* mask;  // or null
  int32_t tile;
};

// dx = the gradient of x for du = backward(dy), or dy where coef_dz is null; then
//   with gate_u   dz = dx * relu'(gate_scale*gate_u + gate_shift) in its place, and its sums
//   otherwise     + addend_scale * addend * addend_mask
struct Conv2dDgradProblem {
  DType dtype;
  PaddedAddend padded;  // of the addend
  ConvShape shape;
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
  int32_t tile;
  float addend_scale;  // 0 stands for 1
};

// dw = sum over pixels of du' a, with du = backward(dy), or dy where coef_dz is null, and
// a = relu(scale*x + shift), or x, zero outside of the image.
struct Conv2dWgradProblem {
  DType dtype;
  ConvShape shape;
  const void* dy;
  BnBackward backward;
  const void* x;
  const float* scale;
  const float* shift;
  void* dw;  // [K, R, S, C / groups]
  float* workspace;
  int32_t tile;
};

// False, with the plan's reason set, where a shape has no output.
bool check_shape(Plan& plan, const char* op, const ConvShape& shape);

Plan plan_conv2d(const Conv2dProblem& problem, int arch);
Plan plan_conv2d_bn_act(const Conv2dBnActProblem& problem, int arch);
Plan plan_conv2d_dgrad(const Conv2dDgradProblem& problem, int arch);
Plan plan_conv2d_wgrad(const Conv2dWgradProblem& problem, int arch);

}  // namespace resnet_fused
