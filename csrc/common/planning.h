// What the plans of the tails share. Host code only.
#pragma once

#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common/plan.h"
#include "common/rows.h"

// The plan by its C name, for ctypes: see resnet_fused/plans.py, which mirrors the problem's fields.
#define RESNET_FUSED_EXPORT_PLAN(OP, PROBLEM)                                     \
  extern "C" __attribute__((visibility("default"))) void resnet_fused_plan_##OP(  \
      const resnet_fused::PROBLEM* problem, int arch, resnet_fused::Plan* plan) { \
    *plan = resnet_fused::plan_##OP(*problem, arch);                              \
  }

namespace resnet_fused {

constexpr int64_t kMaxChannels = 65536;
constexpr int64_t kMaxPartials = 1024;  // blocks along the rows of a reduction

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[gnu::format(printf, 2, 3)]] void refuse(Plan& plan, const char* format, ...);

// False, with the plan's reason set, where no kernel of the tails takes the problem.
bool check_common(Plan& plan, const char* op, DType dtype, int64_t M, int64_t C, int arch);

// The instantiation of a tail kernel.
struct Variant {
  DType dtype;
  int width;  // elements of an access: 16 bytes if all rows of all activations start aligned, else 1
};
Variant choose_variant(DType dtype, int64_t C, std::initializer_list<const void*> activations);

// How [M, C] is cut into thread blocks (rows.h).
struct RowGrid {
  int32_t warps_across;
  int64_t rows_per_block;
  int64_t row_blocks;    // gridDim.x
  int64_t panel_blocks;  // gridDim.y

  Rows rows(int64_t M, int64_t C) const { return {M, rows_per_block, static_cast<int32_t>(C), warps_across}; }
};
// max_partials bounds row_blocks (0: no bound).
RowGrid row_grid(int64_t M, int64_t C, int64_t max_partials = 0);

// Appends a launch of blocks of (32, warps) threads.
Step& append(Plan& plan, const char* source, const char* symbol, int64_t grid_x, int64_t grid_y, int warps);

template <typename Params>
void add_step(Plan& plan, const char* source, const char* symbol, int64_t grid_x, int64_t grid_y, int warps,
              const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParams);
  Step& step = append(plan, source, symbol, grid_x, grid_y, warps);
  step.params_size = sizeof(Params);
  std::memcpy(step.params, &params, sizeof(Params));
}

void append_variant(char (&symbol)[kMaxSymbol], const char* name, const Variant& variant);

template <typename Params>
void add_row_step(Plan& plan, const char* source, const char* name, const Variant& variant,
                  const RowGrid& grid, const Params& params) {
  char symbol[kMaxSymbol];
  append_variant(symbol, name, variant);
  add_step(plan, source, symbol, grid.row_blocks, grid.panel_blocks, kWarps, params);
}

// The step that combines the partials of one or two sums.
void add_sum_partials(Plan& plan, const SumPartialsParams& params, int sums);

}  // namespace resnet_fused
