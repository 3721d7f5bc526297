// out[m, n] = sum over k of A[m, k] B[k, n]: the body of every kernel whose output has a row a pixel.
#pragma once

#include "gemm/epilogue.cuh"

namespace resnet_fused {

// Warps hand their accumulators on 16 rows at a time through shared memory of their own: floats, 64 columns,
// rows 272 bytes apart, which keeps both sides free of conflicts (see `spread`).
struct Staging {
  static constexpr int kRowBytes = 64 * 4 + 16, kBytes = 16 * kRowBytes;
  static_assert(kBytes == kStagingBytes, "what plans count");

  template <int kFragments>
  __device__ static void put(uint32_t area, int lane, const float (&c)[kFragments][4]) {
    static_assert(kFragments == 8, "64 columns");
    const int q = lane % 4;
    const uint32_t to = area + lane / 4 * kRowBytes + q % 2 * 8;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      const uint32_t at = to + spread(2 * n + q / 2) * 16;
      store_shared(at, c[n][0], c[n][1]);
      store_shared(at + 8 * kRowBytes, c[n][2], c[n][3]);
    }
  }
  __device__ static void get(uint32_t area, int row, int chunk, float (&v)[8]) {
    const float4 a = load_shared_floats(area + row * kRowBytes + spread(2 * chunk) * 16);
    const float4 b = load_shared_floats(area + row * kRowBytes + spread(2 * chunk + 1) * 16);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  }
};

// Hands a warp's accumulators to the epilogue, 16 rows at a time. area: the warp's own staging.
template <class S, class Epilogue>
__device__ void drain(Epilogue& epilogue, const Place& at, uint32_t area, const Accumulators<S>& acc) {
  constexpr int kRows = 4;  // rows of a thread in a group of 16
  const int first = at.m0 + at.warp_m * S::kWarpM + at.lane / 8;
  uint4 fetched[kRows];
  auto inside = [&](int group, int i) { return at.exists() && first + group * 16 + i * 4 < at.M; };
  auto fetch = [&](int group) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) fetched[i] = epilogue.fetch(first + group * 16 + i * 4, inside(group, i));
  };
  fetch(0);
#pragma unroll
  for (int group = 0; group < S::kGroupsM; ++group) {
    Staging::put(area, at.lane, acc.c[group]);
    __syncwarp();
    uint4 extra[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) extra[i] = fetched[i];
    if (group + 1 < S::kGroupsM) fetch(group + 1);  // in flight while this group is worked on
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float v[8];
      Staging::get(area, at.lane / 8 + i * 4, at.lane % 8, v);
      epilogue.row(first + group * 16 + i * 4, inside(group, i), group == 0 && i == 0, v, extra[i]);
    }
    __syncwarp();
  }
}

