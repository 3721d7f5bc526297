#include "bn_act_pool/bn_act_pool.h"
#include "common/planning.h"

namespace resnet_fused {
namespace {

constexpr const char* kSource = "bn_act_pool/bn_act_pool.cu";

PoolGeometry pool_geometry(int64_t H, int64_t W, int64_t C, const Window& window) {
  const auto outputs = [&](int64_t size) {
    return static_cast<int32_t>((size + 2 * window.padding - window.kernel) / window.stride + 1);
  };
  return {window,     static_cast<int32_t>(H), static_cast<int32_t>(W), outputs(H),
          outputs(W), static_cast<int32_t>(C)};
}

// Image rows along x, pixels times chunks of a row along y.
template <typename Params>
void add_image_step(Plan& plan, const char* name, const Variant& variant, int64_t image_rows, int64_t width,
                    const Params& params) {
  const int64_t row_blocks = ceil_div(width * (params.shape.C / variant.width), kWarps * 32);
  if (image_rows == 0 || row_blocks == 0) return;
  char symbol[kMaxSymbol];
  append_variant(symbol, name, variant);
  add_step(plan, kSource, symbol, image_rows, row_blocks, kWarps, params);
}

// Coordinates are 32-bit in the kernels, padding included.
bool check_image(Plan& plan, const char* op, int64_t H, int64_t W) {
  constexpr int64_t kLongest = INT32_MAX - 256;
  if (H <= kLongest && W <= kLongest) return true;
  refuse(plan, "%s: the kernels take images of less than 2^31 pixels a side, got %lld x %lld", op,
         static_cast<long long>(H), static_cast<long long>(W));
  return false;
}

}  // namespace

Plan plan_bn_act_pool(const BnActPoolProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "bn_act_pool", q.dtype, q.N * q.H * q.W, q.C, arch) ||
      !check_image(plan, "bn_act_pool", q.H, q.W)) {
    return plan;
  }
  const BnActPoolParams params{q, pool_geometry(q.H, q.W, q.C, q.window)};
  const Variant variant = choose_variant(q.dtype, q.C, {q.x, q.y, q.argmax});
  add_image_step(plan, "bn_act_pool", variant, q.N * params.shape.Ho, params.shape.Wo, params);
  return plan;
}

Plan plan_bn_act_pool_backward(const BnActPoolBackwardProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "bn_act_pool_backward", q.dtype, q.N * q.H * q.W, q.C, arch) ||
      !check_image(plan, "bn_act_pool_backward", q.H, q.W)) {
    return plan;
  }
  const BnActPoolBackwardParams params{q, pool_geometry(q.H, q.W, q.C, q.window)};
  const Variant variant = choose_variant(q.dtype, q.C, {q.dy, q.argmax, q.da});
  add_image_step(plan, "bn_act_pool_backward", variant, q.N * q.H, q.W, params);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(bn_act_pool, BnActPoolProblem)
RESNET_FUSED_EXPORT_PLAN(bn_act_pool_backward, BnActPoolBackwardProblem)
