// What the plans of the matrix kernels share. Host code only.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/planning.h"
#include "gemm/gemm.h"

namespace resnet_fused {

// False, with the plan's reason set, where no matrix kernel takes the problem. `pixels` are those of every
// side.
bool check_gemm(Plan& plan, const char* op, DType dtype, int arch, std::initializer_list<int64_t> pixels,
                std::initializer_list<int64_t> channels, std::initializer_list<const void*> aligned);

Divider make_divider(int64_t divisor);
// The map of a 1x1 convolution of [N, H, W] with a stride.
PixelMap make_map(int64_t H, int64_t W, int64_t stride);
int64_t strided_pixels(int64_t N, int64_t H, int64_t W, int64_t stride);
// Of an addend for dx, which has so many channels and pixels.
Addend make_addend(const PaddedAddend& padded, int64_t C, int64_t pixels);

// Whether blocks may have 160 KB of shared memory; else 99 KB.
bool has_large_shared(int arch);
int shared_memory(int arch);  // of a multiprocessor, bytes

// `rows` kernels. K: of all phases; wanted: a tile's number, or 0. Null, with the plan's reason set, where
// the wanted tile does not exist or does not fit. resident: whether the kernel exists with kResident too.
const TileShape* choose_rows_tile(Plan& plan, int arch, int64_t M, int64_t N, int64_t K, Extras extras,
                                  int wanted, bool resident = false);

Step& append_gemm(Plan& plan, const char* source, const char* name, DType dtype, const TileShape& tile,
                  Extras left, int64_t grid_x, int64_t grid_y);

Step& append_resident(Plan& plan, const char* source, const char* name, DType dtype, int K, int64_t tiles_m,
                      int64_t tiles_n);

template <class Params>
void set_params(Step& step, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParams);
  step.params_size = sizeof(Params);
  std::memcpy(step.params, &params, sizeof(Params));
}

template <class Params>
void add_rows_gemm(Plan& plan, const char* source, const char* name, DType dtype, const TileShape& tile,
                   Extras extras, const Params& params) {
  if (&tile == &kResident) {
    const int64_t rows = ceil_div(params.M, tile.m);
    return set_params(append_resident(plan, source, name, dtype, params.phase[0].K, rows, params.N / tile.n),
                      params);
  }
  const int64_t tiles = ceil_div(params.M, tile.m) * ceil_div(params.N, tile.n);
  set_params(append_gemm(plan, source, name, dtype, tile, extras, tiles, 1), params);
}

// The step that combines the statistics of row tiles, [tiles, 2, N].
void add_merge_stats(Plan& plan, const float* partial, float* mean, float* var, int64_t M, int64_t N,
                     const TileShape& tile);

// `pixels` kernels: how [I, J] sums over M pixels are cut.
struct PixelsGrid {
  const TileShape* tile;
  int64_t tiles, splits, per_split;  // blocks across; blocks along the pixels, and pixels of each

  int64_t workspace(int64_t I, int64_t J, bool sums) const { return splits * I * (J + (sums ? 1 : 0)); }
};
// Its tile is null, with the plan's reason set, as above.
PixelsGrid pixels_grid(Plan& plan, int arch, int64_t M, int64_t I, int64_t J, Extras left, bool triangle,
                       int wanted);

template <class Params>
void add_pixels_gemm(Plan& plan, const char* source, const char* name, DType dtype, const PixelsGrid& grid,
                     Extras left, const Params& params) {
  set_params(append_gemm(plan, source, name, dtype, *grid.tile, left, grid.tiles, grid.splits), params);
}

// The step that adds up partial sums [splits, n] into `out`, and those behind them, [splits, n2], into `out2`
// if given.
void add_sum_splits(Plan& plan, const float* partial, int64_t splits, int64_t n, void* out, DType dtype,
                    int64_t n2, float* out2);

}  // namespace resnet_fused
