#include "expand/expand.h"
#include "gemm/planning.h"

namespace resnet_fused {

Plan plan_expand(const ExpandProblem& q, int arch) {
  Plan plan{};
  const int64_t M = q.N * q.H * q.W;
  if (!check_gemm(plan, "expand", q.dtype, arch, {M, q.N * q.H2 * q.W2}, {q.C, q.K, q.x2 ? q.C2 : 8},
                  {q.x, q.weight, q.x2, q.weight2, q.residual, q.y})) {
    return plan;
  }
  if (q.x2 && !q.scale) return refuse(plan, "expand: with a projection x comes with scale and shift"), plan;
  if (M == 0) return plan;
  constexpr const char* kSource = "expand/expand.cu";
  const int32_t m = static_cast<int32_t>(M), k = static_cast<int32_t>(q.K);
  const Phase first{q.x, q.weight, static_cast<int32_t>(q.C)};
  const AffineResidual epilogue{q.out_scale, q.out_scale2, q.out_shift, q.residual, q.y, q.mask, q.relu};
  const TileShape* tile = choose_rows_tile(plan, arch, M, q.K, q.C + (q.x2 ? q.C2 : 0), {}, q.tile, !q.x2);
  if (!tile) return plan;
  const PixelMap dense = make_map(q.H, q.W, 1);
  if (q.x2) {
    const Phase second{q.x2, q.weight2, static_cast<int32_t>(q.C2)};
    const RowsParams<Affine, Nothing, AffineResidual> params{
        m, k, {first, second}, make_map(q.H2, q.W2, q.stride), {q.scale, q.shift}, {}, epilogue};
    add_rows_gemm(plan, kSource, "expand_dual", q.dtype, *tile, {}, params);
  } else if (q.scale) {
    const RowsParams<Affine, Nothing, AffineResidual> params{
        m, k, {first, {}}, dense, {q.scale, q.shift}, {}, epilogue};
    add_rows_gemm(plan, kSource, "expand_affine", q.dtype, *tile, {}, params);
  } else {
    const RowsParams<Nothing, Nothing, AffineResidual> params{m, k, {first, {}}, dense, {}, {}, epilogue};
    add_rows_gemm(plan, kSource, "expand", q.dtype, *tile, {}, params);
  }
  return plan;
}

Plan plan_expand_dgrad(const ExpandDgradProblem& q, int arch) {
  Plan plan{};
  const int64_t M = strided_pixels(q.N, q.H, q.W, q.stride);
  if (!check_gemm(plan, "expand_dgrad", q.dtype, arch, {M, q.N * q.H * q.W}, {q.C, q.K},
                  {q.dy, q.weight, q.x, q.q, q.addend, q.dx})) {
    return plan;
  }
  if (q.scale && q.stride > 1) return refuse(plan, "expand_dgrad: an activated operand takes stride 1"), plan;
  if (M == 0) return q.scale ? refuse(plan, "expand_dgrad: no pixels to sum over") : void(), plan;
  constexpr const char* kSource = "expand/expand_dgrad.cu";
  const Extras extras{false, true};
  const int32_t m = static_cast<int32_t>(M), c = static_cast<int32_t>(q.C);
  const TileShape* tile = choose_rows_tile(plan, arch, M, q.C, q.K + q.C, extras, q.tile);
  if (!tile) return plan;
  const Phase phases[2] = {{q.dy, q.weight, static_cast<int32_t>(q.K)}, {q.x, q.q, c}};
  const PixelMap map = make_map(q.H, q.W, q.stride);
  if (!q.scale) {
    const Addend addend = make_addend({}, q.C, q.N * q.H * q.W);
    const RowsParams<Mask, Nothing, AddShortcut> params{
        m, c, {phases[0], phases[1]}, map, {q.mask}, {}, {q.constant, q.addend, q.addend_mask, q.dx, addend}};
    add_rows_gemm(plan, kSource, "expand_dgrad_projection", q.dtype, *tile, extras, params);
    return plan;
  }
  plan.workspace = ceil_div(M, tile->m) * 2 * q.C;
  const GateSums gate{q.constant, q.x, q.scale, q.shift, q.mean, q.dx, q.workspace};
  const RowsParams<Mask, Affine, GateSums> params{
      m, c, {phases[0], phases[1]}, map, {q.mask}, {q.scale, q.shift}, gate};
  add_rows_gemm(plan, kSource, "expand_dgrad", q.dtype, *tile, extras, params);
  add_sum_partials(plan, {q.workspace, {q.sum_dz, q.sum_dz_xc}, ceil_div(M, tile->m), c, 1.0f}, 2);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(expand, ExpandProblem)
RESNET_FUSED_EXPORT_PLAN(expand_dgrad, ExpandDgradProblem)
