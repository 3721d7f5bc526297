// Epilogues: what happens to accumulators on their way to global memory. A thread gets eight neighbouring
// channels of one pixel at a time, in fp32, always the same eight: coefficients and sums stay in registers,
// accesses are 16 bytes.
//
//   fetch    starts the loads that a row needs beside its accumulators
//   row      finishes a row; all lanes of a warp call it, `inside` is whether theirs exists
//   finish   combines what the threads have summed up
#pragma once

#include "gemm/mainloop.cuh"

namespace resnet_fused {

// Where a thread stands in the output.
struct Place {
  int M, N;
  int n;               // its first channel
  int lane;            // lanes 8i .. 8i+7 have row i of four, and eight chunks of a row
  int warp_m, warp_n;  // the warp's place in the block
  int m0, n0;          // the block's first row and channel
  int tile_m;

  __device__ bool exists() const { return n < N; }
  __device__ int channel() const { return min(n, N - 8); }  // one that exists
};

__device__ inline uint4 fetch_chunk(const void* x, int64_t row, int C, int channel) {
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(x) + (row * C + channel) * 2));
}
__device__ inline void store_chunk(void* x, int64_t row, int C, int channel, uint4 chunk) {
  *reinterpret_cast<uint4*>(static_cast<char*>(x) + (row * C + channel) * 2) = chunk;
}

// 64 floats in shared memory such that eight lanes read or write 16 bytes each, 32 apart, without a conflict:
// the even quadruples first, then the odd ones, turned by half a row.
__device__ inline int spread(int quadruple) {
  return quadruple & 1 ? 8 + ((quadruple / 2 + 4) & 7) : quadruple / 2;
}

// Two sums of every column of a block, by the rows of its warps: put by the lanes that hold them, got by any
// thread after put's barrier.
template <class S>
class ColumnSums {
 public:
  static constexpr int kBytes = S::kWarpsM * 2 * S::kN * 4;

  __device__ static void put(uint32_t area, const Place& at, float (&v)[2][8]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t to = area + ((at.warp_m * 2 + s) * S::kWarpsN + at.warp_n) * 256;
      const int chunk = at.lane % 8;
      if (at.lane < 8) {
        store_shared(to + spread(2 * chunk) * 16,
                     make_uint4(__float_as_uint(v[s][0]), __float_as_uint(v[s][1]), __float_as_uint(v[s][2]),
                                __float_as_uint(v[s][3])));
        store_shared(to + spread(2 * chunk + 1) * 16,
                     make_uint4(__float_as_uint(v[s][4]), __float_as_uint(v[s][5]), __float_as_uint(v[s][6]),
                                __float_as_uint(v[s][7])));
      }
    }
    __syncthreads();
  }
  __device__ static float get(uint32_t area, int warp_m, int sum, int column) {
    const uint32_t from = area + ((warp_m * 2 + sum) * S::kWarpsN + column / 64) * 256;
    float v;
    asm volatile("ld.shared.f32 %0, [%1];"
                 : "=f"(v)
                 : "r"(from + spread(column % 64 / 4) * 16 + column % 4 * 4)
                 : "memory");
    return v;
  }
};

__device__ inline void add_lanes(float (&v)[8]) {  // over the four rows of a warp's access
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] += __shfl_xor_sync(0xffffffffu, v[i], 8);
    v[i] += __shfl_xor_sync(0xffffffffu, v[i], 16);
  }
}

template <typename T, class S>
struct StoreStatsEpilogue {
  using Params = StoreStats;
  static constexpr bool kMapsA = true, kMapsOutput = false, kRescales = false;
  const Params& p;
  const Place& at;
  float pivot[8];  // the warp's first row: deviations from a value of the data itself cancel nothing
  float sums[2][8] = {};

  __device__ StoreStatsEpilogue(const Params& p, const PixelMap&, const Place& at) : p(p), at(at) {}
  __device__ uint4 fetch(int, bool) const { return {}; }

