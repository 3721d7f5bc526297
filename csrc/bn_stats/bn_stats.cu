#include "bn_stats/bn_stats.cuh"
#include "bn_stats/bn_stats.h"

namespace resnet_fused {

template <typename T, bool kVector>
__device__ void bn_stats_rows(const BnStatsParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = kVector ? 4 : 2;
  const View tile(p.rows);
  const T* x = static_cast<const T*>(p.x);
  block_statistics<kStaged>(tile, p.rows.warps_across, p.partial,
                            [&](typename View::Raw(&raw)[kStaged], int64_t m0) {
#pragma unroll
                              for (int u = 0; u < kStaged; ++u) raw[u] = tile.load(x, m0 + u * tile.step);
                            });
}

// grid (ceil(C/32)), block (32, kFinalizeWarps): warp w merges partials w, w + 32, ...; then warp 0 merges
// the warps.
__device__ void finalize(const BnStatsFinalizeParams& p) {
  __shared__ float shared[kFinalizeWarps][3][kPanel];
  const int lane = threadIdx.x, warp = threadIdx.y, C = p.rows.C, c = blockIdx.x * kPanel + lane;
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;
  if (c < C) {
#pragma unroll 4
    for (int64_t b = warp; b < p.blocks; b += kFinalizeWarps) {
      const int64_t rows = min(p.rows.rows_per_block, p.rows.M - b * p.rows.rows_per_block);
      const float* partial = p.partial + b * 2 * C + c;
      merge(count, mean, m2, static_cast<float>(rows), partial[0], partial[C]);
    }
  }
  shared[warp][0][lane] = count;
  shared[warp][1][lane] = mean;
  shared[warp][2][lane] = m2;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  for (int w = 1; w < kFinalizeWarps; ++w) {
    merge(count, mean, m2, shared[w][0][lane], shared[w][1][lane], shared[w][2][lane]);
  }
  p.mean[c] = mean;
  p.var[c] = m2 / count;
}

RESNET_FUSED_TAIL_KERNELS(bn_stats, 3, BnStatsParams, bn_stats_rows);
RESNET_FUSED_KERNEL(bn_stats_finalize, 1024, 1, BnStatsFinalizeParams, finalize);

}  // namespace resnet_fused
