#include "bn_stats/bn_stats.h"
#include "common/planning.h"

namespace resnet_fused {

Plan plan_bn_stats(const BnStatsProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "bn_stats", q.dtype, q.M, q.C, arch)) return plan;
  if (q.M == 0) return refuse(plan, "bn_stats: no rows to take statistics of"), plan;
  const Variant variant = choose_variant(q.dtype, q.C, {q.x});
  const RowGrid grid = row_grid(q.M, q.C, kMaxPartials);
  plan.workspace = grid.row_blocks * 2 * q.C;
  const Rows rows = grid.rows(q.M, q.C);
  add_row_step(plan, "bn_stats/bn_stats.cu", "bn_stats", variant, grid,
               BnStatsParams{q.x, q.workspace, rows});
  const BnStatsFinalizeParams finalize{q.workspace, q.mean, q.var, grid.row_blocks, rows};
  add_step(plan, "bn_stats/bn_stats.cu", "bn_stats_finalize", ceil_div(q.C, kPanel), 1, kFinalizeWarps,
           finalize);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(bn_stats, BnStatsProblem)
