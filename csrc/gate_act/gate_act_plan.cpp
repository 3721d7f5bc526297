#include "common/planning.h"
#include "gate_act/gate_act.h"

namespace resnet_fused {

Plan plan_gate_act(const GateActProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "gate_act", q.dtype, q.M, q.C, arch) || q.M == 0) return plan;
  const RowGrid grid = row_grid(q.M, q.C);
  const Variant variant = choose_variant(q.dtype, q.C, {q.v, q.x, q.f, q.y});
  add_row_step(plan, "gate_act/gate_act.cu", "gate_act", variant, grid,
               GateActParams{q, grid.rows(q.M, q.C)});
  return plan;
}

Plan plan_gate_act_backward(const GateActBackwardProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "gate_act_backward", q.dtype, q.M, q.C, arch) || q.M == 0) return plan;
  const RowGrid grid = row_grid(q.M, q.C);
  const Variant variant = choose_variant(q.dtype, q.C, {q.dy, q.v, q.x, q.f, q.dv, q.dx, q.df});
  const GateActBackwardParams params{q, grid.rows(q.M, q.C)};
  add_row_step(plan, "gate_act/gate_act.cu", "gate_act_backward", variant, grid, params);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(gate_act, GateActProblem)
RESNET_FUSED_EXPORT_PLAN(gate_act_backward, GateActBackwardProblem)
