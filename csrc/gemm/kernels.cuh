// Instantiations by name: <op>[_<policies>]_<bf16 | f16>_<m>x<n>x<k>, or _resident. KERNEL<T, Shape> is the
// kernel's class; both element types and several tiles of each.
#pragma once

#include "common/kernel.cuh"
#include "gemm/gemm.h"

#define RESNET_FUSED_GEMM_KERNEL(NAME, T, TILE, BLOCKS, KERNEL) \
  using NAME##_kernel = KERNEL<T, Shape<TILE>>;                 \
  RESNET_FUSED_KERNEL(NAME, TILE.threads(), BLOCKS, NAME##_kernel::Params, NAME##_kernel::run)
#define RESNET_FUSED_GEMM_TYPES(NAME, SUFFIX, TILE, BLOCKS, KERNEL)                    \
  RESNET_FUSED_GEMM_KERNEL(NAME##_bf16_##SUFFIX, __nv_bfloat16, TILE, BLOCKS, KERNEL); \
  RESNET_FUSED_GEMM_KERNEL(NAME##_f16_##SUFFIX, __half, TILE, BLOCKS, KERNEL)

// `rows` kernels: with one tensor a stage, and with two, for which kLarge is too large. SQUARES: blocks of
// kSquare on a multiprocessor; two where the epilogue leaves the registers for it.
#define RESNET_FUSED_ROWS_KERNELS_2(NAME, SQUARES, KERNEL)             \
  RESNET_FUSED_GEMM_TYPES(NAME, 256x128x32, kWide, 1, KERNEL);         \
  RESNET_FUSED_GEMM_TYPES(NAME, 128x128x32, kSquare, SQUARES, KERNEL); \
  RESNET_FUSED_GEMM_TYPES(NAME, 128x64x32, kNarrow, 2, KERNEL)
#define RESNET_FUSED_ROWS_KERNELS(NAME, SQUARES, KERNEL)        \
  RESNET_FUSED_GEMM_TYPES(NAME, 256x128x64, kLarge, 1, KERNEL); \
  RESNET_FUSED_ROWS_KERNELS_2(NAME, SQUARES, KERNEL)

#define RESNET_FUSED_RESIDENT_KERNELS(NAME, KERNEL) \
  RESNET_FUSED_GEMM_TYPES(NAME, resident, kResident, 1, KERNEL)

#define RESNET_FUSED_PIXELS_KERNELS(NAME, KERNEL)                   \
  RESNET_FUSED_GEMM_TYPES(NAME, 128x128x32, kPixels128, 2, KERNEL); \
  RESNET_FUSED_GEMM_TYPES(NAME, 64x64x32, kPixels64, 3, KERNEL)

#define RESNET_FUSED_TAPS_KERNELS(NAME, KERNEL)                    \
  RESNET_FUSED_GEMM_TYPES(NAME, 256x128x32, kTapsWide, 1, KERNEL); \
  RESNET_FUSED_GEMM_TYPES(NAME, 256x64x32, kTapsTall, 2, KERNEL);  \
  RESNET_FUSED_GEMM_TYPES(NAME, 128x64x32, kTapsNarrow, 2, KERNEL)
