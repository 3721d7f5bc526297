#include "add_stats/add_stats.h"
#include "bn_stats/bn_stats.h"
#include "common/planning.h"

namespace resnet_fused {

Plan plan_add_stats(const AddStatsProblem& q, int arch) {
  Plan plan{};
  if (!check_common(plan, "add_stats", q.dtype, q.M, q.C, arch)) return plan;
  if (q.M == 0) return refuse(plan, "add_stats: no rows to take statistics of"), plan;
  const Variant variant = choose_variant(q.dtype, q.C, {q.x, q.u, q.y});
  const RowGrid grid = row_grid(q.M, q.C, kMaxPartials);
  plan.workspace = grid.row_blocks * 2 * q.C;
  const Rows rows = grid.rows(q.M, q.C);
  add_row_step(plan, "add_stats/add_stats.cu", "add_stats", variant, grid,
               AddStatsParams{q.x, q.u, q.scale, q.shift, q.y, q.workspace, rows});
  const BnStatsFinalizeParams finalize{q.workspace, q.mean, q.var, grid.row_blocks, rows};
  add_step(plan, "bn_stats/bn_stats.cu", "bn_stats_finalize", ceil_div(q.C, kPanel), 1, kFinalizeWarps,
           finalize);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(add_stats, AddStatsProblem)
