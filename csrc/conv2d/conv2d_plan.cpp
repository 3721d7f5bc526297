#include "conv2d/conv2d_few.h"
#include "gemm/planning.h"

namespace resnet_fused {

Plan plan_conv2d(const Conv2dProblem& q, int arch) {
  if (q.shape.C % 8 != 0) return plan_conv2d_few(q, arch);
  Plan plan{};
  return refuse(plan, "conv2d: no kernel"), plan;
}
Plan plan_conv2d_bn_act(const Conv2dBnActProblem&, int) {
  Plan plan{};
  return refuse(plan, "conv2d_bn_act: no kernel"), plan;
}
Plan plan_conv2d_dgrad(const Conv2dDgradProblem&, int) {
  Plan plan{};
  return refuse(plan, "conv2d_dgrad: no kernel"), plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(conv2d, Conv2dProblem)
RESNET_FUSED_EXPORT_PLAN(conv2d_bn_act, Conv2dBnActProblem)
RESNET_FUSED_EXPORT_PLAN(conv2d_dgrad, Conv2dDgradProblem)
