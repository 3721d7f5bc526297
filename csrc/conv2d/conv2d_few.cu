// fprop of few channels: a block keeps the weights of its 64 output channels and walks over tiles of pixels.
#include "conv2d/few.cuh"
#include "gemm/rows.cuh"

namespace resnet_fused {

// kSteps: a row of the kernel has as many; 0: as many as the params say.
template <typename T, int kPad, int kSteps>
struct FewFprop {
  using S = Shape<kFew>;
  using Patch = FewPatch<kPad, S::kThreads>;
  static constexpr int kStaging = S::kThreads / 32 * Staging::kBytes;  // takes over the patch
  static_assert(sizeof(FewFpropParams) <= kMaxParams, "a step's params");

  __device__ static int steps(const FewImage& image) { return kSteps ? kSteps : image.steps; }

  static __device__ void run(const FewFpropParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t weights = shared_address(shared);
    const uint32_t area = weights + S::kN * p.weight_pitch;
    const int lane = threadIdx.x, warp = threadIdx.y, n0 = blockIdx.y * S::kN;
    load_weights(p, weights, n0, lane, warp);
    const int tiles = (p.image.M + S::kM - 1) / S::kM;
    const int first = blockIdx.x * p.tiles, end = min(first + p.tiles, tiles);
#pragma unroll 1
    for (int tile = first; tile < end; ++tile) {
      const int m0 = tile * S::kM, pixels = min(S::kM, p.image.M - m0);
      const Place at{p.image.M, p.K, n0 + lane % 8 * 8, lane, warp, 0, m0, n0, tile};
      const Patch patch(p.image, m0);
      patch.load(area, pixels, warp * 32 + lane);
      __syncthreads();
      Accumulators<S> acc;
      accumulate(p, patch, area, weights, pixels, lane, warp, acc);
      __syncthreads();
      StoreStatsEpilogue<T, S> epilogue(p.epilogue, PixelMap{1}, at);
      drain<S>(epilogue, at, area + warp * Staging::kBytes, acc);
      epilogue.finish(area + kStaging);
      __syncthreads();
    }
  }

 private:
  // [64, R * steps * 16]: a warp has every fourth row, a lane the same taps of each.
  static __device__ void load_weights(const FewFpropParams& p, uint32_t weights, int n0, int lane, int warp) {
    const FewImage& q = p.image;
    const int taps = steps(q) * (16 / kPad);
    const int64_t row = static_cast<int64_t>(q.R) * q.S * q.C;
    for (int j = lane; j < q.R * taps; j += 32) {
      const int r = j / taps, tap = j - r * taps;
      const uint16_t* from =
          static_cast<const uint16_t*>(p.weight) + (n0 + warp) * row + (r * q.S + tap) * q.C;
#pragma unroll 4
      for (int n = warp; n < S::kN; n += S::kThreads / 32, from += S::kThreads / 32 * row) {
        FewPixel<kPad> pixel;
        if (tap < q.S && n0 + n < p.K) pixel.read(from, q.C);
        pixel.store(weights + n * p.weight_pitch + j * kPad * 2);
      }
    }
  }

  static __device__ void accumulate(const FewFpropParams& p, const Patch& patch, uint32_t area,
                                    uint32_t weights, int pixels, int lane, int warp, Accumulators<S>& acc) {
    const FewImage& q = p.image;
    // As Fragments: of the four 8x8 matrices of A rows alternate first, of B chunks.
    const int row = lane % 8 + lane / 8 % 2 * 8;
    uint32_t a_at[S::kGroupsM];
#pragma unroll
    for (int g = 0; g < S::kGroupsM; ++g) {  // pixels past the end are copies of the last one
      const int i = min(warp * S::kWarpM + g * 16 + row, pixels - 1);
      a_at[g] = area + patch.offset(patch.position(i)) + lane / 16 * Patch::odd_chunk(q);
    }
    uint32_t b_at = weights + (lane % 8 + lane / 16 * 8) * p.weight_pitch + lane / 8 % 2 * 16;
    // In a row's last step what is behind the S taps belongs to others and may be no number.
    const int element = (steps(q) - 1) * 16 + lane % 4 * 2, taken = q.S * kPad;
    const uint32_t keep[2] = {element < taken ? ~0u : 0u, element + 8 < taken ? ~0u : 0u};
    const int step = Patch::step(q);
#pragma unroll 1
    for (int r = 0; r < q.R; ++r) {
      uint32_t from = r * q.pitch;
#pragma unroll
      for (int s = 0; s < steps(q); ++s) {
        uint32_t a[S::kGroupsM][4];
#pragma unroll
        for (int g = 0; g < S::kGroupsM; ++g) {
          load_matrices<false>(a[g], a_at[g] + from);
          if (s == steps(q) - 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[g][i] &= keep[i / 2];
          }
        }
#pragma unroll
        for (int n = 0; n < S::kGroupsN; ++n) {
          uint32_t b[4];
          load_matrices<false>(b, b_at + n * 16 * p.weight_pitch);
#pragma unroll
          for (int g = 0; g < S::kGroupsM; ++g) {
            Half<T>::mma(acc.c[g][2 * n], a[g], b[0], b[1]);
            Half<T>::mma(acc.c[g][2 * n + 1], a[g], b[2], b[3]);
          }
        }
        from += step;
        b_at += 32;
      }
    }
  }
};

#define RESNET_FUSED_FEW_FPROP(NAME, T, PAD, STEPS) \
  using NAME##_kernel = FewFprop<T, PAD, STEPS>;    \
  RESNET_FUSED_KERNEL(NAME, kFew.threads(), 3, FewFpropParams, NAME##_kernel::run)

RESNET_FUSED_FEW_FPROP(conv2d_few_fprop_4x1_bf16, __nv_bfloat16, 4, 1);
RESNET_FUSED_FEW_FPROP(conv2d_few_fprop_4x2_bf16, __nv_bfloat16, 4, 2);
RESNET_FUSED_FEW_FPROP(conv2d_few_fprop_8_bf16, __nv_bfloat16, 8, 0);
RESNET_FUSED_FEW_FPROP(conv2d_few_fprop_4x1_f16, __half, 4, 1);
RESNET_FUSED_FEW_FPROP(conv2d_few_fprop_4x2_f16, __half, 4, 2);
RESNET_FUSED_FEW_FPROP(conv2d_few_fprop_8_f16, __half, 8, 0);

}  // namespace resnet_fused
