// Device code that the kernels of the tails share: element types and the registration of kernels by name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "common/launch.h"
#include "common/plan.h"

// Defines the kernel NAME(PARAMS) as a call of the last argument, and enters it under its own name where the
// launcher looks it up. BLOCKS of THREADS must fit on a multiprocessor: that bounds the registers.
#define RESNET_FUSED_KERNEL(NAME, THREADS, BLOCKS, PARAMS, ...)                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ PARAMS p) { \
    __VA_ARGS__(p);                                                                                      \
  }                                                                                                      \
  static const ::resnet_fused::KernelEntry entry_of_##NAME(#NAME, reinterpret_cast<const void*>(&NAME))

// The variants of a tail: three element types, 16-byte accesses or single elements. BODY<T, kVector>(const
// PARAMS&).
#define RESNET_FUSED_TAIL_KERNELS(NAME, BLOCKS, PARAMS, BODY)                            \
  RESNET_FUSED_KERNEL(NAME##_f32_v4, 256, BLOCKS, PARAMS, (BODY<float, true>));          \
  RESNET_FUSED_KERNEL(NAME##_f32, 256, BLOCKS, PARAMS, (BODY<float, false>));            \
  RESNET_FUSED_KERNEL(NAME##_f16_v8, 256, BLOCKS, PARAMS, (BODY<__half, true>));         \
  RESNET_FUSED_KERNEL(NAME##_f16, 256, BLOCKS, PARAMS, (BODY<__half, false>));           \
  RESNET_FUSED_KERNEL(NAME##_bf16_v8, 256, BLOCKS, PARAMS, (BODY<__nv_bfloat16, true>)); \
  RESNET_FUSED_KERNEL(NAME##_bf16, 256, BLOCKS, PARAMS, (BODY<__nv_bfloat16, false>))

namespace resnet_fused {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// One 16-byte access as elements.
template <typename T>
union Chunk {
  static constexpr int kWidth = 16 / sizeof(T);
  uint4 bits;
  T value[kWidth];
  __device__ Chunk() : bits(make_uint4(0, 0, 0, 0)) {}
};

// relu and its gradient's gate, as PyTorch has them: relu(NaN) is NaN and lets the gradient pass.
__device__ inline bool relu_gate(float z) { return !(z <= 0.0f); }
__device__ inline float relu(float z) { return relu_gate(z) ? z : 0.0f; }

}  // namespace resnet_fused
