#include "bn_act/bn_act.h"
#include "common/planning.h"
#include "concat_act/concat_act.h"

namespace resnet_fused {
namespace {

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The step of one plan behind those of another.
void join(Plan& plan, const Plan& other) {
  if (other.reason[0] != '\0') {
    std::memcpy(plan.reason, other.reason, sizeof(plan.reason));
    return;
  }
  for (int i = 0; i < other.count; ++i) plan.steps[plan.count++] = other.steps[i];
}

}  // namespace

Plan plan_concat_act(const ConcatActProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "concat_act", q.dtype, q.M, q.C + q.K, arch) || q.M == 0) return plan;
  const int64_t pitch = q.C + q.K;
  const RowGrid grid = row_grid(q.M, q.C);
  Variant variant = choose_variant(q.dtype, q.C, {q.x, q.y});
  if (pitch % variant.width != 0) variant.width = 1;
  add_row_step(plan, "concat_act/concat_act.cu", "concat_act_copy", variant, grid,
               CopyRowsParams{q.x, q.y, pitch, grid.rows(q.M, q.C)});
  BnActProblem second{};
  second.dtype = q.dtype;
  second.relu = q.relu;
  second.y_pitch = static_cast<int32_t>(pitch);
  second.M = q.M;
  second.C = q.K;
  second.x = q.u;
  second.scale = q.scale;
  second.shift = q.shift;
  second.y = static_cast<char*>(q.y) + q.C * size_of(q.dtype);
  second.mask = q.mask;
  join(plan, plan_bn_act(second, arch));
  return plan;
}

Plan plan_concat_act_backward(const ConcatActBackwardProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "concat_act_backward", q.dtype, q.M, q.C + q.K, arch)) return plan;
  BnActBackwardReduceProblem second{};
  second.dtype = q.dtype;
  second.dy_pitch = static_cast<int32_t>(q.C + q.K);
  second.M = q.M;
  second.C = q.K;
  second.dy = static_cast<const char*>(q.dy) + q.C * size_of(q.dtype);
  second.gate.mask = q.mask;
  second.x = q.u;
  second.mean = q.mean;
  second.dz = q.dz;
  second.sum_dz = q.sum_dz;
  second.sum_dz_xc = q.sum_dz_xc;
  second.workspace = q.workspace;
  return plan_bn_act_backward_reduce(second, arch);
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(concat_act, ConcatActProblem)
RESNET_FUSED_EXPORT_PLAN(concat_act_backward, ConcatActBackwardProblem)