// First, Second: the prologues of A's one or two phases (Second = void: one). kTransposedB: B is [K, N], else
// [N, K].
template <typename T, class S, class First, class Second_, bool kTransposedB, class Epilogue>
struct RowsKernel {
  static constexpr bool kTwo = !std::is_void_v<Second_>;
  using Second = std::conditional_t<kTwo, Second_, Plain<T>>;
  using Params = RowsParams<typename First::Params, typename Second::Params, typename Epilogue::Params>;
  using TileA = SharedTile<S::kM, S::kK, S::kThreads>;
  using TileB = std::conditional_t<kTransposedB, SharedTile<S::kK, S::kN, S::kThreads>,
                                   SharedTile<S::kN, S::kK, S::kThreads>>;
  using BytesA = OperandBytes<TileA, First, Second>;
  using BytesB = OperandBytes<TileB, Plain<T>>;
  using SourceA = AlongRows<TileA, BytesA>;
  using SourceB = std::conditional_t<kTransposedB, DownRows<TileB, BytesB>, AlongRows<TileB, BytesB>>;
  static constexpr int kStageBytes = BytesA::kBytes + BytesB::kBytes;
  static_assert(!kTwo || !BytesA::kHasSecond, "both phases copy the same kinds of tile, but for the mask");
  static constexpr int kShared = kStages * kStageBytes;
  static constexpr int kStaging = S::kThreads / 32 * Staging::kBytes;
  static_assert(kStaging + ColumnSums<S>::kBytes <= kShared, "the epilogue takes over the ring");
  static_assert(S::kWarpN == 64, "Staging");
  static_assert(kShared == shared_bytes(S::kShape, {BytesA::kHasSecond, BytesA::kHasMask}),
                "what the plan counts");
  static_assert(sizeof(Params) <= kMaxParams, "a step's params");

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int tiles_n = (p.N + S::kN - 1) / S::kN;
    const int tile_m = blockIdx.x / tiles_n, n0 = blockIdx.x % tiles_n * S::kN;
    const Place at{p.M,
                   p.N,
                   n0 + warp / S::kWarpsM * S::kWarpN + lane % 8 * 8,
                   lane,
                   warp % S::kWarpsM,
                   warp / S::kWarpsM,
                   tile_m * S::kM,
                   n0,
                   tile_m};
    Accumulators<S> acc;
    accumulate(p, at, base, thread, acc);
    Epilogue epilogue(p.epilogue, p.map, at);
    drain<S>(epilogue, at, base + warp * Staging::kBytes, acc);
    epilogue.finish(base + kStaging);
  }

 private:
  static __device__ void begin_b(SourceB& b, const Params& p, const Phase& phase, int n0, int thread) {
    if constexpr (kTransposedB) {
      b.begin(phase.b, p.N, n0, 0, phase.K, thread);
    } else {
      b.begin(phase.b, phase.K, n0, p.N, PixelMap{1}, thread);
    }
  }
  template <class Prologue>
  static __device__ void begin_a(SourceA& a, const Params& p, const typename Prologue::Params& prologue,
                                 const Phase& phase, bool last, int m0, int thread) {
    if (kMapsA && last) {
      a.begin(phase.a, phase.K, m0, p.M, p.map, thread);
    } else {
      a.begin(phase.a, phase.K, m0, p.M, PixelMap{1}, thread);
    }
    a.template begin_prologue<Prologue>(prologue, phase.a, thread);
  }
  static constexpr bool kMapsA = Epilogue::kMapsA || (kTwo && Epilogue::kMapsOutput);

  static __device__ void accumulate(const Params& p, const Place& at, uint32_t base, int thread,
                                    Accumulators<S>& acc) {
    const int tiles = (p.phase[0].K + S::kK - 1) / S::kK;
    const int all = tiles + (kTwo ? (p.phase[1].K + S::kK - 1) / S::kK : 0);
    SourceA a;
    SourceB b;
    begin_a<First>(a, p, p.prologue, p.phase[0], !kTwo, at.m0, thread);
    begin_b(b, p, p.phase[0], at.n0, thread);
    auto second_phase = [&] {
      begin_a<Second>(a, p, p.prologue2, p.phase[1], true, at.m0, thread);
      begin_b(b, p, p.phase[1], at.n0, thread);
    };
    // What the loop would compute every time from the channels, which such an epilogue keeps at hand.
    int64_t step = 0;
    if constexpr (kTransposedB && Epilogue::kMapsOutput) keep_in_register(step = b.step());
    auto load = [&](uint32_t slot, uint32_t next) {
      const int bytes = a.load(slot, thread);
      a.load_mask(next, thread);
      if constexpr (kTransposedB && Epilogue::kMapsOutput) {
        b.load(slot + BytesA::kBytes, PixelMap{1}, thread, step);
      } else if constexpr (kTransposedB) {
        b.load(slot + BytesA::kBytes, PixelMap{1}, thread);
      } else {
        b.load(slot + BytesA::kBytes, thread, bytes);
      }
    };
    int filled = 0;
    auto fill = [&](uint32_t slot, uint32_t next) {
      if (kTwo && filled++ == tiles) second_phase();
      load(slot, next);
    };
    int k = 0;
    auto first = [&](uint32_t slot) {
      SourceA::template transform<First>(p.prologue, slot, k, p.phase[0].K, thread);
      k += S::kK;
    };
    int k2 = 0;
    auto second = [&](uint32_t slot) {
      SourceA::template transform<Second>(p.prologue2, slot, k2, p.phase[1].K, thread);
      k2 += S::kK;
    };
    const Fragments<TileA, true, true> fa(at.warp_m * S::kWarpM, at.lane);
    const Fragments<TileB, false, !kTransposedB> fb(at.warp_n * S::kWarpN, at.lane);
    auto product = [&](uint32_t slot) { multiply<T>(acc, fa, fb, slot, slot + BytesA::kBytes); };

    a.load_mask(base, thread);
    Pipeline<kStageBytes> pipeline(base, all, fill, first);
    if constexpr (!kTwo) {
      pipeline.run_until(0, 0, load, first, product);
    } else {
      // Copies are kAhead tiles ahead of the products, prologues one: each changes phase in its own time, and
      // between loops, whose bodies stay free of it.
      constexpr int kAhead = kStages - 1, kEarly = Second::kTransforms ? 1 : 0;
      const int later = all - tiles;  // tiles of the second phase
      pipeline.run_until(later + min(kAhead, tiles), later, load, first, product);
      if (tiles >= kAhead) second_phase();  // else the fill has begun it
      pipeline.run_until(later + kEarly, later, load, first, product);
      if constexpr (Epilogue::kRescales) {
        static_assert(!kEarly, "the first product is complete when it is rescaled");
        Epilogue::rescale(p.epilogue, acc, at.n0 + at.warp_n * S::kWarpN, p.N, at.lane);
      }
      pipeline.run_until(0, 0, load, second, product);
    }
  }
};

}  // namespace resnet_fused
