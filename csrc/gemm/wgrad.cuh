// dw[k, r, s, c] = sum over pixels m of dy[m, k] * x[source of m for (r, s), c]: the body of the k x k
// convolution's wgrad.
//
// dy passes through the ring of stages like any operand. x passes through a ring of its rows: a pixel is
// copied and transformed once for all taps, and a tap reads it by ldmatrix at a shifted address. Rows outside
// of the image are zeros elsewhere, columns outside of it the zeros between rows: relu(shift) is not 0.
// mma's A is x and its B dy, which stays in registers over all taps.
#pragma once

#include "gemm/mainloop.cuh"
#include "gemm/shared_prologue.cuh"
#include "gemm/wgrad.h"

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
struct TapBatch {
  int first, count;  // segments
  int per_row;       // segments of a row of the kernel

  template <class Params>
  __device__ TapBatch(const Params& p, int batch) {
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

// Every kStep-th pixel of x, and its place in the ring.
template <class Tile>
struct RingWalk {
  static constexpr int kStep = wgrad_step(Tile::kShape);
  int pixel, column;
  uint32_t row;  // bytes from the ring's begin

  template <class Params>
  __device__ void begin(const Params& p, int first) {
    pixel = first;
    const uint32_t y = divide(pixel, p.width), turned = y + p.padding_h;
    column = pixel - y * p.W;
    row = (turned - divide(turned, p.ring.rows) * p.ring.rows.divisor) * p.ring.row_pitch;
  }
  template <class Params>
  __device__ void next(const Params& p) {
    pixel += kStep;
    column += p.ring.step_columns;
    row += p.ring.step_rows;
    if (column >= p.W) column -= p.W, row += p.ring.row_pitch;
    if (row >= p.ring.rows.divisor * p.ring.row_pitch) row -= p.ring.rows.divisor * p.ring.row_pitch;
  }
  template <class Params>
  __device__ uint32_t place(const Params& p) const {
    const int step = column * p.ring.inverse >> 16;
    return row + column * p.ring.phase_pitch + step * p.ring.back;
  }
};

// x's way through the ring. A thread has a chunk of every kStep-th pixel, and transforms what it has copied.
template <class Tile, class Params>
struct RingSource {
  static constexpr int kAcross = Tile::kC / 8, kStep = RingWalk<Tile>::kStep;

  RingWalk<Tile> copying, transforming;
  const char* from;    // what is copied next
  uint32_t own;        // the thread's chunk of the ring's first pixel
  int copied, landed;  // one past the last pixel: of the last stage, and of the next to be transformed
  int row, column;     // of the batch's last tap, against a pixel's own

  __device__ void begin(const Params& p, uint32_t ring, int c0, int first_row, int last_row, int begin,
                        int thread) {
    const int chunk = thread % kAcross;
    const int channel = min(c0 + 8 * chunk, p.C - 8);
    own = ring + p.ring.lead + chunk * 16;
    row = last_row * p.dilation_h - p.padding_h;
    column = (p.S - 1) * p.dilation_w - p.padding_w;
    const OutPixel at(p, begin);
    const int y = at.i * p.stride_h + first_row * p.dilation_h - p.padding_h;
    int pixel = thread / kAcross;
    // Two pixels side by side share banks where they are narrow: those four apart do not.
    if constexpr (kAcross == 4) pixel = (pixel & ~7) + (pixel & 1) * 4 + (pixel >> 1 & 3);
    pixel += (at.image * p.H + min(max(y, 0), p.H)) * p.W;
    copying.begin(p, pixel);
    transforming = copying;
    from = static_cast<const char*>(p.x) + 2 * (static_cast<int64_t>(p.C) * pixel + channel);
    landed = -1;
  }

  // Copies what the taps of pixels up to m read and has not been copied.
  __device__ void load(const Params& p, int m) {
    const OutPixel at(p, m);
    const int y = at.i * p.stride_h + row;
    const int x = at.j * static_cast<int>(p.stride_w.divisor) + column + 1;
    const int columns = y < 0 ? 0 : y >= p.H ? p.W : min(max(x, 0), p.W);
    copied = (at.image * p.H + min(max(y, 0), p.H - 1)) * p.W + columns;
    if (landed < 0) landed = copied;
    const int64_t step = static_cast<int64_t>(p.C) * (2 * kStep);
#pragma unroll 1
    for (; copying.pixel < copied; copying.next(p)) {
      copy_async(own + copying.place(p), from, 16);
      from += step;
    }
  }

  // On the next stage.
  template <class Prologue>
  __device__ void transform(const Params& p, uint32_t coefficients) {
    if constexpr (Prologue::kTransforms) {
#pragma unroll 1
      while (transforming.pixel < landed) {
        const uint32_t first = own + transforming.place(p);
        transforming.next(p);
        const bool two = transforming.pixel < landed;
        const uint32_t second = two ? own + transforming.place(p) : first;
        uint4 x[2] = {load_shared(first), load_shared(second)};
        Prologue::apply(coefficients, x);
        store_shared(first, x[0]);
        if (!two) break;
        store_shared(second, x[1]);
        transforming.next(p);
      }
      landed = copied;
    }
  }
};

// Where the rows that a pixel's segments read are in the ring, a word each; column 0 and the pixel's own
// column are in it, a tap adds its own. A thread writes the words of one segment.
template <class Tile, class Params>
struct RowTable {
  static constexpr int kBytes = Tile::kPixels * 16, kThreads = Tile::kPixels * 4;
  static_assert(kThreads <= Tile::kThreads, "a word a thread");

  uint32_t to;  // the thread's word
  int m, row;   // its pixel in the next stage; its segment's row against the pixel's own

  __device__ void begin(const Params& p, const TapBatch& taps, uint32_t table, int begin, int thread) {
    to = table + thread * 4;
    m = begin + thread / 4;
    row = taps.row(min(thread % 4, taps.count - 1)) * p.dilation_h - p.padding_h;
  }
  // turn: which of the two stages.
  __device__ void write(const Params& p, uint32_t ring, uint32_t turn, int end, int thread) {
    if (kThreads < Tile::kThreads && thread >= kThreads) return;
    const OutPixel at(p, m);
    const int y = at.i * p.stride_h + row;
    const uint32_t turned = at.image * p.H + y + p.padding_h;
    const uint32_t place =
        (turned - divide(turned, p.ring.rows) * p.ring.rows.divisor) * p.ring.row_pitch + at.j * Tile::kPitch;
    // Zeros have the banks of what they stand for.
    const bool exists = static_cast<uint32_t>(y) < static_cast<uint32_t>(p.H) && m < end;
    store_shared_word(to + turn, ring + (exists ? place : p.ring.zeros + place % 128));
    m += Tile::kPixels;
  }
};

template <const WgradTile& kTile>
struct WgradShape {
  static constexpr int kC = kTile.c, kK = kTile.k, kPixels = kTile.pixels, kThreads = kTile.threads();
  static constexpr int kPitch = kTile.pitch(), kWarpsC = kC / WgradTile::kWarpC;
  static constexpr int kFragments = WgradTile::kWarpK / 8;  // of a warp's tap, along k
  static constexpr WgradTile kShape = kTile;
  static_assert(kPitch / 16 % 2 == 1, "eight pixels side by side take different banks");
};

template <typename T, class S, template <typename, int> class DyOf, template <typename, int> class XOf>
struct WgradKernel {
  using Dy = DyOf<T, S::kK>;
  using X = XOf<T, S::kC>;
  using Params = WgradParams<typename Dy::Params, typename X::Params>;
  using TileDy = SharedTile<S::kPixels, S::kK, S::kThreads>;
  using BytesDy = OperandBytes<TileDy, Dy>;
  using SourceDy = DownRows<TileDy, BytesDy>;
  using SourceX = RingSource<S, Params>;
  static constexpr int kStageBytes = BytesDy::kBytes;
  static constexpr int kTable = kStages * kStageBytes, kVectorsDy = kTable + wgrad_table_bytes(S::kShape);
  static constexpr int kVectorsX = kVectorsDy + kWgradVectorsDy * S::kK * 4,
                       kRing = kVectorsX + kWgradVectorsX * S::kC * 4;
  static_assert(kRing == wgrad_stage_bytes(S::kShape, {BytesDy::kHasSecond, BytesDy::kHasMask}) &&
                    kRing % 128 == 0,
                "what the plan counts");
  static_assert(sizeof(Params) <= kMaxParams, "a step's params");

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int warp_c = warp % S::kWarpsC * WgradTile::kWarpC, warp_k = warp / S::kWarpsC * WgradTile::kWarpK;

    const TapBatch taps(p, blockIdx.x % p.batches);
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
    put_coefficients<Dy, S::kK>(p.prologue, base + kVectorsDy, k0, p.K, thread);
    put_coefficients<X, S::kC>(p.prologue2, base + kVectorsX, c0, p.C, thread);
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
    table.begin(p, taps, base + kTable, begin, thread);
    uint32_t turn = 0;  // of the table's two stages
    auto transform = [&](uint32_t slot) {
      table.write(p, base + kRing, turn, end, thread);
      turn ^= RowTable<S, Params>::kBytes;
      transform_dy(p, base + kVectorsDy + thread % TileDy::kAcross * 16, slot, k, end, thread);
      x.template transform<X>(p, base + kVectorsX + thread % SourceX::kAcross * 16);
      k += S::kPixels;
    };

    const Fragments<TileDy, false, false> fragments(warp_k, lane);
    const uint32_t lane_row = (lane & 7) + (lane >> 4) * 8;
    const uint32_t words = base + kTable + lane_row * 16;
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
    const bool whole = min(count[0], min(count[1], count[2])) == kSegmentTaps;
    uint32_t reading = 0;
    auto multiply = [&](uint32_t slot) {
      auto step = [&](int k16, auto known) {
        const uint4 rows = load_shared(words + reading + k16 * 16 * 16);
        const uint32_t row[kSegments] = {rows.x + lane_column, rows.y + lane_column, rows.z + lane_column};
        uint32_t b[2][4];
        fragments.load(b[0], slot, 0, k16);
        fragments.load(b[1], slot, 1, k16);
#pragma unroll
        for (int i = 0; i < kSegments; ++i) {
#pragma unroll
          for (int t = 0; t < kSegmentTaps; ++t) {
            if (!decltype(known)::value && t >= count[i]) break;
            uint32_t a[4];
            load_matrices<true>(a, row[i] + shift[i][t]);
#pragma unroll
            for (int n = 0; n < S::kFragments; ++n) {
              Half<T>::mma(acc[i][t][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
          }
        }
      };
      if (whole) {
#pragma unroll
        for (int k16 = 0; k16 < S::kPixels / 16; ++k16) step(k16, std::true_type());
      } else {
#pragma unroll 1
        for (int k16 = 0; k16 < S::kPixels / 16; ++k16) step(k16, std::false_type());
      }
      reading ^= RowTable<S, Params>::kBytes;
    };
    dy.load_mask(base, thread);
    Pipeline<kStageBytes> pipeline(base, (end - begin + S::kPixels - 1) / S::kPixels, load, transform);
    // Two warps share a scheduler: one transforms while the other multiplies.
    const bool late = S::kThreads == 256 && warp >= 4;
    auto product = [&](uint32_t slot) {
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if ((turn == 1) != late) {
          multiply(slot);
        } else if (k < end) {
          transform(slot == base + (kStages - 1) * kStageBytes ? base : slot + kStageBytes);
        }
      }
    };
    pipeline.run_until(0, 0, load, [](uint32_t) {}, product);
    store(p, taps, acc, base + warp * kWgradStagingBytes, c0 + warp_c, k0 + warp_k, lane);
  }

 private:
  using Accumulators = float[kSegments][kSegmentTaps][S::kFragments][4];

  static __device__ void transform_dy(const Params& p, uint32_t own, uint32_t slot, int k, int end,
                                      int thread) {
    if constexpr (Dy::kTransforms) {
      const int row = TileDy::row(thread, 0), chunk = TileDy::chunk(thread);
      const uint32_t at = slot + TileDy::own(thread, 0);
      const uint32_t word = slot + BytesDy::kMask + (chunk / 4 * BytesDy::kPanelWords + row) * 4 + chunk % 4;
      uint4 dy[TileDy::kCount], u[TileDy::kCount];
      uint32_t bits[TileDy::kCount] = {};
#pragma unroll
      for (int i = 0; i < TileDy::kCount; ++i) {
        dy[i] = load_shared(at + i * TileDy::kStep * TileDy::kRowBytes);
        u[i] = load_shared(at + i * TileDy::kStep * TileDy::kRowBytes + BytesDy::kSecond);
        if (Dy::mask(p.prologue)) bits[i] = load_shared_byte(word + i * TileDy::kStep * 4);
      }
      Dy::apply(p.prologue, own, dy, u, bits);
#pragma unroll
      for (int i = 0; i < TileDy::kCount; ++i) {
        if (k + row + i * TileDy::kStep < end)
          store_shared(at + i * TileDy::kStep * TileDy::kRowBytes, dy[i]);
      }
    }
  }

  // From a pixel's word in the table to the tap in the column s of the kernel.
  static __device__ uint32_t shift_of(const Params& p, int s) {
    const int stride = p.stride_w.divisor, before = (p.padding_w + stride - 1) / stride;
    const int column = s * p.dilation_w - p.padding_w + before * stride, step = column / stride;
    return p.ring.lead + (column - step * stride) * p.ring.phase_pitch + (step - before) * S::kPitch;
  }

  // A warp's accumulators, c in rows, to [K, R * S, group_c]: through shared memory, tap by tap. c0 and k0
  // are the warp's.
  static __device__ void store(const Params& p, const TapBatch& taps, const Accumulators& acc, uint32_t area,
                               int c0, int k0, int lane) {
    constexpr int kRows = WgradTile::kWarpK / 8;  // of a lane: k
    float* to[kRows];                             // null: no such element
    const int row = lane / 4 % 2 * 4 + lane / 8;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int k = k0 + i * 8 + row,
                c = c0 + lane % 4 * 4 - static_cast<int>(divide(k, p.group_k)) * p.group_c;
      const bool exists = k < p.K && c >= 0 && c < p.group_c;
      const int64_t filter = blockIdx.y * static_cast<int64_t>(p.K) + k;
      to[i] = exists ? p.partial + filter * p.R * p.S * p.group_c + c : nullptr;
    }
    const uint32_t own = area + lane % 4 * 2 * kWgradStagingPitch + lane / 4 * 4;
    const uint32_t from = area + row * kWgradStagingPitch + lane % 4 * 16;
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
            store_shared_float(own + (n * 8 + i % 2) * kWgradStagingPitch + i / 2 * 32, acc[s][t][n][i]);
          }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float4 four = load_shared_floats(from + i * 8 * kWgradStagingPitch);
          if (to[i]) *reinterpret_cast<float4*>(to[i] + tap * p.group_c) = four;
        }
        __syncwarp();
      }
    }
  }
};

}  // namespace resnet_fused
