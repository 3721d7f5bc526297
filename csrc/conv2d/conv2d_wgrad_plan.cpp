#include "conv2d/conv2d_few.h"
#include "gemm/planning.h"

namespace resnet_fused {

Plan plan_conv2d_wgrad(const Conv2dWgradProblem& q, int arch) {
  if (q.shape.C % 8 != 0) return plan_conv2d_wgrad_few(q, arch);
  Plan plan{};
  return refuse(plan, "conv2d_wgrad: no kernel"), plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(conv2d_wgrad, Conv2dWgradProblem)
