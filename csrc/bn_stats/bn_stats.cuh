// Statistics of a block's rows, and how those of several sets are merged.
#pragma once

#include "common/tile.cuh"

namespace resnet_fused {

// A set of values by count, mean and sum of squared deviations (m2); merged by Chan's formula, never by
// E[x^2]-E[x]^2.
__device__ inline void merge(float& count, float& mean, float& m2, float other_count, float other_mean,
                             float other_m2) {
  const float total = count + other_count;
  const float weight = total > 0.0f ? __fdividef(other_count, total) : 0.0f;
  const float delta = other_mean - mean;
  mean += delta * weight;
  m2 += other_m2 + delta * delta * count * weight;
  count = total;
}

// A thread reads a few tiles, takes their mean and their squared deviations about it from registers, and
// merges. read(raw, m0) gives the elements of the tiles that start at rows m0, m0 + tile.step, ...; those
// beyond the last row are 0. partial: [blocks, 2, C], mean and sum of squared deviations of each block's
// rows.
template <int kStaged, typename T, bool kVector, typename Read>
__device__ void block_statistics(const Tile<T, kVector>& tile, int warps_across, float* partials,
                                 const Read& read) {
  using View = Tile<T, kVector>;
  float count = 0.0f, mean[View::kChannels] = {}, m2[View::kChannels] = {};

  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw raw[kStaged];
    read(raw, m0);

    int rows = 0;  // of a channel, the same for all of the thread's channels
    float sum[View::kChannels] = {}, squares[View::kChannels] = {};
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (!kVector || e == 0) rows += tile.row(m0 + u * tile.step, e) < tile.end;
        sum[View::of(e)] += View::get(raw[u], e);  // rows beyond the end are 0
      }
    }
    const float per_row = rows ? __fdividef(1.0f, static_cast<float>(rows)) : 0.0f;
#pragma unroll
    for (int i = 0; i < View::kChannels; ++i) sum[i] *= per_row;
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float delta = View::get(raw[u], e) - sum[View::of(e)];
        if (tile.row(m0 + u * tile.step, e) < tile.end) squares[View::of(e)] += delta * delta;
      }
    }
    const float before = count;
#pragma unroll
    for (int i = 0; i < View::kChannels; ++i) {
      count = before;
      merge(count, mean[i], m2[i], static_cast<float>(rows), sum[i], squares[i]);
    }
  }

  if constexpr (kVector) {  // the eight rows of a channel are in the lanes that differ in bits 2, 3 and 4
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      const float before = count;
      const float other_count = __shfl_xor_sync(kAllLanes, before, bit);
#pragma unroll
      for (int i = 0; i < View::kChannels; ++i) {
        const float other_mean = __shfl_xor_sync(kAllLanes, mean[i], bit);
        const float other_m2 = __shfl_xor_sync(kAllLanes, m2[i], bit);
        count = before;
        merge(count, mean[i], m2[i], other_count, other_mean, other_m2);
      }
    }
  }

  __shared__ float shared[kWarps][3][kPanel];  // count, mean, m2
  const int warp = threadIdx.y;
  if (!kVector || tile.lane < 4) {
#pragma unroll
    for (int i = 0; i < View::kChannels; ++i) {
      shared[warp][0][tile.slot(i)] = count;
      shared[warp][1][tile.slot(i)] = mean[i];
      shared[warp][2][tile.slot(i)] = m2[i];
    }
  }
  __syncthreads();
  const int lane = tile.lane, c = tile.panel * kPanel + lane;
  if (warp >= warps_across || c >= tile.C) return;
  float n = shared[warp][0][lane], block_mean = shared[warp][1][lane], block_m2 = shared[warp][2][lane];
  for (int w = warp + warps_across; w < kWarps; w += warps_across) {
    merge(n, block_mean, block_m2, shared[w][0][lane], shared[w][1][lane], shared[w][2][lane]);
  }
  float* partial = partials + static_cast<int64_t>(blockIdx.x) * 2 * tile.C + c;
  partial[0] = block_mean;
  partial[tile.C] = block_m2;
}

}  // namespace resnet_fused
