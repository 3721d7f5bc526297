// The main loop: copies of later k tiles in flight, the prologue on the next one, tensor cores on the present
// one.
#pragma once

#include "gemm/source.cuh"

namespace resnet_fused {

// A TileShape as a type (C++17 has no other way to make it a template's argument).
template <const TileShape& kTile>
struct Shape {
  static constexpr int kM = kTile.m, kN = kTile.n, kK = kTile.k, kWarpM = kTile.warp_m, kWarpN = kTile.warp_n;
  static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN, kThreads = kTile.threads();
  static constexpr int kGroupsM = kWarpM / 16, kGroupsN = kWarpN / 16;  // of 16 rows or columns
  static constexpr TileShape kShape = kTile;
  static_assert(kM % kWarpM == 0 && kN % kWarpN == 0 && kWarpM % 16 == 0 && kWarpN % 16 == 0 && kK % 16 == 0);
};

// A warp's part of the output: accumulators [16 rows][8 columns] in mma's layout: element h*2 + e of a lane
// is row lane/4 + 8h, column lane%4 * 2 + e.
template <class S>
struct Accumulators {
  float c[S::kGroupsM][2 * S::kGroupsN][4];
  __device__ Accumulators() {
#pragma unroll
    for (int m = 0; m < S::kGroupsM; ++m)
#pragma unroll
      for (int n = 0; n < 2 * S::kGroupsN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
  }
};

// A warp's sums of A's rows over k: every column of A times ones.
template <class S>
struct RowSums {
  float c[S::kGroupsM][4] = {};
};

template <typename T, class S, class FragmentsA, class FragmentsB>
__device__ void multiply(Accumulators<S>& acc, const FragmentsA& fa, const FragmentsB& fb, uint32_t tile_a,
                         uint32_t tile_b, RowSums<S>* sums = nullptr) {
#pragma unroll
  for (int k16 = 0; k16 < S::kK / 16; ++k16) {
    uint32_t a[S::kGroupsM][4];
#pragma unroll
    for (int m = 0; m < S::kGroupsM; ++m) fa.load(a[m], tile_a, m, k16);
    if (sums) {
#pragma unroll
      for (int m = 0; m < S::kGroupsM; ++m) Half<T>::mma(sums->c[m], a[m], Half<T>::kOnes, Half<T>::kOnes);
    }
#pragma unroll
    for (int n = 0; n < S::kGroupsN; ++n) {
      uint32_t b[4];
      fb.load(b, tile_b, n, k16);
#pragma unroll
      for (int m = 0; m < S::kGroupsM; ++m) {
        Half<T>::mma(acc.c[m][2 * n], a[m], b[0], b[1]);
        Half<T>::mma(acc.c[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// A ring of kStages slots of shared memory that k tiles pass through:
//
//   load       starts the copies of tile t + kStages - 1 into the slot that tile t - 1 has left
//   transform  the prologue on tile t + 1, by each thread on what it has copied itself
//   multiply   tile t, which a barrier has shown to all
//
// load(slot, next) and transform(slot) are called for one tile after the other; `next` is the slot of the
// tile after, for what others than the copying thread transform with.
template <int kStageBytes>
class Pipeline {
 public:
  // tiles: of all runs together.
  template <class Load, class Transform>
  __device__ Pipeline(uint32_t base, int tiles, Load load, Transform transform)
      : base_(base), left_(tiles), loading_(base + (kStages - 1) * kStageBytes), multiplying_(base) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < tiles) load(base + s * kStageBytes, base + (s + 1) * kStageBytes);
      commit_copies();
    }
    wait_copies<kStages - 2>();
    __syncthreads();
    if (tiles > 0) transform(base);
    transforming_ = next(base);
    __syncthreads();
  }

  // Multiplies tiles until `left` are left, and transforms each one's successor as long as more than
  // `untransformed` are: those of a later phase.
  template <class Load, class Transform, class Multiply>
  __device__ void run_until(int left, int untransformed, Load load, Transform transform, Multiply multiply) {
#pragma unroll 1
    while (left_ > left) {
      if (left_ > kStages - 1) load(loading_, multiplying_);
      commit_copies();
      wait_copies<kStages - 2>();
      if (--left_ > untransformed) transform(transforming_);
      multiply(multiplying_);
      loading_ = multiplying_;
      multiplying_ = transforming_;
      transforming_ = next(transforming_);
      __syncthreads();
    }
  }

 private:
  __device__ uint32_t next(uint32_t slot) const {
    return slot == base_ + (kStages - 1) * kStageBytes ? base_ : slot + kStageBytes;
  }

  uint32_t base_;
  int left_;  // tiles to multiply
  uint32_t loading_, transforming_, multiplying_;
};

}  // namespace resnet_fused
