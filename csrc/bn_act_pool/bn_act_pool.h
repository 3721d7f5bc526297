// Plans of bn_act_pool, y = maxpool(relu(scale*x + shift)), and of its backward through the pool alone.
#pragma once

#include "common/plan.h"

namespace resnet_fused {

struct Window {  // square; floor mode; padded taps never win
  int32_t kernel, stride, padding;
};

struct BnActPoolProblem {
  DType dtype;
  Window window;
  int64_t N, H, W, C;  // of x
  const void* x;       // [N, H, W, C]
  const float* scale;  // [C]
  const float* shift;
  void* y;         // [N, Ho, Wo, C]
  int8_t* argmax;  // like y: kh*kernel + kw of the winning tap
};

struct BnActPoolBackwardProblem {
  DType dtype;
  Window window;
  int64_t N, H, W, C;    // of da
  const void* dy;        // [N, Ho, Wo, C]
  const int8_t* argmax;  // like dy
  void* da;              // [N, H, W, C]
};

// What both kernels need to know of the shape. Grid: (rows of the output image, its pixels x channel chunks).
struct PoolGeometry {
  Window window;
  int32_t H, W, Ho, Wo, C;
};
struct BnActPoolParams {
  BnActPoolProblem io;
  PoolGeometry shape;
};
struct BnActPoolBackwardParams {
  BnActPoolBackwardProblem io;
  PoolGeometry shape;
};

Plan plan_bn_act_pool(const BnActPoolProblem& problem, int arch);
Plan plan_bn_act_pool_backward(const BnActPoolBackwardProblem& problem, int arch);

}  // namespace resnet_fused
