// wgrad of few channels: dw[k, r, s, c] = sum over pixels of du[m, k] x[pixel m's tap r, s][c]. Pixels are
// split over blocks, as in gemm/pixels.cuh, and come in tiles of 64 with their patch of the image.
#include "conv2d/few.cuh"
#include "gemm/mainloop.cuh"

namespace resnet_fused {

// The image as mma's operand B, [pixels, taps]: a lane gives a pixel's chunks, in the warp's steps of the
// kernel's rows.
template <int kGroups>
struct FewFragments {
  uint32_t row[4];  // of its pixels in four times 16
  uint32_t offset[kGroups];

  __device__ void load(uint32_t (&r)[4], uint32_t, int group, int k16) const {
    load_matrices<true>(r, row[k16] + offset[group]);
  }
};

template <typename T, int kPad, class Prologue>
struct FewWgrad {
  using S = std::conditional_t<kPad == 4, Shape<kFewWgrad4>, Shape<kFewWgrad8>>;
  using Params = FewWgradParams<typename Prologue::Params>;
  using Tile = SharedTile<S::kK, S::kM, S::kThreads>;
  using Bytes = OperandBytes<Tile, Prologue>;
  using Patch = FewPatch<kPad, S::kThreads>;
  static_assert(Bytes::kBytes == stage_bytes(S::kK, S::kM, {Bytes::kHasSecond, Bytes::kHasMask}),
                "what the plan counts");
  static_assert(S::kK == 64 && sizeof(Params) <= kMaxParams);

  // grid (tiles of output channels, splits)
  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared), patches = base + kStages * Bytes::kBytes;
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
    const int warp_m = warp % S::kWarpsM * S::kWarpM, warp_n = warp / S::kWarpsM;
    const FewImage& q = p.image;
    const int i0 = blockIdx.x * S::kM, begin = blockIdx.y * p.per_split;
    const int end = min(begin + p.per_split, q.M);
    const int patch_bytes = q.R * q.pitch;
    auto patch_of = [&](uint32_t slot) { return patches + (slot - base) / Bytes::kBytes * patch_bytes; };

    DownRows<Tile, Bytes> dy;
    dy.begin(p.dy, p.K, i0, begin, end, thread);
    dy.template begin_prologue<Prologue>(p.prologue, p.dy, i0, begin, q.M, thread);
    int transforming = begin, multiplying = begin;
    auto load = [&](uint32_t slot, uint32_t next) {
      const int m0 = dy.k - Tile::row(thread, 0);
      dy.load(slot, PixelMap{1}, thread);
      dy.load_mask(next, thread);
      Patch(q, m0).load(patch_of(slot), min(S::kK, end - m0), thread);
    };
    auto transform = [&](uint32_t slot) {
      dy.template transform<Prologue>(p.prologue, slot, transforming, thread);
      transforming += S::kK;
    };
    const Fragments<Tile, true, false> fl(warp_m, lane);
    FewFragments<S::kGroupsN> fr;
    place(q, warp_n, lane, fr);
    Accumulators<S> acc;
    auto product = [&](uint32_t slot) {
      const Patch patch(q, multiplying);
      const uint32_t area = patch_of(slot);
#pragma unroll
      for (int k16 = 0; k16 < 4; ++k16) {  // pixels past the end are copies of the last one, times zero
        const int i = min(k16 * 16 + lane % 8 + lane / 8 % 2 * 8, end - multiplying - 1);
        fr.row[k16] = area + patch.offset(patch.position(i));
      }
      multiply<T>(acc, fl, fr, slot, 0);
      multiplying += S::kK;
    };
    dy.load_mask(base, thread);
    Pipeline<Bytes::kBytes> pipeline(base, (end - begin + S::kK - 1) / S::kK, load, transform);
    pipeline.run_until(0, 0, load, transform, product);
    store(p, acc, i0 + warp_m, warp_n, lane);
  }

 private:
  // The steps of the kernel's rows, R * steps of them, go round the warps.
  __device__ static int group_of(int warp_n, int n) { return warp_n + n * S::kWarpsN; }

  static __device__ void place(const FewImage& q, int warp_n, int lane, FewFragments<S::kGroupsN>& f) {
#pragma unroll
    for (int n = 0; n < S::kGroupsN; ++n) {
      const int group = min(group_of(warp_n, n), q.R * q.steps - 1), r = group / q.steps;
      f.offset[n] = r * q.pitch + (group - r * q.steps) * Patch::step(q) + lane / 16 * Patch::odd_chunk(q);
    }
  }

  static __device__ void store(const Params& p, const Accumulators<S>& acc, int i0, int warp_n, int lane) {
    const FewImage& q = p.image;
    const int columns = q.R * q.S * q.C;
    float* out = p.partial + static_cast<int64_t>(blockIdx.y) * p.K * columns;
#pragma unroll
    for (int n = 0; n < S::kGroupsN; ++n) {
      const int group = group_of(warp_n, n), r = group / q.steps;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // a lane's columns: two neighbours of each eight
        const int element = (group - r * q.steps) * 16 + j / 2 * 8 + lane % 4 * 2 + j % 2;
        const int tap = element / kPad, c = element % kPad;
        if (r >= q.R || tap >= q.S || c >= q.C) continue;
#pragma unroll
        for (int m = 0; m < S::kGroupsM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int i = i0 + m * 16 + h * 8 + lane / 4;
            if (i < p.K) {
              out[static_cast<int64_t>(i) * columns + (r * q.S + tap) * q.C + c] =
                  acc.c[m][2 * n + j / 2][2 * h + j % 2];
            }
          }
        }
      }
    }
  }
};

#define RESNET_FUSED_FEW_WGRAD(NAME, T, PAD, PROLOGUE) \
  using NAME##_kernel = FewWgrad<T, PAD, PROLOGUE<T>>; \
  RESNET_FUSED_KERNEL(NAME, kFewWgrad##PAD.threads(), 1, NAME##_kernel::Params, NAME##_kernel::run)

RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_4_bf16, __nv_bfloat16, 4, Plain);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_8_bf16, __nv_bfloat16, 8, Plain);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_backward_4_bf16, __nv_bfloat16, 4, Backward);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_backward_8_bf16, __nv_bfloat16, 8, Backward);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_4_f16, __half, 4, Plain);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_8_f16, __half, 8, Plain);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_backward_4_f16, __half, 4, Backward);
RESNET_FUSED_FEW_WGRAD(conv2d_few_wgrad_backward_8_f16, __half, 8, Backward);

}  // namespace resnet_fused
