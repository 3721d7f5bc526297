#include "bn_act_pool/bn_act_pool.h"
#include "common/kernel.cuh"
#include "common/rows.h"

namespace resnet_fused {

// kWidth neighbouring elements as one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];
};
template <typename T, int kWidth>
__device__ Pack<T, kWidth> load(const T* source) {
  if constexpr (sizeof(Pack<T, kWidth>) == 16) {  // an intrinsic, since ptxas may split a plain load
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(source));
    Pack<T, kWidth> pack;
    memcpy(&pack, &bits, sizeof(bits));
    return pack;
  } else {
    return *reinterpret_cast<const Pack<T, kWidth>*>(source);
  }
}

// A thread's pixel and channels: image row blockIdx.x (of all images), then pixel and chunk of channels by
// thread.
template <int kWidth>
struct Place {
  int n, h, w, c;
  bool inside;

  __device__ Place(int H, int W, int C) {
    const uint32_t chunks = C / kWidth;
    const uint32_t index = (blockIdx.y * kWarps + threadIdx.y) * 32 + threadIdx.x;
    n = blockIdx.x / H;
    h = blockIdx.x % H;
    w = index / chunks;
    c = index % chunks * kWidth;
    inside = w < W;
  }
};

// The thread of one output pixel looks at every tap, in order, and keeps the first maximum; a NaN wins, as
// PyTorch's.
template <typename T, bool kVector>
__device__ void pool(const BnActPoolParams& p) {
  constexpr int kWidth = kVector ? Chunk<T>::kWidth : 1;
  const PoolGeometry& s = p.shape;
  const Place<kWidth> at(s.Ho, s.Wo, s.C);
  if (!at.inside) return;
  float scale[kWidth], shift[kWidth], best[kWidth];
  Pack<int8_t, kWidth> winner;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    scale[i] = p.io.scale[at.c + i];
    shift[i] = p.io.shift[at.c + i];
    best[i] = -INFINITY;
    winner.value[i] = 0;
  }
  const int h0 = at.h * s.window.stride - s.window.padding, w0 = at.w * s.window.stride - s.window.padding;
  const T* image = static_cast<const T*>(p.io.x) + static_cast<int64_t>(at.n) * s.H * s.W * s.C + at.c;
  for (int kh = max(0, -h0); kh < min(s.window.kernel, s.H - h0); ++kh) {
#pragma unroll 4
    for (int kw = max(0, -w0); kw < min(s.window.kernel, s.W - w0); ++kw) {
      const int64_t pixel = static_cast<int64_t>(h0 + kh) * s.W + w0 + kw;
      const Pack<T, kWidth> x = load<T, kWidth>(image + pixel * s.C);
      const int8_t tap = static_cast<int8_t>(kh * s.window.kernel + kw);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float z = relu(fmaf(scale[i], to_float(x.value[i]), shift[i]));
        if (z > best[i] || z != z) {
          best[i] = z;
          winner.value[i] = tap;
        }
      }
    }
  }
  Pack<T, kWidth> y;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y.value[i] = from_float<T>(best[i]);
  const int64_t offset = (static_cast<int64_t>(blockIdx.x) * s.Wo + at.w) * s.C + at.c;
  *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(p.io.y) + offset) = y;
  *reinterpret_cast<Pack<int8_t, kWidth>*>(p.io.argmax + offset) = winner;
}

// The thread of one input pixel gathers the gradients of the windows that it has won: no atomics, one write.
template <typename T, bool kVector>
__device__ void pool_backward(const BnActPoolBackwardParams& p) {
  constexpr int kWidth = kVector ? Chunk<T>::kWidth : 1;
  const PoolGeometry& s = p.shape;
  const Window& window = s.window;
  const Place<kWidth> at(s.H, s.W, s.C);
  if (!at.inside) return;
  const int h = at.h + window.padding, w = at.w + window.padding;
  // windows [first, last] along each axis: those with first*stride + kernel > h and last*stride <= h
  const int h_first = h < window.kernel ? 0 : (h - window.kernel) / window.stride + 1;
  const int w_first = w < window.kernel ? 0 : (w - window.kernel) / window.stride + 1;
  const int h_last = min(h / window.stride, s.Ho - 1), w_last = min(w / window.stride, s.Wo - 1);
  const int64_t image = static_cast<int64_t>(at.n) * s.Ho * s.Wo;
  float sum[kWidth] = {};
  for (int i = h_first; i <= h_last; ++i) {
#pragma unroll 2
    for (int j = w_first; j <= w_last; ++j) {
      const int64_t offset = (image + static_cast<int64_t>(i) * s.Wo + j) * s.C + at.c;
      const Pack<int8_t, kWidth> winner = load<int8_t, kWidth>(p.io.argmax + offset);
      const Pack<T, kWidth> dy = load<T, kWidth>(static_cast<const T*>(p.io.dy) + offset);
      const int tap = (h - i * window.stride) * window.kernel + w - j * window.stride;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum[e] += winner.value[e] == tap ? to_float(dy.value[e]) : 0.0f;
    }
  }
  Pack<T, kWidth> da;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) da.value[e] = from_float<T>(sum[e]);
  const int64_t offset = (static_cast<int64_t>(blockIdx.x) * s.W + at.w) * s.C + at.c;
  *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(p.io.da) + offset) = da;
}

RESNET_FUSED_TAIL_KERNELS(bn_act_pool, 4, BnActPoolParams, pool);
RESNET_FUSED_TAIL_KERNELS(bn_act_pool_backward, 4, BnActPoolBackwardParams, pool_backward);

}  // namespace resnet_fused