  __device__ void row(int m, bool inside, bool first, const float (&acc)[8], uint4) {
    const uint4 chunk = pack<T>(acc);
    if (inside) store_chunk(p.out, m, at.N, at.n, chunk);
    if (!p.partial) return;
    float v[8];
    unpack<T>(chunk, v);
    if (first) {
#pragma unroll
      for (int i = 0; i < 8; ++i) pivot[i] = __shfl_sync(0xffffffffu, v[i], at.lane % 8);
    }
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float d = v[i] - pivot[i];
      sums[0][i] += d;
      sums[1][i] = fmaf(d, d, sums[1][i]);
    }
  }

  __device__ void finish(uint32_t area) {
    if (!p.partial) return;
    add_lanes(sums[0]);
    add_lanes(sums[1]);
    const float inverse = __fdividef(1.0f, static_cast<float>(max(rows_of(at.warp_m), 1)));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float d = sums[0][i] * inverse;
      sums[1][i] = fmaf(-d, sums[0][i], sums[1][i]);
      sums[0][i] = pivot[i] + d;
    }
    ColumnSums<S>::put(area, at, sums);
    const int column = threadIdx.y * 32 + threadIdx.x;
    if (column >= S::kN || at.n0 + column >= at.N) return;
    float count = 0.0f, mean = 0.0f, m2 = 0.0f;  // Chan's formula
#pragma unroll
    for (int w = 0; w < S::kWarpsM; ++w) {
      const float n = static_cast<float>(rows_of(w));
      if (n <= 0.0f) break;
      const float d = ColumnSums<S>::get(area, w, 0, column) - mean;
      const float share = __fdividef(n, count + n);
      mean = fmaf(d, share, mean);
      m2 += ColumnSums<S>::get(area, w, 1, column) + d * d * count * share;
      count += n;
    }
    float* to = p.partial + static_cast<int64_t>(at.tile_m) * 2 * at.N + at.n0 + column;
    to[0] = mean;
    to[at.N] = m2;
  }

 private:
  __device__ int rows_of(int warp_m) const { return min(S::kWarpM, at.M - at.m0 - warp_m * S::kWarpM); }
};

template <typename T, class S, bool kDual>
struct AffineResidualEpilogue {
  using Params = AffineResidual;
  static constexpr bool kMapsA = true, kMapsOutput = false, kRescales = kDual;
  const Params& p;
  const Place& at;
  float scale[8], shift[8];

