#include "add_stats/add_stats.h"
#include "bn_stats/bn_stats.cuh"

namespace resnet_fused {

template <typename T, bool kVector>
__device__ void add_stats_rows(const AddStatsParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  const T *x = static_cast<const T*>(p.x), *other = static_cast<const T*>(p.u);
  float scale[View::kChannels], shift[View::kChannels];
#pragma unroll
  for (int i = 0; i < View::kChannels; ++i) scale[i] = 1.0f, shift[i] = 0.0f;
  if (p.scale) {
    tile.coefficients(p.scale, scale);
    tile.coefficients(p.shift, shift);
  }
  block_statistics<kStaged>(
      tile, p.rows.warps_across, p.partial, [&](typename View::Raw(&y)[kStaged], int64_t m0) {
        typename View::Raw us[kStaged];
#pragma unroll
        for (int s = 0; s < kStaged; ++s) {
          y[s] = tile.load(x, m0 + s * tile.step);
          us[s] = tile.load(other, m0 + s * tile.step);
        }
#pragma unroll
        for (int s = 0; s < kStaged; ++s) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            const float sum =
                View::get(y[s], e) + fmaf(scale[View::of(e)], View::get(us[s], e), shift[View::of(e)]);
            View::set(y[s], e, tile.holds(m0 + s * tile.step, e) ? sum : 0.0f);
          }
          tile.store(static_cast<T*>(p.y), m0 + s * tile.step, y[s]);
        }
      });
}

RESNET_FUSED_TAIL_KERNELS(add_stats, 2, AddStatsParams, add_stats_rows);

}  // namespace resnet_fused
