#include "bn_act/bn_act.h"
#include "common/planning.h"

namespace resnet_fused {
namespace {

constexpr const char* kForward = "bn_act/bn_act.cu";
constexpr const char* kBackward = "bn_act/bn_act_backward.cu";

// The pitch of an activation [M, C]; one that is no whole number of accesses leaves the kernel without wide
// ones.
template <class Problem>
void set_pitch(int32_t Problem::* pitch, Problem& q, Variant& variant) {
  if (q.*pitch == 0) q.*pitch = static_cast<int32_t>(q.C);
  if (q.*pitch % variant.width != 0) variant.width = 1;
}

}  // namespace

Plan plan_bn_act(const BnActProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "bn_act", q.dtype, q.M, q.C, arch) || q.M == 0) return plan;
  const RowGrid grid = row_grid(q.M, q.C);
  Variant variant = choose_variant(q.dtype, q.C, {q.x, q.residual, q.y});
  const PaddedShortcut& padded = q.padded;
  if (padded.stride > 1 && q.M > INT32_MAX) {
    return refuse(plan, "bn_act: %lld pixels; with a strided residual the kernel takes 2^31-1",
                  static_cast<long long>(q.M)),
           plan;
  }
  if (padded.C % variant.width != 0 || padded.offset % variant.width != 0) variant.width = 1;
  const char* name = q.residual && padded.stride ? "bn_act_padded" : "bn_act";
  BnActParams params{q, grid.rows(q.M, q.C)};
  set_pitch(&BnActProblem::y_pitch, params.io, variant);
  add_row_step(plan, kForward, name, variant, grid, params);
  return plan;
}

Plan plan_relu_mask(const ReluMaskProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "relu_mask", q.dtype, q.M, q.C, arch) || q.M == 0) return plan;
  const RowGrid grid = row_grid(q.M, q.C);
  const Variant variant = choose_variant(q.dtype, q.C, {q.y});
  add_row_step(plan, kForward, "relu_mask", variant, grid, ReluMaskParams{q, grid.rows(q.M, q.C)});
  return plan;
}

Plan plan_bn_act_backward_reduce(const BnActBackwardReduceProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "bn_act_backward_reduce", q.dtype, q.M, q.C, arch)) return plan;
  const int sums = q.mean ? 2 : 1;
  const RowGrid grid = row_grid(q.M, q.C, kMaxPartials);
  plan.workspace = grid.row_blocks * sums * q.C;
  if (q.M > 0) {
    Variant variant = choose_variant(q.dtype, q.C, {q.dy, q.x, q.dz});
    BnActBackwardReduceParams params{q, grid.rows(q.M, q.C)};
    set_pitch(&BnActBackwardReduceProblem::dy_pitch, params.io, variant);
    add_row_step(plan, kBackward, "bn_act_backward_reduce", variant, grid, params);
  }
  const int32_t C = static_cast<int32_t>(q.C);
  add_sum_partials(plan, {q.workspace, {q.sum_dz, q.sum_dz_xc}, grid.row_blocks, C, 1.0f}, sums);
  return plan;
}

Plan plan_bn_act_backward_apply(const BnActBackwardApplyProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "bn_act_backward_apply", q.dtype, q.M, q.C, arch) || q.M == 0) return plan;
  const RowGrid grid = row_grid(q.M, q.C);
  const Variant variant = choose_variant(q.dtype, q.C, {q.dy, q.x, q.addend, q.dx});
  const BnActBackwardApplyParams params{q, grid.rows(q.M, q.C)};
  add_row_step(plan, kBackward, "bn_act_backward_apply", variant, grid, params);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(bn_act, BnActProblem)
RESNET_FUSED_EXPORT_PLAN(relu_mask, ReluMaskProblem)
RESNET_FUSED_EXPORT_PLAN(bn_act_backward_reduce, BnActBackwardReduceProblem)
RESNET_FUSED_EXPORT_PLAN(bn_act_backward_apply, BnActBackwardApplyProblem)
