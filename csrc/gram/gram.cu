#include "gemm/kernels.cuh"
#include "gemm/pixels.cuh"
#include "gram/gram.h"

namespace resnet_fused {

template <typename T, class S>
using GramDense = PixelsKernel<T, S, Centered<T>, Centered<T>, true, false, true>;
template <typename T, class S>
using GramStrided = PixelsKernel<T, S, Centered<T>, Centered<T>, true, true, true>;

RESNET_FUSED_PIXELS_KERNELS(gram, GramDense);
RESNET_FUSED_PIXELS_KERNELS(gram_strided, GramStrided);

// cov = sum over the splits / M - mean mean', from the upper tiles. grid (ceil(C/32), ceil(C/32)), block (32,
// 8): a 32 x 32 part of cov.
__device__ void gram_finalize_part(const GramFinalizeParams& p) {
  __shared__ float means[2][kPanel];  // of the part's rows and columns
  const int C = p.C, j = blockIdx.x * kPanel + threadIdx.x;
  const float* sums = p.partial + p.splits * C * C;  // [splits, C]
  if (threadIdx.y < 2) {
    const int c = (threadIdx.y == 0 ? blockIdx.y : blockIdx.x) * kPanel + threadIdx.x;
    float total = 0.0f;
    if (c < C) {
      for (int64_t s = 0; s < p.splits; ++s) total += sums[s * C + c];
    }
    means[threadIdx.y][threadIdx.x] = total * p.inverse_count;
    if (threadIdx.y == 1 && blockIdx.y == 0 && c < C) p.mean[c] = total * p.inverse_count;
  }
  __syncthreads();
  if (j >= C) return;
  for (int r = threadIdx.y; r < kPanel && blockIdx.y * kPanel + r < C; r += blockDim.y) {
    const int i = blockIdx.y * kPanel + r;
    const bool upper = i / p.tile <= j / p.tile;
    const float* from =
        p.partial + (upper ? static_cast<int64_t>(i) * C + j : static_cast<int64_t>(j) * C + i);
    float total = 0.0f;
    for (int64_t s = 0; s < p.splits; ++s) total += from[s * C * C];
    p.cov[static_cast<int64_t>(i) * C + j] =
        fmaf(total, p.inverse_count, -means[0][r] * means[1][threadIdx.x]);
  }
}

RESNET_FUSED_KERNEL(gram_finalize, 256, 4, GramFinalizeParams, gram_finalize_part);

}  // namespace resnet_fused
