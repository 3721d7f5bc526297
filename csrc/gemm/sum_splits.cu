#include "gemm/instructions.cuh"
#include "gemm/sum_splits.h"

namespace resnet_fused {

__device__ inline void store_eight(float* out, const float (&v)[8]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T>
__device__ void store_eight(T* out, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(out) = pack<T>(v);
}

template <typename T>
__device__ void add_splits(const float* partial, T* out, int64_t splits, int64_t n) {
  const int64_t i = (blockIdx.x * 256ll + threadIdx.y * 32 + threadIdx.x) * 8;
  if (i >= n) return;
  float total[8] = {};
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) {
    const float4* from = reinterpret_cast<const float4*>(partial + s * n + i);
    const float4 a = __ldg(from), b = __ldg(from + 1);
    total[0] += a.x, total[1] += a.y, total[2] += a.z, total[3] += a.w;
    total[4] += b.x, total[5] += b.y, total[6] += b.z, total[7] += b.w;
  }
  store_eight(out + i, total);
}

template <typename T>
__device__ void sum_splits(const SumSplitsParams& p) {
  if (blockIdx.y == 0) {
    add_splits(p.partial, static_cast<T*>(p.out), p.splits, p.n);
  } else {
    add_splits(p.partial + p.splits * p.n, p.out2, p.splits, p.n2);
  }
}

RESNET_FUSED_KERNEL(sum_splits_f32, 256, 4, SumSplitsParams, sum_splits<float>);
RESNET_FUSED_KERNEL(sum_splits_f16, 256, 4, SumSplitsParams, sum_splits<__half>);
RESNET_FUSED_KERNEL(sum_splits_bf16, 256, 4, SumSplitsParams, sum_splits<__nv_bfloat16>);

}  // namespace resnet_fused
