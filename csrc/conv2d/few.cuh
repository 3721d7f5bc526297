// The patch of an image in shared memory, see conv2d_few.h.
#pragma once

#include "conv2d/conv2d_few.h"
#include "gemm/tile.cuh"

namespace resnet_fused {

// The first C of a pixel's kPad channels, each a pair's low or high half; the others are zero.
template <int kPad>
struct FewPixel {
  uint32_t pair[kPad / 2] = {};

  __device__ void read(const uint16_t* from, int C) {
    uint32_t v[kPad];
#pragma unroll
    for (int c = 0; c < kPad; ++c) v[c] = c < C ? __ldg(from + c) : 0u;
#pragma unroll
    for (int i = 0; i < kPad / 2; ++i) pair[i] = permute(v[2 * i], v[2 * i + 1], 0x5410);
  }
  __device__ void store(uint32_t at) const {
    if constexpr (kPad == 4) {
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(pair[0]), "r"(pair[1]) : "memory");
    } else {
      store_shared(at, make_uint4(pair[0], pair[1], pair[2], pair[3]));
    }
  }
};

// 128 threads share a row of the kernel, or every kAtOnce-th one.
template <int kPad, int kThreads>
struct FewPatch {
  static constexpr int kAcross = 128, kAtOnce = kThreads / kAcross;
  static constexpr int kRows = (kFewTaps + kAtOnce - 1) / kAtOnce;  // of a thread
  const FewImage& p;
  int l0, q0;  // line of the tile's first pixel, and its place in it
  int first;   // positions of that line

  __device__ FewPatch(const FewImage& p, int m0) : p(p) {
    l0 = divide(m0, p.Q);
    q0 = m0 - l0 * p.Q.divisor;
    first = (p.Q.divisor - q0) * p.stride_w + p.gap;
  }

  // Where pixel i of the tile starts, as a position and in bytes.
  __device__ int position(int i) const {
    return i * p.stride_w + static_cast<int>(divide(q0 + i, p.Q)) * p.gap;
  }
  __device__ uint32_t offset(int t) const {
    if (p.plane) return (t & ~1) * 8 + (t & 1 ? p.plane : 0);
    return t * kPad * 2;
  }
  // From a chunk of eight elements to the next: of the two in a step, and of steps.
  __device__ static int odd_chunk(const FewImage& p) { return kPad == 8 && p.plane ? p.plane : 16; }
  __device__ static int step(const FewImage& p) { return kPad == 8 && p.plane ? 16 : 32; }

  // Copies what `pixels` from the tile's first on read, with zeros outside of the image.
  __device__ void load(uint32_t patch, int pixels, int thread) const {
    const int end = position(pixels - 1) + p.steps * (16 / kPad);
    const int64_t row = static_cast<int64_t>(p.W) * p.C;  // elements
    const int r0 = kAtOnce == 1 ? 0 : thread / kAcross;
#pragma unroll 1
    for (int t = thread % kAcross; t < end; t += kAcross) {
      int line = l0, from = q0 * p.stride_w + t;
      if (t >= first) {
        const int whole = divide(t - first, p.line);
        line += 1 + whole;
        from = t - first - whole * p.line.divisor;
      }
      const int n = divide(line, p.P), w = from - p.padding_w;
      const int h = (line - n * static_cast<int>(p.P.divisor)) * p.stride_h - p.padding_h;
      const bool exists = line < p.lines && static_cast<uint32_t>(w) < static_cast<uint32_t>(p.W);
      const uint16_t* x = static_cast<const uint16_t*>(p.x) +
                          ((static_cast<int64_t>(n) * p.H + h) * p.W + w) * static_cast<int64_t>(p.C);
      FewPixel<kPad> pixel[kRows];  // all in flight at once
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int r = r0 + i * kAtOnce;
        if (r < p.R && exists && static_cast<uint32_t>(h + r) < static_cast<uint32_t>(p.H)) {
          pixel[i].read(x + r * row, p.C);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int r = r0 + i * kAtOnce;
        if (r >= p.R) break;
        const uint32_t to = patch + r * p.pitch;
        pixel[i].store(to + offset(t));
        if (kPad == 4 && p.plane && t > 0) {  // the other plane's
          pixel[i].store(to + (t & 1 ? t * 8 : p.plane + (t - 1) * 8));
        }
      }
    }
  }
};

}  // namespace resnet_fused
