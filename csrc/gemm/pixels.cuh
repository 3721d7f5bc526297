// out[i, j] = sum over pixels m of L[m, i] R[m, j]: the body of wgrad, pass W and gram. Pixels are split over
// blocks (gridDim.y); each writes its partial sums, which sum_splits.cu adds up in order.
#pragma once

#include "gemm/mainloop.cuh"

namespace resnet_fused {

// Accumulators to fp32 [*, J]: neighbouring lanes exchange halves, so that each writes four columns of one
// row.
template <class S>
__device__ void store_partial(float* out, const Accumulators<S>& acc, int i0, int I, int j0, int J,
                              int lane) {
  const int odd = lane & 1;
#pragma unroll
  for (int m = 0; m < S::kGroupsM; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * S::kGroupsN; ++n) {
      const float (&c)[4] = acc.c[m][n];
      const float x = __shfl_xor_sync(0xffffffffu, odd ? c[0] : c[2], 1);
      const float y = __shfl_xor_sync(0xffffffffu, odd ? c[1] : c[3], 1);
      const float4 four = odd ? make_float4(x, y, c[2], c[3]) : make_float4(c[0], c[1], x, y);
      const int i = i0 + m * 16 + lane / 4 + odd * 8, j = j0 + n * 8 + lane % 4 / 2 * 4;
      if (i < I && j < J) *reinterpret_cast<float4*>(out + static_cast<int64_t>(i) * J + j) = four;
    }
  }
}

// Left, Right: prologues. kSums: also the sums over pixels of L. kGram: R is L, and only tiles on or above
// the diagonal are computed.
template <typename T, class S, class Left, class Right, bool kSums, bool kStrided = false, bool kGram = false>
struct PixelsKernel {
  using Params = PixelsParams<typename Left::Params, typename Right::Params>;
  using TileL = SharedTile<S::kK, S::kM, S::kThreads>;
  using TileR = SharedTile<S::kK, S::kN, S::kThreads>;
  using BytesL = OperandBytes<TileL, Left>;
  using BytesR = OperandBytes<TileR, Right>;
  using SourceL = DownRows<TileL, BytesL, kStrided && kGram>;
  using SourceR = DownRows<TileR, BytesR, kStrided>;
  static constexpr int kStageBytes = BytesL::kBytes + BytesR::kBytes;
  static constexpr int kShared = kStages * kStageBytes;
  static_assert(kShared == shared_bytes(S::kShape, {BytesL::kHasSecond, BytesL::kHasMask}),
                "what the plan counts");
  static_assert(sizeof(Params) <= kMaxParams, "a step's params");
  static_assert(!kGram || S::kM == S::kN, "square tiles");

  // The block's tile: row by row, for a Gram matrix those of the upper triangle.
  static __device__ void place(const Params& p, int& tile_i, int& tile_j) {
    const int across = (p.J + S::kN - 1) / S::kN;
    if constexpr (!kGram) {
      tile_i = blockIdx.x / across;
      tile_j = blockIdx.x % across;
    } else {
      int left = blockIdx.x;
      for (tile_i = 0; left >= across - tile_i; ++tile_i) left -= across - tile_i;
      tile_j = tile_i + left;
    }
  }

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int warp_m = warp % S::kWarpsM * S::kWarpM, warp_n = warp / S::kWarpsM * S::kWarpN;
    int tile_i, tile_j;
    place(p, tile_i, tile_j);
    const int i0 = tile_i * S::kM, j0 = tile_j * S::kN;
    const int begin = blockIdx.y * p.per_split;
    const int end = blockIdx.y == gridDim.y - 1 ? p.M : begin + p.per_split;

    SourceL l;
    SourceR r;
    l.begin(p.left, p.I, i0, begin, end, thread);
    l.template begin_prologue<Left>(p.prologue, p.left, i0, begin, p.M, thread);
    r.begin(p.right, p.J, j0, begin, end, thread);
    r.template begin_prologue<Right>(p.prologue2, p.right, j0, begin, p.M, thread);
    const bool same = kGram && tile_i == tile_j;  // then R's tile is L's
    auto load = [&](uint32_t slot, uint32_t next) {
      l.load(slot, p.map, thread);
      l.load_mask(next, thread);
      if (!same) r.load(slot + BytesL::kBytes, p.map, thread);
    };
    int k = begin;
    auto transform = [&](uint32_t slot) {
      l.template transform<Left>(p.prologue, slot, k, thread);
      if (!same) r.template transform<Right>(p.prologue2, slot + BytesL::kBytes, k, thread);
      k += S::kK;
    };
    const Fragments<TileL, true, false> fl(warp_m, lane);
    const Fragments<TileR, false, false> fr(warp_n, lane);
    Accumulators<S> acc;
    RowSums<S> sums;
    auto product = [&](uint32_t slot) {
      multiply<T>(acc, fl, fr, slot, same ? slot : slot + BytesL::kBytes, kSums ? &sums : nullptr);
    };
    const int tiles = (end - begin + S::kK - 1) / S::kK;
    l.load_mask(base, thread);
    Pipeline<kStageBytes> pipeline(base, tiles, load, transform);
    pipeline.run_until(0, 0, load, transform, product);

    float* out = p.partial + blockIdx.y * static_cast<int64_t>(p.I) * p.J;
    store_partial<S>(out, acc, i0 + warp_m, p.I, j0 + warp_n, p.J, lane);
    if (kSums && tile_j == (kGram ? tile_i : 0) && warp_n == 0 && lane % 4 == 0) {
      float* to =
          p.partial + gridDim.y * static_cast<int64_t>(p.I) * p.J + blockIdx.y * static_cast<int64_t>(p.I);
#pragma unroll
      for (int m = 0; m < S::kGroupsM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = i0 + warp_m + m * 16 + h * 8 + lane / 4;
          if (i < p.I) to[i] = sums.c[m][2 * h];
        }
      }
    }
  }
};

}  // namespace resnet_fused
