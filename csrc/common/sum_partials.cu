#include "common/kernel.cuh"
#include "common/rows.h"

namespace resnet_fused {

// grid (ceil(C/32), sums), block (32, kFinalizeWarps): warp w adds partials w, w + 32, ...; then warp 0 adds
// the warps.
__device__ void add_partials(const SumPartialsParams& p) {
  __shared__ float sums[kFinalizeWarps][kPanel];
  const int c = blockIdx.x * kPanel + threadIdx.x;
  const int sum = blockIdx.y;
  float total = 0.0f;
  if (c < p.C) {
#pragma unroll 4
    for (int64_t b = threadIdx.y; b < p.blocks; b += kFinalizeWarps) {
      total += p.partial[(b * gridDim.y + sum) * p.C + c];
    }
  }
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || c >= p.C) return;
  for (int w = 1; w < kFinalizeWarps; ++w) total += sums[w][threadIdx.x];
  (sum == 0 ? p.out[0] : p.out[1])[c] = p.factor * total;
}

RESNET_FUSED_KERNEL(sum_partials, 1024, 1, SumPartialsParams, add_partials);

}  // namespace resnet_fused
