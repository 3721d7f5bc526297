#include <string>

#include "conv1x1/conv1x1.h"
#include "gemm/planning.h"

namespace resnet_fused {
namespace {

constexpr const char* kFprop = "conv1x1/conv1x1_fprop.cu";
constexpr const char* kDgrad = "conv1x1/conv1x1_dgrad.cu";
constexpr const char* kWgrad = "conv1x1/conv1x1_wgrad.cu";

// Plans a dgrad kernel with a prologue's parameters.
template <class Prologue>
void add_dgrad(Plan& plan, const Conv1x1DgradProblem& q, const std::string& name, const TileShape& tile,
               Extras extras, const Prologue& prologue) {
  const int32_t M = static_cast<int32_t>(strided_pixels(q.N, q.H, q.W, q.stride)),
                C = static_cast<int32_t>(q.C);
  const Phase phase{q.dy, q.weight, static_cast<int32_t>(q.K)};
  const PixelMap map = make_map(q.H, q.W, q.stride);
  if (!q.gate_u) {
    const float scale = q.addend_scale == 0.0f ? 1.0f : q.addend_scale;
    const AddShortcut add{nullptr, q.addend, q.addend_mask, q.dx, make_addend(q.padded, q.C, q.N * q.H * q.W),
                          scale};
    const RowsParams<Prologue, Nothing, AddShortcut> params{M, C, {phase, {}}, map, prologue, {}, add};
    add_rows_gemm(plan, kDgrad, (name + "_add").c_str(), q.dtype, tile, extras, params);
    return;
  }
  const GateSums gate{nullptr, q.gate_u, q.gate_scale, q.gate_shift, q.gate_mean, q.dx, q.workspace};
  const RowsParams<Prologue, Nothing, GateSums> params{M, C, {phase, {}}, map, prologue, {}, gate};
  add_rows_gemm(plan, kDgrad, (name + "_gate").c_str(), q.dtype, tile, extras, params);
  add_sum_partials(plan, {q.workspace, {q.sum_dz, q.sum_dz_xc}, ceil_div(M, tile.m), C, 1.0f}, 2);
}

template <class Left, class Right>
void add_wgrad(Plan& plan, const Conv1x1WgradProblem& q, const std::string& name, const PixelsGrid& grid,
               Extras extras, const Left& left, const Right& right) {
  const PixelsParams<Left, Right> params{static_cast<int32_t>(strided_pixels(q.N, q.H, q.W, q.stride)),
                                         static_cast<int32_t>(q.K),
                                         static_cast<int32_t>(q.C),
                                         static_cast<int32_t>(grid.per_split),
                                         q.dy,
                                         q.x,
                                         make_map(q.H, q.W, q.stride),
                                         left,
                                         right,
                                         q.workspace};
  add_pixels_gemm(plan, kWgrad, name.c_str(), q.dtype, grid, extras, params);
}

template <class Left>
void add_wgrad(Plan& plan, const Conv1x1WgradProblem& q, const std::string& name, const PixelsGrid& grid,
               Extras extras, const Left& left) {
  if (q.scale) {
    add_wgrad(plan, q, name + "_affine", grid, extras, left, Affine{q.scale, q.shift});
  } else {
    add_wgrad(plan, q, q.stride > 1 ? name + "_strided" : name, grid, extras, left, Nothing{});
  }
}

}  // namespace

Plan plan_conv1x1(const Conv1x1Problem& q, int arch) {
  Plan plan{};
  const int64_t M = strided_pixels(q.N, q.H, q.W, q.stride);
  if (!check_gemm(plan, "conv1x1", q.dtype, arch, {M, q.N * q.H * q.W}, {q.C, q.K}, {q.x, q.weight, q.out}))
    return plan;
  if (M == 0) return q.mean ? refuse(plan, "conv1x1: no pixels to take statistics of") : void(), plan;
  const TileShape* tile = choose_rows_tile(plan, arch, M, q.K, q.C, {}, q.tile);
  if (!tile) return plan;
  if (q.mean) plan.workspace = ceil_div(M, tile->m) * 2 * q.K;
  const StoreStats epilogue{q.out, q.mean ? q.workspace : nullptr};
  const int32_t m = static_cast<int32_t>(M), k = static_cast<int32_t>(q.K);
  const Phase phase{q.x, q.weight, static_cast<int32_t>(q.C)};
  const PixelMap map = make_map(q.H, q.W, q.stride);
  if (q.scale) {
    const RowsParams<Affine, Nothing, StoreStats> params{m,  k,       {phase, {}}, map, {q.scale, q.shift},
                                                         {}, epilogue};
    add_rows_gemm(plan, kFprop, "conv1x1_fprop_affine", q.dtype, *tile, {}, params);
  } else {
    const RowsParams<Nothing, Nothing, StoreStats> params{m, k, {phase, {}}, map, {}, {}, epilogue};
    add_rows_gemm(plan, kFprop, "conv1x1_fprop", q.dtype, *tile, {}, params);
  }
  if (q.mean) add_merge_stats(plan, q.workspace, q.mean, q.var, M, q.K, *tile);
  return plan;
}

Plan plan_conv1x1_dgrad(const Conv1x1DgradProblem& q, int arch) {
  Plan plan{};
  const int64_t M = strided_pixels(q.N, q.H, q.W, q.stride);
  if (!check_gemm(plan, "conv1x1_dgrad", q.dtype, arch, {M, q.N * q.H * q.W}, {q.C, q.K},
                  {q.dy, q.backward.u, q.weight, q.addend, q.gate_u, q.dx})) {
    return plan;
  }
  if (q.gate_u && q.stride > 1) return refuse(plan, "conv1x1_dgrad: a gate takes stride 1"), plan;
  if (q.padded.offset % 8 != 0 || q.padded.C % 8 != 0) {
    return refuse(plan, "conv1x1_dgrad: the addend's %d channels, or %d in front, are no multiple of 8",
                  q.padded.C, q.padded.offset),
           plan;
  }
  if (M == 0) return q.gate_u ? refuse(plan, "conv1x1_dgrad: no pixels to sum over") : void(), plan;
  const bool backward = q.backward.coef_dz;
  const Extras extras{backward, backward};
  const TileShape* tile = choose_rows_tile(plan, arch, M, q.C, q.K, extras, q.tile);
  if (!tile) return plan;
  if (q.gate_u) plan.workspace = ceil_div(M, tile->m) * 2 * q.C;
  if (backward) {
    add_dgrad(plan, q, "conv1x1_dgrad_backward", *tile, extras, q.backward);
  } else {
    add_dgrad(plan, q, "conv1x1_dgrad", *tile, extras, Nothing{});
  }
  return plan;
}

Plan plan_conv1x1_wgrad(const Conv1x1WgradProblem& q, int arch) {
  Plan plan{};
  const int64_t M = strided_pixels(q.N, q.H, q.W, q.stride);
  if (!check_gemm(plan, "conv1x1_wgrad", q.dtype, arch, {M, q.N * q.H * q.W}, {q.C, q.K},
                  {q.dy, q.backward.u, q.x, q.dw})) {
    return plan;
  }
  if (q.scale && q.stride > 1)
    return refuse(plan, "conv1x1_wgrad: an activated operand takes stride 1"), plan;
  if (M == 0) return refuse(plan, "conv1x1_wgrad: no pixels to sum over"), plan;
  const bool backward = q.backward.coef_dz, masked = !backward && (q.backward.gate.mask || q.sum_dz);
  if (backward && q.sum_dz)
    return refuse(plan, "conv1x1_wgrad: sums are those of dy * mask, not of du"), plan;
  const Extras extras{backward, backward || masked};
  const PixelsGrid grid = pixels_grid(plan, arch, M, q.K, q.C, extras, false, q.tile);
  if (!grid.tile) return plan;
  plan.workspace = grid.workspace(q.K, q.C, masked);
  if (backward) {
    add_wgrad(plan, q, "conv1x1_wgrad_backward", grid, extras, q.backward);
  } else if (masked) {
    add_wgrad(plan, q, "conv1x1_wgrad_masked", grid, extras, Mask{q.backward.gate.mask});
  } else {
    add_wgrad(plan, q, "conv1x1_wgrad", grid, extras, Nothing{});
  }
  add_sum_splits(plan, q.workspace, grid.splits, q.K * q.C, q.dw, q.wide ? DType::kFloat32 : q.dtype, q.K,
                 q.sum_dz);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(conv1x1, Conv1x1Problem)
RESNET_FUSED_EXPORT_PLAN(conv1x1_dgrad, Conv1x1DgradProblem)
RESNET_FUSED_EXPORT_PLAN(conv1x1_wgrad, Conv1x1WgradProblem)
