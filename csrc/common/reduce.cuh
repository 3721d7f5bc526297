// Sums over the rows of a block, in an order that depends on nothing but the shape.
#pragma once

#include "common/tile.cuh"

namespace resnet_fused {

// Adds up kSums per-channel accumulators of every thread of the block and writes them to
// partial[blockIdx.x][sum][c], [gridDim.x, sums, C]. Only the first `sums` are wanted. All threads call it.
template <int kSums, typename T, bool kVector>
__device__ void write_block_sums(const Tile<T, kVector>& tile,
                                 float (&acc)[kSums][Tile<T, kVector>::kChannels], int warps_across, int sums,
                                 float* partial) {
  __shared__ float shared[kSums][kWarps][kPanel];
  const int warp = threadIdx.y;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < tile.kChannels; ++i) {
      float value = acc[s][i];
      if constexpr (kVector) {  // the eight rows of a channel are in the lanes that differ in bits 2, 3 and 4
        value += __shfl_xor_sync(kAllLanes, value, 4);
        value += __shfl_xor_sync(kAllLanes, value, 8);
        value += __shfl_xor_sync(kAllLanes, value, 16);
      }
      if (!kVector || tile.lane < 4) shared[s][warp][tile.slot(i)] = value;
    }
  }
  __syncthreads();
  const int c = tile.panel * kPanel + tile.lane;
  if (warp >= warps_across || c >= tile.C) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    if (s >= sums) return;
    float total = shared[s][warp][tile.lane];
    for (int w = warp + warps_across; w < kWarps; w += warps_across) total += shared[s][w][tile.lane];
    partial[(static_cast<int64_t>(blockIdx.x) * sums + s) * tile.C + c] = total;
  }
}

}  // namespace resnet_fused
