#include "conv2d/conv2d.h"
#include "gemm/planning.h"

namespace resnet_fused {

Plan plan_conv2d_wgrad(const Conv2dWgradProblem&, int) {
  Plan plan{};
  return refuse(plan, "conv2d_wgrad: no kernel"), plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(conv2d_wgrad, Conv2dWgradProblem)