  __device__ AffineResidualEpilogue(const Params& p, const PixelMap&, const Place& at) : p(p), at(at) {
    load_vector(p.scale, at.channel(), scale);
    load_vector(p.shift, at.channel(), shift);
    if (!kDual) return;
    float scale2[8];
    load_vector(p.scale2, at.channel(), scale2);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scale[i] = scale[i] == 0.0f && scale2[i] == 0.0f ? 0.0f : divisor(scale[i], scale2[i]);
    }
  }

  // acc = s (s1/s a1 + a2) + ...: the first product is multiplied by s1/s when the second begins. s is the
  // second scale, or something that is as good as it where dividing by it might overflow.
  __device__ static float divisor(float scale, float scale2) {
    const float least = fmaxf(fabsf(scale) * 0x1p-40f, 1e-30f);
    return fabsf(scale2) >= least ? scale2 : least;
  }
  __device__ static void rescale(const Params& p, Accumulators<S>& acc, int first, int N, int lane) {
#pragma unroll
    for (int n = 0; n < 2 * S::kGroupsN; ++n) {
      const int column = min(first + 8 * n + lane % 4 * 2, N - 2);
      const float2 s = *reinterpret_cast<const float2*>(p.scale + column);
      const float2 s2 = *reinterpret_cast<const float2*>(p.scale2 + column);
      const float x = __fdividef(s.x, divisor(s.x, s2.x)), y = __fdividef(s.y, divisor(s.y, s2.y));
#pragma unroll
      for (int m = 0; m < S::kGroupsM; ++m) {
        acc.c[m][n][0] *= x, acc.c[m][n][1] *= y;
        acc.c[m][n][2] *= x, acc.c[m][n][3] *= y;
      }
    }
  }

  __device__ uint4 fetch(int m, bool inside) const {
    return p.residual && inside ? fetch_chunk(p.residual, m, at.N, at.n) : make_uint4(0, 0, 0, 0);
  }
  __device__ void row(int m, bool inside, bool, const float (&acc)[8], uint4 residual) {
    float r[8], z[8];
    unpack<T>(residual, r);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      z[i] = fmaf(scale[i], acc[i], shift[i]) + r[i];
      bits |= static_cast<uint32_t>(relu_gate(z[i])) << i;
    }
    if (inside) store_chunk(p.out, m, at.N, at.n, p.relu ? pack_relu<T>(z) : pack<T>(z));
    if (!p.mask) return;
    uint32_t word = (at.exists() ? bits : 0) << at.lane % 4 * 8;  // of the panel's 32 channels
    word |= __shfl_xor_sync(0xffffffffu, word, 1);
    word |= __shfl_xor_sync(0xffffffffu, word, 2);
    if (inside && at.lane % 4 == 0) p.mask[static_cast<int64_t>(at.n / kPanel) * at.M + m] = word;
  }
  __device__ void finish(uint32_t) {}
};

// kFills: whether pixels between those of a strided map are written too. kPads: whether the addend may be
// that of a padded shortcut.
template <typename T, class S, bool kFills = true, bool kPads = true>
struct AddShortcutEpilogue {
  using Params = AddShortcut;
  static constexpr bool kMapsA = false, kMapsOutput = true, kRescales = false;
  const Params& p;
  const PixelMap& map;
  const Place& at;
  float constant[8] = {};

  __device__ AddShortcutEpilogue(const Params& p, const PixelMap& map, const Place& at)
      : p(p), map(map), at(at) {
    if (p.constant) load_vector(p.constant, at.channel(), constant);
  }

