// out[m, n] = sum over taps and channels: the body of fprop and dgrad of k x k convolutions. See taps.h.
#pragma once

#include "gemm/halo.cuh"
#include "gemm/rows.cuh"

namespace resnet_fused {

// Where the loop stands in a phase's taps.
struct Tap {
  int rows, cols;          // left, the present ones included
  int shift = 0;           // pixels from the first tap
  uint32_t bits = kFirst;  // its row and column
  static constexpr uint32_t kFirst = 1u << kMaxTapRows | 1u;

  __device__ explicit Tap(const TapsPhase& p) : rows(p.rows), cols(p.cols) {}
  __device__ bool is_first() const { return bits == kFirst; }
  // On to the next; true where that is the first tap again.
  __device__ bool next(const TapsSource& s, const TapsPhase& p) {
    shift += s.step_col;
    bits += bits & 0xffff0000u;
    if (--cols) return false;
    cols = p.cols;
    shift += s.step_row * s.W - cols * s.step_col;
    bits = (bits & 0xffffu) << 1 | 1u << kMaxTapRows;
    if (--rows) return false;
    *this = Tap(p);
    return true;
  }
};

// A block's weights, tap by tap of a slice of channels. kTransposed: c runs down the tile's rows ([c, n],
// dgrad), else along them ([n, c], fprop).
template <class Tile, bool kTransposed>
class TapsWeights {
 public:
  __device__ TapsWeights(const TapsWeight& w, const TapsPhase& phase, int n0, int N, int first_channel,
                         int thread) {
    limit_ = w.group_c, rows_ = phase.rows, cols_ = phase.cols + 1;
    const int own = 8 * Tile::chunk(thread);
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) {
      int n, c;  // of the chunk's first element
      if constexpr (kTransposed) {
        n = min(n0 + own, N - 8), c = first_channel + Tile::row(thread, i);
      } else {
        n = min(n0 + Tile::row(thread, i), N - 1), c = first_channel + own;
      }
      const int group = n / w.group_n;
      channel_[i] = c - group * w.group_c;
      // An element's channel in its group is what the weight has, of output channel n or, in a dgrad, c.
      const int64_t at = kTransposed ? static_cast<int64_t>(c) * w.channel + n - group * w.group_n
                                     : static_cast<int64_t>(n) * w.channel + channel_[i];
      row_[i] = static_cast<const char*>(w.w) + (at + phase.weight - w.col) * 2;
    }
    col_step_ = w.col * 2;
    row_step_ = (w.row - phase.cols * w.col) * 2;
    slice_step_ = kSliceChannels * (kTransposed ? w.channel : 1) * 2 - phase.rows * w.row * 2;
  }

  __device__ void load(uint32_t slot, const TapsPhase& phase, int thread) {
    next(phase);
    const uint32_t to = slot + Tile::own(thread, 0);
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) {
      const int bytes = static_cast<uint32_t>(channel_[i]) < static_cast<uint32_t>(limit_) ? 16 : 0;
      copy_async(to + i * Tile::kStep * Tile::kRowBytes, row_[i], bytes);
    }
  }

 private:
  // On to the next tap: before its copies, for which the pointers then are where they are.
  __device__ void next(const TapsPhase& phase) {
    move(col_step_);
    if (--cols_) return;
    cols_ = phase.cols;
    move(row_step_);
    if (--rows_) return;
    rows_ = phase.rows;
    move(slice_step_);
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) channel_[i] += kSliceChannels;
  }
  __device__ void move(int step) {
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) row_[i] += step;
  }

  const char* row_[Tile::kCount];
  int channel_[Tile::kCount], limit_;  // within the group: outside of it the element is 0
  int col_step_, row_step_, slice_step_;
  int rows_, cols_;  // left
};

