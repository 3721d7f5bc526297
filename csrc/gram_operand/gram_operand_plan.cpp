#include <algorithm>

#include "common/planning.h"
#include "gram_operand/gram_operand.h"

namespace resnet_fused {

Plan plan_gram_operand(const GramOperandProblem& q, int arch) {
  Plan plan{};
  const int64_t M = q.N * ceil_div(q.H, q.stride) * ceil_div(q.W, q.stride);
  if (!check_common(plan, "gram_operand", q.dtype, M, q.C, arch)) return plan;
  const int64_t longest = std::max({q.H, q.W, int64_t{1}});
  if (q.stride > 1 && std::max(M, longest) > INT32_MAX) {
    return refuse(plan, "gram_operand: %lld pixels of %lld x %lld; with a stride the kernel takes 2^31-1",
                  static_cast<long long>(M), static_cast<long long>(q.H), static_cast<long long>(q.W)),
           plan;
  }
  const RowGrid grid = row_grid(M, q.C, kMaxPartials);
  const int32_t C = static_cast<int32_t>(q.C);
  plan.workspace = grid.row_blocks * q.C;
  if (M > 0) {
    const GramOperandParams params{q.x,
                                   q.scale,
                                   q.shift,
                                   q.center,
                                   q.a,
                                   q.workspace,
                                   grid.rows(M, q.C),
                                   q.relu,
                                   static_cast<int32_t>(std::min(q.stride, longest)),
                                   static_cast<int32_t>(q.H),
                                   static_cast<int32_t>(q.W)};
    const Variant variant = choose_variant(q.dtype, q.C, {q.x, q.a});
    add_row_step(plan, "gram_operand/gram_operand.cu", "gram_operand", variant, grid, params);
  }
  add_sum_partials(plan, {q.workspace, {q.mean, nullptr}, grid.row_blocks, C, 1.0f / static_cast<float>(M)},
                   1);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(gram_operand, GramOperandProblem)
