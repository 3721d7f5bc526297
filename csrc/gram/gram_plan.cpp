#include "gemm/planning.h"
#include "gram/gram.h"

namespace resnet_fused {

Plan plan_gram(const GramProblem& q, int arch) {
  Plan plan{};
  const int64_t M = strided_pixels(q.N, q.H, q.W, q.stride);
  if (!check_gemm(plan, "gram", q.dtype, arch, {M, q.N * q.H * q.W}, {q.C}, {q.x})) return plan;
  if (M == 0) return refuse(plan, "gram: no pixels to take statistics of"), plan;
  const PixelsGrid grid = pixels_grid(plan, arch, M, q.C, q.C, {}, true, q.tile);
  if (!grid.tile) return plan;
  plan.workspace = grid.workspace(q.C, q.C, true);
  const int32_t C = static_cast<int32_t>(q.C);
  const Center center{{q.scale, q.shift}, q.center};
  const GramParams params{static_cast<int32_t>(M),
                          C,
                          C,
                          static_cast<int32_t>(grid.per_split),
                          q.x,
                          q.x,
                          make_map(q.H, q.W, q.stride),
                          center,
                          center,
                          q.workspace};
  add_pixels_gemm(plan, "gram/gram.cu", q.stride > 1 ? "gram_strided" : "gram", q.dtype, grid, {}, params);
  const GramFinalizeParams finalize{q.workspace, q.cov, q.mean, grid.splits, 1.0f / static_cast<float>(M), C,
                                    grid.tile->m};
  const int64_t parts = ceil_div(q.C, kPanel);
  add_step(plan, "gram/gram.cu", "gram_finalize", parts, parts, kWarps, finalize);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(gram, GramProblem)
