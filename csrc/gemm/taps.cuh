// dw[k, r, s, c] = sum over pixels m of dy[m, k] * x[source of m for (r, s), c]: the body of the k x k
// convolution's wgrad.
//
// dy passes through the ring of stages like any operand. x passes through a ring of its rows: a pixel is
// copied and transformed once for all taps, and a tap reads it by ldmatrix at a shifted address. Rows outside
// of the image are zeros elsewhere, columns outside of it the zeros between rows: relu(shift) is not 0.
// mma's A is x and its B dy, which stays in registers over all taps.
#pragma once

#include "gemm/mainloop.cuh"
#include "gemm/taps.h"

namespace resnet_fused {

__device__ inline void store_shared_word(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
__device__ inline void store_shared_float(uint32_t at, float v) { store_shared_word(at, __float_as_uint(v)); }

// A pixel of dy.
struct OutPixel {
  int image, i, j;

  template <class Params>
  __device__ OutPixel(const Params& p, int m) {
    const int row = divide(m, p.Q);
    j = m - row * p.Q.divisor;
    image = divide(row, p.P);
    i = row - image * p.P.divisor;
  }
};

// A block's taps.
struct Taps {
  int first, count;  // segments
  int per_row;       // segments of a row of the kernel

  template <class Params>
  __device__ Taps(const Params& p, int batch) {
    per_row = (p.S + kSegmentTaps - 1) / kSegmentTaps;
    first = batch * p.per_batch;
    count = min(p.per_batch, p.segments - first);
  }
  __device__ int row(int segment) const { return (first + segment) / per_row; }
  __device__ int column(int segment) const { return (first + segment) % per_row * kSegmentTaps; }
  __device__ int taps(int segment, int S) const {
    return segment < count ? min(kSegmentTaps, S - column(segment)) : 0;
  }
};

// x's way through the ring. A thread has a chunk of every kStep-th pixel, and transforms what it has copied.
template <class Tile, class Params>
struct RingSource {
  static constexpr int kAcross = Tile::kC / 8, kStep = Tile::kThreads / kAcross;

  const char* x;  // the thread's channels of pixel 0
  uint32_t own;   // the same of place 0, column 0
  int channel;
  int mine;      // the thread's pixel of every kStep
  int last_row;  // of the batch's taps, against a pixel's own
  int last_column;
  int copied,
      landed;       // one past the last pixel that is copied, and of the stage that comes after `transformed`
  int transformed;  // one past the last

  __device__ void begin(const Params& p, uint32_t ring, int c0, int first_row, int last_row_, int begin,
                        int thread) {
    const int chunk = thread % kAcross;
    channel = min(c0 + 8 * chunk, p.C - 8);
    x = static_cast<const char*>(p.x) + channel * 2;
    own = ring + p.ring.lead + chunk * 16;
    mine = thread / kAcross;
    // Two pixels side by side share banks where they are narrow: those four apart do not.
    if constexpr (kAcross == 4) mine = (mine & ~7) + (mine & 1) * 4 + (mine >> 1 & 3);
    last_row = last_row_ * p.dilation_h - p.padding_h;
    last_column = (p.S - 1) * p.dilation_w - p.padding_w;
    const OutPixel at(p, begin);
    const int y = at.i * p.stride_h + first_row * p.dilation_h - p.padding_h;
    transformed = copied = (at.image * p.H + min(max(y, 0), p.H)) * p.W;
    landed = -1;
  }

  // Copies what the taps of pixels up to m read and has not been copied.
  __device__ void load(const Params& p, int m) {
    const OutPixel at(p, m);
    const int y = at.i * p.stride_h + last_row;
    const int column = y < 0 ? 0 : y >= p.H ? p.W : min(max(at.j * stride(p) + last_column + 1, 0), p.W);
    const int end = (at.image * p.H + min(max(y, 0), p.H - 1)) * p.W + column;
    for (int pixel = copied + mine; pixel < end; pixel += kStep) {
      copy_async(place(p, pixel), x + 2 * static_cast<int64_t>(p.C) * pixel, 16);
    }
    copied = end;
    if (landed < 0) landed = end;
  }

  // On the stage after those transformed.
  template <class Prologue>
  __device__ void transform(const Params& p) {
    if constexpr (Prologue::kTransforms) {
      if (transformed < landed) {
        const Prologue prologue(p.prologue2, channel);
        for (int pixel = transformed + mine; pixel < landed; pixel += kStep) {
          const uint32_t at = place(p, pixel);
          store_shared(at, prologue(load_shared(at), {}, 0));
        }
      }
      transformed = landed;
      landed = copied;
    }
  }

 private:
  static __device__ int stride(const Params& p) { return p.stride_w.divisor; }
  __device__ uint32_t place(const Params& p, int pixel) const {
    const uint32_t row = divide(pixel, p.width), turned = row + p.padding_h;
    uint32_t column = pixel - row * p.W, phase = 0;
    if (stride(p) > 1) {
      const uint32_t step = divide(column, p.stride_w);
      phase = column - step * stride(p);
      column = step;
    }
    return own + (turned - divide(turned, p.ring.rows) * p.ring.rows.divisor) * p.ring.row_pitch +
           phase * p.ring.phase_pitch + column * Tile::kPitch;
  }
};

// Where the rows that a pixel's segments read are in the ring, a word each; column 0 and the pixel's own
// column are in it, a tap adds its own. A thread writes the words of one segment.
template <class Tile, class Params>
struct RowTable {
  static constexpr int kBytes = Tile::kPixels * 16;
  static_assert(Tile::kPixels * 4 <= Tile::kThreads, "a word a thread");

  uint32_t to, flip;  // the thread's word for the next stage; its sum with that of the stage after
  uint32_t ring;
  int m, end, row;  // the thread's pixel; its segment's row against the pixel's own

  __device__ void begin(const Params& p, const Taps& taps, uint32_t table, uint32_t ring_, int begin,
                        int end_, int thread) {
    to = table + thread * 4;
    flip = 2 * to + kBytes;
    ring = ring_;
    m = begin + thread / 4;
    end = thread < Tile::kPixels * 4 ? end_ : -1;
    row = taps.row(min(thread % 4, taps.count - 1)) * p.dilation_h - p.padding_h;
  }
  __device__ void write(const Params& p) {
    if (end < 0) return;
    const OutPixel at(p, m);
    const int y = at.i * p.stride_h + row;
    const uint32_t turned = at.image * p.H + y + p.padding_h;
    const uint32_t place =
        (turned - divide(turned, p.ring.rows) * p.ring.rows.divisor) * p.ring.row_pitch + at.j * Tile::kPitch;
    // Zeros have the banks of what they stand for.
    const bool exists = static_cast<uint32_t>(y) < static_cast<uint32_t>(p.H) && m < end;
    store_shared_word(to, ring + (exists ? place : p.ring.zeros + place % 128));
    m += Tile::kPixels;
    to = flip - to;
  }
};

template <const TapsTile& kTile>
struct TapsShape {
  static constexpr int kC = kTile.c, kK = kTile.k, kPixels = kTile.pixels, kThreads = kTile.threads();
  static constexpr int kPitch = kTile.pitch(), kWarpsC = kC / TapsTile::kWarpC;
  static constexpr int kFragments = TapsTile::kWarpK / 8;  // of a warp's tap, along k
  static constexpr TapsTile kShape = kTile;
  static_assert(kPitch / 16 % 2 == 1, "eight pixels side by side take different banks");
};

template <typename T, class S, class Dy, class X>
struct TapsKernel {
  using Params = TapsParams<typename Dy::Params, typename X::Params>;
  using TileDy = SharedTile<S::kPixels, S::kK, S::kThreads>;
  using BytesDy = OperandBytes<TileDy, Dy>;
  using SourceDy = DownRows<TileDy, BytesDy>;
  using SourceX = RingSource<S, Params>;
  static constexpr int kStageBytes = BytesDy::kBytes;
  static constexpr int kTable = kStages * kStageBytes, kRing = kTable + taps_table_bytes(S::kShape);
  static_assert(kRing == taps_stage_bytes(S::kShape, {BytesDy::kHasSecond, BytesDy::kHasMask}) &&
                    kRing % 128 == 0,
                "what the plan counts");
  static_assert(sizeof(Params) <= kMaxParams, "a step's params");

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int warp_c = warp % S::kWarpsC * TapsTile::kWarpC, warp_k = warp / S::kWarpsC * TapsTile::kWarpK;

    const Taps taps(p, blockIdx.x % p.batches);
    const int tile = blockIdx.x / p.batches, k0 = tile / p.tiles_c * S::kK;
    // Channels of x that have a group in common with the tile's.
    const int first_group = divide(k0, p.group_k), last_group = divide(min(k0 + S::kK, p.K) - 1, p.group_k);
    const int c0 = first_group * p.group_c + tile % p.tiles_c * S::kC;
    if (c0 >= (last_group + 1) * p.group_c) return;
    const int begin = blockIdx.y * p.per_split;
    const int end = blockIdx.y == gridDim.y - 1 ? p.M : begin + p.per_split;

    for (int i = thread * 16; i < p.ring.bytes; i += S::kThreads * 16) {
      store_shared(base + kRing + i, make_uint4(0, 0, 0, 0));
    }
    __syncthreads();

    SourceDy dy;
    dy.begin(p.dy, p.K, k0, begin, end, thread);
    dy.template begin_prologue<Dy>(p.prologue, p.dy, k0, begin, p.M, thread);
    SourceX x;
    x.begin(p, base + kRing, c0, taps.row(0), taps.row(taps.count - 1), begin, thread);
    int loading = begin;
    auto load = [&](uint32_t slot, uint32_t next) {
      dy.load(slot, PixelMap{1}, thread);
      dy.load_mask(next, thread);
      loading += S::kPixels;
      x.load(p, min(loading, end) - 1);
    };
    int k = begin;
    RowTable<S, Params> table;
    table.begin(p, taps, base + kTable, base + kRing, begin, end, thread);
    auto transform = [&](uint32_t slot) {
      table.write(p);
      dy.template transform<Dy>(p.prologue, slot, k, thread);
      x.template transform<X>(p);
      k += S::kPixels;
    };

    const Fragments<TileDy, false, false> fragments(warp_k, lane);
    const uint32_t lane_row = (lane & 7) + (lane >> 4) * 8;
    uint32_t reading = base + kTable + lane_row * 16;
    const uint32_t flip = 2 * reading + RowTable<S, Params>::kBytes;
    const uint32_t lane_column = warp_c * 2 + (lane >> 3 & 1) * 16;
    uint32_t shift[kSegments][kSegmentTaps];
    int count[kSegments];
#pragma unroll
    for (int i = 0; i < kSegments; ++i) {
      count[i] = taps.taps(i, p.S);
#pragma unroll
      for (int t = 0; t < kSegmentTaps; ++t) {
        shift[i][t] = t < count[i] ? shift_of(p, taps.column(i) + t) : 0;
      }
    }
    Accumulators acc = {};
    auto product = [&](uint32_t slot) {
#pragma unroll
      for (int k16 = 0; k16 < S::kPixels / 16; ++k16) {
        const uint4 found = load_shared(reading + k16 * 16 * 16);
        const uint32_t rows[kSegments] = {found.x + lane_column, found.y + lane_column,
                                          found.z + lane_column};
        uint32_t b[2][4];
        fragments.load(b[0], slot, 0, k16);
        fragments.load(b[1], slot, 1, k16);
#pragma unroll
        for (int i = 0; i < kSegments; ++i) {
#pragma unroll
          for (int t = 0; t < kSegmentTaps; ++t) {
            if (t >= count[i]) break;
            uint32_t a[4];
            load_matrices<true>(a, rows[i] + shift[i][t]);
#pragma unroll
            for (int n = 0; n < S::kFragments; ++n) {
              Half<T>::mma(acc[i][t][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
          }
        }
      }
      reading = flip - reading;
    };
    dy.load_mask(base, thread);
    Pipeline<kStageBytes> pipeline(base, (end - begin + S::kPixels - 1) / S::kPixels, load, transform);
    pipeline.run_until(0, 0, load, transform, product);
    store(p, taps, acc, base + warp * kTapsStagingBytes, c0 + warp_c, k0 + warp_k, lane);
  }

 private:
  using Accumulators = float[kSegments][kSegmentTaps][S::kFragments][4];

  // From a pixel's word in the table to the tap in the column s of the kernel.
  static __device__ uint32_t shift_of(const Params& p, int s) {
    const int stride = p.stride_w.divisor, before = (p.padding_w + stride - 1) / stride;
    const int column = s * p.dilation_w - p.padding_w + before * stride, step = column / stride;
    return p.ring.lead + (column - step * stride) * p.ring.phase_pitch + (step - before) * S::kPitch;
  }

  // A warp's accumulators, c in rows, to [K, R * S, group_c]: through shared memory, tap by tap. c0 and k0
  // are the warp's.
  static __device__ void store(const Params& p, const Taps& taps, const Accumulators& acc, uint32_t area,
                               int c0, int k0, int lane) {
    constexpr int kRows = TapsTile::kWarpK / 8;  // of a lane: k
    float* to[kRows];                            // null: no such element
    const int row = lane / 4 % 2 * 4 + lane / 8;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = k0 + i * 8 + row,
                c = c0 + lane % 4 * 4 - static_cast<int>(divide(k, p.group_k)) * p.group_c;
      const bool exists = k < p.K && c >= 0 && c < p.group_c;
      const int64_t filter = blockIdx.y * static_cast<int64_t>(p.K) + k;
      to[i] = exists ? p.partial + filter * p.R * p.S * p.group_c + c : nullptr;
    }
    const uint32_t own = area + lane % 4 * 2 * kTapsStagingPitch + lane / 4 * 4;
    const uint32_t from = area + row * kTapsStagingPitch + lane % 4 * 16;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int t = 0; t < kSegmentTaps; ++t) {
        if (t >= taps.taps(s, p.S)) break;
        const int64_t tap = taps.row(s) * p.S + taps.column(s) + t;
#pragma unroll
        for (int n = 0; n < S::kFragments; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            store_shared_float(own + (n * 8 + i % 2) * kTapsStagingPitch + i / 2 * 32, acc[s][t][n][i]);
          }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float4 four = load_shared_floats(from + i * 8 * kTapsStagingPitch);
          if (to[i]) *reinterpret_cast<float4*>(to[i] + tap * p.group_c) = four;
        }
        __syncwarp();
      }
    }
  }
};

}  // namespace resnet_fused
