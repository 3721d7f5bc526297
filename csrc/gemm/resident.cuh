// A `rows` kernel for short k and long n, as expand has: a block copies and transforms its rows of A once,
// all of k, and walks over its columns with B passing through the ring. The epilogue of one tile runs while
// copies of the next are in flight. A is read from L2 once instead of once a tile of n, and transformed once.
#pragma once

#include "gemm/rows.cuh"

namespace resnet_fused {

template <typename T, class S, class Prologue, class Epilogue>
struct ResidentKernel {
  using Params = RowsParams<typename Prologue::Params, Nothing, typename Epilogue::Params>;
  using TileA = SharedTile<S::kM, S::kK, S::kThreads>;
  using TileB = SharedTile<S::kN, S::kK, S::kThreads>;
  using BytesA = OperandBytes<TileA, Prologue>;
  using BytesB = OperandBytes<TileB, Plain<T>>;
  static_assert(BytesA::kBytes == TileA::kBytes, "a prologue of one tensor");

  // grid (row tiles, parts of n): a block has every gridDim.y-th tile of n. N is a multiple of S::kN.
  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int m0 = blockIdx.x * S::kM, K = p.phase[0].K, tiles_k = (K + S::kK - 1) / S::kK;
    const int first_n = blockIdx.y, tiles_n = p.N / S::kN, step = gridDim.y;
    const uint32_t ring = base + tiles_k * TileA::kBytes;

    AlongRows<TileA, BytesA> a;
    a.begin(p.phase[0].a, K, m0, p.M, p.map, thread);
    for (int k = 0; k < tiles_k; ++k) a.load(base + k * TileA::kBytes, thread);
    commit_copies();

    AlongRows<TileB, BytesB> b;
    b.begin(p.phase[0].b, K, first_n * S::kN, p.N, PixelMap{1}, thread);
    const int64_t next_n = (static_cast<int64_t>(step) * S::kN * K - tiles_k * S::kK) * 2;  // bytes
    int loaded = 0;
    auto load = [&](uint32_t slot, uint32_t) {
      b.load(slot, thread);
      if (++loaded == tiles_k) {  // on to the next tile of n
        loaded = 0;
#pragma unroll
        for (const char*& row : b.row) row += next_n;
        b.k -= tiles_k * S::kK;
      }
    };
    auto transform_all = [&](uint32_t) {
      for (int k = 0; k < tiles_k; ++k) {
        AlongRows<TileA, BytesA>::template transform<Prologue>(p.prologue, base + k * TileA::kBytes,
                                                               k * S::kK, K, thread);
      }
    };
    auto nothing = [](uint32_t) {};

    int left = (tiles_n - first_n + step - 1) / step * tiles_k;
    Pipeline<BytesB::kBytes> pipeline(ring, left, load, transform_all);
    const int warp_m = warp % S::kWarpsM, warp_n = warp / S::kWarpsM;
    const Fragments<TileA, true, true> fa(warp_m * S::kWarpM, lane);
    const Fragments<TileB, false, true> fb(warp_n * S::kWarpN, lane);
    for (int n = first_n; n < tiles_n; n += step) {
      Accumulators<S> acc;
      uint32_t slot_a = base;
      left -= tiles_k;
      pipeline.run_until(left, left, load, nothing, [&](uint32_t slot) {
        multiply<T>(acc, fa, fb, slot_a, slot);
        slot_a += TileA::kBytes;
      });
      const Place at{p.M,  p.N,       n * S::kN + warp_n * S::kWarpN + lane % 8 * 8,
                     lane, warp_m,    warp_n,
                     m0,   n * S::kN, static_cast<int>(blockIdx.x)};
      Epilogue epilogue(p.epilogue, p.map, at);
      drain<S>(epilogue, at, ring + kStages * BytesB::kBytes + warp * Staging::kBytes, acc);
    }
  }
};

}  // namespace resnet_fused
