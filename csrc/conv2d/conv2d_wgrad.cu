#include "gemm/wgrad.cuh"

#define RESNET_FUSED_TAPS_KERNEL(NAME, T, TILE, BLOCKS, DY, X)   \
  using NAME##_kernel = WgradKernel<T, WgradShape<TILE>, DY, X>; \
  RESNET_FUSED_KERNEL(NAME, TILE.threads(), BLOCKS, NAME##_kernel::Params, NAME##_kernel::run)
#define RESNET_FUSED_TAPS_TYPES(NAME, SUFFIX, TILE, BLOCKS, DY, X)                    \
  RESNET_FUSED_TAPS_KERNEL(NAME##_bf16_##SUFFIX, __nv_bfloat16, TILE, BLOCKS, DY, X); \
  RESNET_FUSED_TAPS_KERNEL(NAME##_f16_##SUFFIX, __half, TILE, BLOCKS, DY, X)
#define RESNET_FUSED_TAPS_KERNELS(NAME, DY, X)                    \
  RESNET_FUSED_TAPS_TYPES(NAME, 64x64x64, kWgradLong, 1, DY, X);  \
  RESNET_FUSED_TAPS_TYPES(NAME, 64x64x32, kWgradShort, 1, DY, X); \
  RESNET_FUSED_TAPS_TYPES(NAME, 32x64x32, kWgradNarrow, 2, DY, X)

namespace resnet_fused {

RESNET_FUSED_TAPS_KERNELS(conv2d_wgrad, SharedPlain, SharedPlain);
RESNET_FUSED_TAPS_KERNELS(conv2d_wgrad_affine, SharedPlain, SharedAffine);
RESNET_FUSED_TAPS_KERNELS(conv2d_wgrad_backward, SharedBackward, SharedPlain);
RESNET_FUSED_TAPS_KERNELS(conv2d_wgrad_backward_affine, SharedBackward, SharedAffine);

}  // namespace resnet_fused
