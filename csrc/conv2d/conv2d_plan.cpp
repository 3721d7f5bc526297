#include "conv2d/conv2d_few.h"
#include "gemm/taps_planning.h"

namespace resnet_fused {
namespace {

constexpr const char* kFprop = "conv2d/conv2d_fprop.cu";
constexpr const char* kDgrad = "conv2d/conv2d_dgrad.cu";

int64_t in_pixels(const ConvShape& q) { return q.N * q.H * q.W; }
int64_t out_pixels(const ConvShape& q) { return q.N * q.P() * q.Q(); }

}  // namespace

bool check_shape(Plan& plan, const char* op, const ConvShape& q) {
  if (std::min({q.K, q.C, q.R, q.S, q.stride_h, q.stride_w, q.dilation_h, q.dilation_w, q.groups}) < 1 ||
      std::min(q.padding_h, q.padding_w) < 0) {
    return refuse(plan, "%s: there is nothing to convolve", op), false;
  }
  if (q.P() < 1 || q.Q() < 1) return refuse(plan, "%s: the kernel is larger than the image", op), false;
  return true;
}

Plan plan_conv2d(const Conv2dProblem& q, int arch) {
  Plan plan{};
  if (!check_shape(plan, "conv2d", q.shape)) return plan;
  if (q.shape.C % 8 != 0) return plan_conv2d_few(q, arch);
  const int64_t M = out_pixels(q.shape);
  if (!check_gemm(plan, "conv2d", q.dtype, arch, {M, in_pixels(q.shape)}, {q.shape.C, q.shape.K},
                  {q.x, q.weight, q.out})) {
    return plan;
  }
  if (M == 0) return q.mean ? refuse(plan, "conv2d: no pixels to take statistics of") : void(), plan;
  const Taps taps = fprop_taps(plan, "conv2d", q.shape, arch, q.x, q.weight, q.scale, q.tile);
  if (!taps.tile) return plan;
  if (q.mean) plan.workspace = taps.row_tiles * 2 * q.shape.K;
  add_taps(plan, kFprop, taps.source.stride == 1 ? "conv2d_fprop" : "conv2d_fprop_strided", q.dtype, taps,
           Affine{q.scale, q.shift}, StoreStats{q.out, q.mean ? q.workspace : nullptr});
  if (q.mean) add_merge_stats(plan, q.workspace, q.mean, q.var, M, q.shape.K, *taps.tile);
  return plan;
}

Plan plan_conv2d_bn_act(const Conv2dBnActProblem& q, int arch) {
  Plan plan{};
  if (!check_shape(plan, "conv2d_bn_act", q.shape)) return plan;
  const int64_t M = out_pixels(q.shape);
  if (!check_gemm(plan, "conv2d_bn_act", q.dtype, arch, {M, in_pixels(q.shape)}, {q.shape.C, q.shape.K},
                  {q.x, q.weight, q.residual, q.y})) {
    return plan;
  }
  if (M == 0) return plan;
  const Taps taps = fprop_taps(plan, "conv2d_bn_act", q.shape, arch, q.x, q.weight, q.scale, q.tile);
  if (!taps.tile) return plan;
  add_taps(plan, kFprop, taps.source.stride == 1 ? "conv2d_bn_act" : "conv2d_bn_act_strided", q.dtype, taps,
           Affine{q.scale, q.shift},
           AffineResidual{q.out_scale, nullptr, q.out_shift, q.residual, q.y, q.mask, q.relu});
  return plan;
}

Plan plan_conv2d_dgrad(const Conv2dDgradProblem& q, int arch) {
  Plan plan{};
  if (!check_shape(plan, "conv2d_dgrad", q.shape)) return plan;
  const int64_t M = in_pixels(q.shape);
  if (!check_gemm(plan, "conv2d_dgrad", q.dtype, arch, {M, out_pixels(q.shape)}, {q.shape.C, q.shape.K},
                  {q.dy, q.backward.u, q.weight, q.addend, q.gate_u, q.dx})) {
    return plan;
  }
  if (q.padded.offset % 8 != 0 || q.padded.C % 8 != 0) {
    return refuse(plan, "conv2d_dgrad: the addend's %d channels, or %d in front, are no multiple of 8",
                  q.padded.C, q.padded.offset),
           plan;
  }
  if (M == 0) return q.gate_u ? refuse(plan, "conv2d_dgrad: no pixels to sum over") : void(), plan;
  const Taps taps =
      dgrad_taps(plan, "conv2d_dgrad", q.shape, arch, q.dy, q.weight, q.backward.coef_dz, q.tile);
  if (!taps.tile) return plan;
  if (!q.gate_u) {
    const float scale = q.addend_scale == 0.0f ? 1.0f : q.addend_scale;
    add_taps(plan, kDgrad, "conv2d_dgrad_add", q.dtype, taps, q.backward,
             AddShortcut{nullptr, q.addend, q.addend_mask, q.dx, make_addend(q.padded, q.shape.C, M), scale});
    return plan;
  }
  plan.workspace = taps.row_tiles * 2 * q.shape.C;
  add_taps(plan, kDgrad, "conv2d_dgrad_gate", q.dtype, taps, q.backward,
           GateSums{nullptr, q.gate_u, q.gate_scale, q.gate_shift, q.gate_mean, q.dx, q.workspace});
  add_sum_partials(
      plan, {q.workspace, {q.sum_dz, q.sum_dz_xc}, taps.row_tiles, static_cast<int32_t>(q.shape.C), 1.0f}, 2);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(conv2d, Conv2dProblem)
RESNET_FUSED_EXPORT_PLAN(conv2d_bn_act, Conv2dBnActProblem)
RESNET_FUSED_EXPORT_PLAN(conv2d_dgrad, Conv2dDgradProblem)