// kStride: of the source, from one output to the next.
template <typename T, class S, class Prologue, bool kTransposedB, class Epilogue, int kStride = 1>
struct TapsKernel {
  using Params = TapsParams<typename Prologue::Params, typename Epilogue::Params>;
  using TileB = std::conditional_t<kTransposedB, SharedTile<S::kK, S::kN, S::kThreads>,
                                   SharedTile<S::kN, S::kK, S::kThreads>>;
  using Source = HaloSource<Prologue, S::kThreads, kStride>;
  static constexpr int kRing = kStages * TileB::kBytes;
  static constexpr int kStaging = S::kThreads / 32 * Staging::kBytes;
  static_assert(kStaging + ColumnSums<S>::kBytes == taps_epilogue_bytes(S::kShape), "what the plan counts");
  static constexpr int kSpread =
      4;  // steps: few, since each that copies or transforms costs some instructions
  static_assert(S::kK == kSliceChannels && S::kWarpN == 64);
  static_assert(sizeof(Params) <= kMaxParams, "a step's params");

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int tiles_n = (p.N + S::kN - 1) / S::kN;
    const int tile = blockIdx.x / tiles_n, n0 = blockIdx.x % tiles_n * S::kN;
    int number = 0;
    while (number + 1 < p.phases && tile >= p.phase[number + 1].tile) ++number;
    const TapsPhase& phase = p.phase[number];
    const Place at{phase.M,
                   p.N,
                   n0 + warp / S::kWarpsM * S::kWarpN + lane % 8 * 8,
                   lane,
                   warp % S::kWarpsM,
                   warp / S::kWarpsM,
                   (tile - phase.tile) * S::kM,
                   n0,
                   tile};
    Accumulators<S> acc;
    accumulate(p, phase, at, base, thread, acc);
    const PixelMap map{p.out_stride, p.out_H, p.out_W, phase.P, phase.Q, phase.first};
    Epilogue epilogue(p.epilogue, map, at);
    drain<S>(epilogue, at, base + warp * Staging::kBytes, acc);
    epilogue.finish(base + kStaging);
  }

 private:
  static __device__ void accumulate(const Params& p, const TapsPhase& phase, const Place& at, uint32_t base,
                                    int thread, Accumulators<S>& acc) {
    // The channels that this block's groups read.
    const int first_group = at.n0 / p.weight.group_n, last_n = min(at.n0 + S::kN, p.N) - 1;
    const int first = first_group * p.weight.group_c,
              end = (last_n / p.weight.group_n + 1) * p.weight.group_c;
    const int taps = phase.rows * phase.cols, slices = (end - first + kSliceChannels - 1) / kSliceChannels;
    const Window window = window_of(p.source, phase, at.m0, S::kM);
    const uint32_t ring = base + kZeroBytes, halos = ring + kRing;
    const uint32_t halo_size = p.shared.halo * kPixelBytes;
    const uint32_t seconds = halos + p.shared.buffers * halo_size,
                   end_shared = seconds + p.shared.seconds * halo_size;
    auto after = [&](uint32_t buffer) { return buffer + halo_size == seconds ? halos : buffer + halo_size; };
    auto second_after = [&](uint32_t buffer) {
      return buffer + halo_size == end_shared ? seconds : buffer + halo_size;
    };

    if (thread < kZeroBytes / 16) store_shared(base + thread * 16, make_uint4(0, 0, 0, 0));
    Source source(p.source, p.prologue, p.shared, window, first, end, thread);
    TapsWeights<TileB, kTransposedB> weights(p.weight, phase, at.n0, p.N, first, thread);
    HaloFragments<S, kStride> fa(p.source, phase, window, p.shared.halo, base, at.m0 + at.warp_m * S::kWarpM,
                                 at.lane);
    const Fragments<TileB, false, !kTransposedB> fb(at.warp_n * S::kWarpN, at.lane);

    // A slice's halo comes while the one before is multiplied, some rounds a tap, and is transformed in the
    // step after its last copies, so the last tap copies nothing. With one tap, halos come two slices ahead.
    const int rounds = source.rounds(), spread = min(taps - 1, kSpread);
    const int piece = taps > 2 ? (rounds + spread - 1) / spread : rounds;
    HaloCursor loading = source.begin(halos, seconds, 0), transforming = loading;
    auto next_slice = [&](HaloCursor& c) {
      c = source.begin(after(c.buffer), second_after(c.second), c.slice + kSliceChannels);
      if (c.slice >= slices * kSliceChannels) c.left = 0;
    };
    auto load_slice = [&] {
      source.rewind();
      next_slice(loading);
    };
    auto transform_first = [&](uint32_t) {
      HaloCursor first = source.begin(halos, seconds, 0);
      source.transform(first, rounds);
    };
    int begun = 0;
    auto begin = [&](uint32_t slot, uint32_t) {
      weights.load(slot, phase, thread);
      if (begun > 0 && taps > 1) return;
      if (begun++ > 0) load_slice();
      source.load(loading, loading.left);
    };
    Pipeline<TileB::kBytes> pipeline(ring, taps * slices, begin, transform_first);

    Tap tap(phase);
    int copied = 0, before = 0;  // rounds whose last copies are of this step of the loop, of the one before
    if (taps == 1 && slices > 1) {
      before = rounds;
      next_slice(transforming);
    }
    auto load = [&](uint32_t slot, uint32_t) {
      weights.load(slot, phase, thread);
      if (tap.is_first()) load_slice();
      if (loading.left == 0) return;
      source.load(loading, min(piece, loading.left));
      if (loading.left == 0) copied = rounds;
    };
    auto transform = [&](uint32_t) {
      if (before) source.transform(transforming, before);
      before = copied, copied = 0;
      if (tap.is_first()) next_slice(transforming);  // it has begun to come
    };
    uint32_t halo = halos;
    pipeline.run_until(0, 0, load, transform, [&](uint32_t slot) {
      fa.turn(halo, tap.shift, tap.bits);
      multiply<T>(acc, fa, fb, 0, slot);
      if (tap.next(p.source, phase)) halo = after(halo);
    });
  }
};

}  // namespace resnet_fused
