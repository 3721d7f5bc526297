// Prologues that read their coefficients in shared memory, for kernels whose accumulators leave no registers
// for them. They are [vector][half of a chunk][chunk][4] there: chunks side by side take different banks.
#pragma once

#include "gemm/prologue.cuh"

namespace resnet_fused {

__device__ inline float4 load_four(const float* vector, int channel) {
  return __ldg(reinterpret_cast<const float4*>(vector + channel));
}

template <typename T, int kChannels>
struct SharedPlain : Plain<T> {
  static constexpr int kVectors = 0;
};

template <int kChannels>
__device__ float4 coefficients(uint32_t own, int vector, int half) {
  return load_shared_floats(own + (vector * kChannels + half * kChannels / 2) * 4);
}

// apply: on kCount chunks of the same channels, whose coefficients are read once.
template <typename T, int kChannels>
struct SharedAffine : AffineRelu<T> {
  using Params = Affine;
  static constexpr int kVectors = 2;
  static __device__ void gather(const Params& p, int channel, float4 (&v)[kVectors]) {
    v[0] = load_four(p.scale, channel);
    v[1] = load_four(p.shift, channel);
  }
  template <int kCount>
  static __device__ void apply(uint32_t own, uint4 (&x)[kCount]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 scale = coefficients<kChannels>(own, 0, half),
                   shift = coefficients<kChannels>(own, 1, half);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        uint32_t& low = half ? x[i].z : x[i].x;
        uint32_t& high = half ? x[i].w : x[i].y;
        low = Half<T>::pack_relu(fmaf(scale.x, Half<T>::low(low), shift.x),
                                 fmaf(scale.y, Half<T>::high(low), shift.y));
        high = Half<T>::pack_relu(fmaf(scale.z, Half<T>::low(high), shift.z),
                                  fmaf(scale.w, Half<T>::high(high), shift.w));
      }
    }
  }
};

template <typename T, int kChannels>
struct SharedBackward : Backward<T> {
  using Params = BnBackward;
  static constexpr int kVectors = 5;
  static __device__ void gather(const Params& p, int channel, float4 (&v)[kVectors]) {
    v[0] = load_four(p.coef_dz, channel);
    v[1] = load_four(p.coef_x, channel);
    const float4 mean = load_four(p.mean, channel), one = load_four(p.coef_1, channel);
    v[2] = make_float4(fmaf(-v[1].x, mean.x, one.x), fmaf(-v[1].y, mean.y, one.y),
                       fmaf(-v[1].z, mean.z, one.z), fmaf(-v[1].w, mean.w, one.w));
    v[3] = v[4] = make_float4(0, 0, 0, 0);
    if (!p.gate.scale) return;
    v[3] = load_four(p.gate.scale, channel);
    v[4] = load_four(p.gate.shift, channel);
  }
  template <int kCount>
  static __device__ void apply(const Params& p, uint32_t own, uint4 (&dy)[kCount], const uint4 (&u)[kCount],
                               const uint32_t (&bits)[kCount]) {
    if (p.gate.mask) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) dy[i] = keep_where(dy[i], bits[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (p.gate.scale) {
        const float4 scale = coefficients<kChannels>(own, 3, half),
                     shift = coefficients<kChannels>(own, 4, half);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          gate(half ? dy[i].z : dy[i].x, half ? u[i].z : u[i].x, scale.x, scale.y, shift.x, shift.y);
          gate(half ? dy[i].w : dy[i].y, half ? u[i].w : u[i].y, scale.z, scale.w, shift.z, shift.w);
        }
      }
      const float4 dz = coefficients<kChannels>(own, 0, half), x = coefficients<kChannels>(own, 1, half);
      const float4 one = coefficients<kChannels>(own, 2, half);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        finish(half ? dy[i].z : dy[i].x, half ? u[i].z : u[i].x, dz.x, dz.y, x.x, x.y, one.x, one.y);
        finish(half ? dy[i].w : dy[i].y, half ? u[i].w : u[i].y, dz.z, dz.w, x.z, x.w, one.z, one.w);
      }
    }
  }

 private:  // on pairs
  static __device__ void gate(uint32_t& dy, uint32_t u, float scale0, float scale1, float shift0,
                              float shift1) {
    if (!relu_gate(fmaf(scale0, Half<T>::low(u), shift0))) dy &= 0xffff0000u;
    if (!relu_gate(fmaf(scale1, Half<T>::high(u), shift1))) dy &= 0xffffu;
  }
  static __device__ void finish(uint32_t& dy, uint32_t u, float dz0, float dz1, float x0, float x1,
                                float one0, float one1) {
    dy = Half<T>::pack(fmaf(dz0, Half<T>::low(dy), fmaf(x0, Half<T>::low(u), one0)),
                       fmaf(dz1, Half<T>::high(dy), fmaf(x1, Half<T>::high(u), one1)));
  }
};

// Puts a prologue's coefficients of channels [first, first + kChannels) of C where `coefficients` has them.
template <class Prologue, int kChannels>
__device__ void put_coefficients(const typename Prologue::Params& p, uint32_t area, int first, int C,
                                 int thread) {
  if constexpr (Prologue::kVectors > 0) {
    if (thread >= kChannels / 4) return;
    const int chunk = thread % (kChannels / 8), half = thread / (kChannels / 8);
    float4 v[Prologue::kVectors];
    Prologue::gather(p, min(first + 8 * chunk, C - 8) + 4 * half, v);
#pragma unroll
    for (int i = 0; i < Prologue::kVectors; ++i) {
      store_shared(area + (i * kChannels + half * kChannels / 2 + chunk * 4) * 4,
                   make_uint4(__float_as_uint(v[i].x), __float_as_uint(v[i].y), __float_as_uint(v[i].z),
                              __float_as_uint(v[i].w)));
    }
  }
}

}  // namespace resnet_fused