  // addend * mask at a pixel of the output
  __device__ uint4 shortcut(int64_t pixel) const {
    if (!p.addend) return make_uint4(0, 0, 0, 0);
    if (kPads && p.from.stride.divisor) {
      const Pixel x = split(static_cast<uint32_t>(pixel), p.from.H, p.from.W);
      const uint32_t i = divide(x.h, p.from.stride), j = divide(x.w, p.from.stride);
      const uint32_t stride = p.from.stride.divisor;
      if (i * stride != x.h || j * stride != x.w) return make_uint4(0, 0, 0, 0);
      pixel = (x.image * p.from.high + i) * p.from.wide + j;
    }
    const int n = at.n + (kPads ? p.from.offset : 0);
    const uint4 chunk = fetch_chunk(p.addend, pixel, kPads ? p.from.C : at.N, n);
    if (!p.mask) return chunk;
    const uint32_t word = __ldg(p.mask + static_cast<int64_t>(n / kPanel) * p.from.pixels + pixel);
    return keep_where(chunk, word >> n % kPanel);
  }
  __device__ int64_t pixel(int m) const { return kFills ? source_row(map, m) : output_row(map, m); }
  __device__ uint4 fetch(int m, bool inside) const {
    return inside ? shortcut(pixel(m)) : make_uint4(0, 0, 0, 0);
  }
  __device__ void row(int m, bool inside, bool, const float (&acc)[8], uint4 addend) {
    if (!inside) return;
    float a[8], z[8];
    unpack<T>(addend, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] = fmaf(p.scale, a[i], acc[i] + constant[i]);
    store_chunk(p.out, pixel(m), at.N, at.n, pack<T>(z));
  }
  // The pixels between those that the convolution has read wait for no accumulator: a loop of their own,
  // since `row` is there as often as a thread has rows.
  __device__ void finish(uint32_t) {
    if (!kFills || map.stride == 1 || !at.exists()) return;
    const int begin = at.m0 + at.warp_m * S::kWarpM, end = min(begin + S::kWarpM, at.M);
#pragma unroll 1
    for (int m = begin + at.lane / 8; m < end; m += 16) {
#pragma unroll 1
      for (int other = 1; other < map.stride * map.stride; ++other) {
        fill(m, end, other / map.stride, other % map.stride);
      }
    }
  }
  // Pixel (i, j) from each of four rows: loads before stores.
  __device__ void fill(int m, int end, int i, int j) const {
    int64_t to[4];
    uint4 chunk[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Pixel o = split(m + 4 * r, map.Ho, map.Wo);
      const int h = o.h * map.stride + i, w = o.w * map.stride + j;
      const bool inside = m + 4 * r < end && h < map.H && w < map.W;
      to[r] = inside ? (static_cast<int64_t>(o.image) * map.H + h) * map.W + w : -1;
      chunk[r] = inside ? shortcut(to[r]) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (to[r] >= 0) store_chunk(p.out, to[r], at.N, at.n, scaled(chunk[r]));
    }
  }
  __device__ uint4 scaled(uint4 chunk) const {
    if (p.scale == 1.0f) return chunk;
    float v[8];
    unpack<T>(chunk, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= p.scale;
    return pack<T>(v);
  }
};

// kMapped: whether outputs go through the map.
template <typename T, class S, bool kMapped = false>
struct GateSumsEpilogue {
  using Params = GateSums;
  static constexpr bool kMapsA = false, kMapsOutput = false, kRescales = false;
  const Params& p;
  const PixelMap& map;
  const Place& at;
  float constant[8] = {}, scale[8], shift[8], mean[8];
  float sums[2][8] = {};

  __device__ GateSumsEpilogue(const Params& p, const PixelMap& map, const Place& at)
      : p(p), map(map), at(at) {
    if (p.constant) load_vector(p.constant, at.channel(), constant);
    load_vector(p.scale, at.channel(), scale);
    load_vector(p.shift, at.channel(), shift);
    load_vector(p.mean, at.channel(), mean);
  }
  __device__ int64_t pixel(int m) const { return kMapped ? output_row(map, m) : m; }
  __device__ uint4 fetch(int m, bool inside) const {
    return inside ? fetch_chunk(p.u, pixel(m), at.N, at.n) : make_uint4(0, 0, 0, 0);
  }
  __device__ void row(int m, bool inside, bool, const float (&acc)[8], uint4 raw) {
    float u[8], z[8];
    unpack<T>(raw, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      z[i] = relu_gate(fmaf(scale[i], u[i], shift[i])) ? acc[i] + constant[i] : 0.0f;
    }
    const uint4 dz = pack<T>(z);
    if (!inside) return;
    store_chunk(p.out, pixel(m), at.N, at.n, dz);
    unpack<T>(dz, z);  // the sums are those of what is stored
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[0][i] += z[i];
      sums[1][i] = fmaf(z[i], u[i] - mean[i], sums[1][i]);
    }
  }
  __device__ void finish(uint32_t area) {
    add_lanes(sums[0]);
    add_lanes(sums[1]);
    ColumnSums<S>::put(area, at, sums);
    const int thread = threadIdx.y * 32 + threadIdx.x;
    for (int i = thread; i < 2 * S::kN; i += S::kThreads) {
      const int sum = i / S::kN, column = i % S::kN;
      if (at.n0 + column >= at.N) continue;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < S::kWarpsM; ++w) total += ColumnSums<S>::get(area, w, sum, column);
      p.partial[(static_cast<int64_t>(at.tile_m) * 2 + sum) * at.N + at.n0 + column] = total;
    }
  }
};

}  // namespace resnet_fused
