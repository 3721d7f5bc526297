#include "common/planning.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace resnet_fused {

void refuse(Plan& plan, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(plan.reason, sizeof(plan.reason), format, args);
  va_end(args);
}

bool check_common(Plan& plan, const char* op, DType dtype, int64_t M, int64_t C, int arch) {
  if (arch < 80) {
    refuse(plan, "%s: the kernels need compute capability 8.0, the device has %d.%d", op, arch / 10,
           arch % 10);
  } else if (dtype == DType::kFloat64) {
    refuse(plan, "%s: no kernel takes float64", op);
  } else if (C < 1 || C > kMaxChannels) {
    refuse(plan, "%s: the kernels take 1 to %lld channels, got %lld", op,
           static_cast<long long>(kMaxChannels), static_cast<long long>(C));
  } else if (M < 0) {
    refuse(plan, "%s: %lld rows", op, static_cast<long long>(M));
  }
  return plan.reason[0] == '\0';
}

Variant choose_variant(DType dtype, int64_t C, std::initializer_list<const void*> activations) {
  const int width = dtype == DType::kFloat32 ? 4 : 8;
  const bool aligned = std::all_of(activations.begin(), activations.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
  return {dtype, aligned && C % width == 0 ? width : 1};
}

void append_variant(char (&symbol)[kMaxSymbol], const char* name, const Variant& variant) {
  static constexpr const char* kNames[] = {"f32", "bf16", "f16", "f64"};  // in DType's order
  const char* dtype = kNames[static_cast<int>(variant.dtype)];
  if (variant.width > 1) {
    std::snprintf(symbol, sizeof(symbol), "%s_%s_v%d", name, dtype, variant.width);
  } else {
    std::snprintf(symbol, sizeof(symbol), "%s_%s", name, dtype);
  }
}

RowGrid row_grid(int64_t M, int64_t C, int64_t max_partials) {
  // Long runs of rows spare loads of coefficients, many blocks fill the GPU: blocks come first, to a few for
  // each multiprocessor. Only the problem decides, never the device, so that results are the same on every
  // one.
  constexpr int64_t kBlocksWanted = 1024;
  constexpr int64_t kMaxTiles = 16;
  const int64_t panels = ceil_div(C, kPanel);
  RowGrid grid{};
  grid.warps_across = 1;
  while (grid.warps_across < kWarps && grid.warps_across < panels) grid.warps_across *= 2;
  grid.panel_blocks = ceil_div(panels, grid.warps_across);
  const int64_t tile_rows = static_cast<int64_t>(kTileRows) * (kWarps / grid.warps_across);
  int64_t tiles = std::clamp<int64_t>(M * grid.panel_blocks / (tile_rows * kBlocksWanted), 1, kMaxTiles);
  if (max_partials > 0) tiles = std::max(tiles, ceil_div(M, tile_rows * max_partials));
  grid.rows_per_block = tile_rows * tiles;
  grid.row_blocks = ceil_div(M, grid.rows_per_block);
  return grid;
}

Step& append(Plan& plan, const char* source, const char* symbol, int64_t grid_x, int64_t grid_y, int warps) {
  if (grid_x > INT32_MAX || grid_y > 65535) {
    refuse(plan, "%s: the grid would be %lld x %lld blocks, more than CUDA takes", symbol,
           static_cast<long long>(grid_x), static_cast<long long>(grid_y));
  }
  Step& step = plan.steps[plan.count++];
  std::snprintf(step.symbol, sizeof(step.symbol), "%s", symbol);
  std::snprintf(step.source, sizeof(step.source), "%s", source);
  step.grid[0] = static_cast<uint32_t>(grid_x);
  step.grid[1] = static_cast<uint32_t>(grid_y);
  step.grid[2] = 1;
  step.block[0] = 32;
  step.block[1] = static_cast<uint32_t>(warps);
  step.block[2] = 1;
  return step;
}

void add_sum_partials(Plan& plan, const SumPartialsParams& params, int sums) {
  add_step(plan, "common/sum_partials.cu", "sum_partials", ceil_div(params.C, kPanel), sums, kFinalizeWarps,
           params);
}

}  // namespace resnet_fused
