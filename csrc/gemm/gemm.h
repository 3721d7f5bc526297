// What the plans and the kernels of the matrix family share. Two loops serve all of them:
//
//   rows    out[m, n] = sum over k of A[m, k] B[k, n], m a pixel: fprop, dgrad, expand and its dgrad (pass D)
//   pixels  out[i, j] = sum over m of L[m, i] R[m, j], m a pixel: wgrad (pass W is one) and gram
//
// A, L and R are activations, NHWC, with a prologue on load; B is a weight. All are bf16 or fp16, channels in
// multiples of 8; sums are fp32. A vector over channels is fp32 and starts at a multiple of 16 bytes.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace resnet_fused {

// n / d of 31-bit numbers without a division: (n * multiplier >> 32) >> shift; d = 1 is an exception.
struct Divider {
  uint32_t divisor, multiplier, shift;
};

// The pixel of x [N, H, W] that pixel m = (n, i, j) of a strided 1x1 convolution's output reads: (n,
// i*stride, j*stride). Stride 1 takes pixels as they come. Or the pixel of a strided convolution's dx that is
// output m of a phase (taps.h).
struct PixelMap {
  int32_t stride;
  int32_t H, W;  // of x
  Divider Ho, Wo;
  int32_t first;  // the pixel of (0, 0, 0)
};

// ------------------------------------------------------------------------------------------------- prologues

struct Nothing {};

// relu(scale*x + shift), [C] each
struct Affine {
  const float* scale;
  const float* shift;
};

// dy * mask
struct Mask {
  const uint32_t* mask;  // [ceil(C/32), M]
};

// The batch norm's backward: coef_dz*dz + coef_x*(u - mean) + coef_1 with dz = dy * gate.
struct BnBackward {
  const void* u;  // as dy
  ReluGate gate;
  const float* mean;
  const float* coef_dz;
  const float* coef_x;
  const float* coef_1;
};

// round(relu(scale*x + shift)) - center, or x - center where affine is null
struct Center {
  Affine affine;
  const float* center;
};

// ------------------------------------------------------------------------------------------------- epilogues

// out = acc, and the statistics of what is stored: [row tiles, 2, N], mean and sum of squared deviations.
struct StoreStats {
  void* out;
  float* partial;  // null: no statistics
};

// out = act(scale*acc + shift + residual) with the bits of out > 0. With two phases acc is the sum of both
// products, each times its own scale.
struct AffineResidual {
  const float* scale;    // [N] of the first phase
  const float* scale2;   // [N] of the second; unused with one phase
  const float* shift;    // [N]
  const void* residual;  // [M, N] or null
  void* out;
  uint32_t* mask;  // or null
  int32_t relu;
};

// The gradient of a padded shortcut's y, [N, H', W', C], as that of its x [N, H, W]: see rows.h.
struct PaddedAddend {
  int32_t stride;  // 0: the addend is as out
  int32_t offset;  // of the first of its channels that is one of x
  int32_t H, W;
  int32_t C, pixels;  // of the addend
};
// The same as an epilogue takes it, without divisions.
struct Addend {
  int32_t C, pixels;
  int32_t offset = 0;          // of the first of its channels that is one of x
  Divider stride = {};         // divisor 0: the addend is as out
  Divider H = {}, W = {};      // of x
  int32_t high = 0, wide = 0;  // H', W'
};

// out = acc + constant + scale * addend * mask. With a stride, out and addend are [N, H, W]: pixels that the
// convolution did not read get the addend's part alone.
struct AddShortcut {
  const float* constant;  // [N] or null
  const void* addend;     // or null
  const uint32_t* mask;   // of the addend, or null
  void* out;
  Addend from;
  float scale = 1.0f;
};

// dz = (acc + constant) * relu'(scale*u + shift), and its sums [row tiles, 2, N]: of dz and of dz * (u -
// mean).
struct GateSums {
  const float* constant;  // [N] or null
  const void* u;          // [M, N]
  const float* scale;
  const float* shift;
  const float* mean;
  void* out;
  float* partial;
};

// ---------------------------------------------------------------------------------------------------- tiles

// A block's tile of the output, its warps' tiles, and how much of k is a stage; three stages are in shared
// memory.
constexpr int kStages = 3;
struct TileShape {
  int32_t m, n, k, warp_m, warp_n;
  constexpr int threads() const { return 32 * (m / warp_m) * (n / warp_n); }
};

// Of the `rows` kernels. kLarge reads least and needs an SM with 160 KB of shared memory; kWide is for the
// others, or where a prologue has two tensors; kSquare for short k, where the epilogue dominates; kNarrow for
// 64 channels and small problems.
inline constexpr TileShape kLarge{256, 128, 64, 64, 64}, kWide{256, 128, 32, 64, 64},
    kSquare{128, 128, 32, 32, 64}, kNarrow{128, 64, 32, 32, 64};
// Of `resident` kernels, which keep all of k: a block reads and transforms its rows of A once and walks over
// all of n.
inline constexpr TileShape kResident{128, 128, 64, 32, 64};
constexpr int kResidentK = 256;
inline constexpr const TileShape* kRowsTiles[] = {&kLarge, &kWide, &kSquare, &kNarrow, &kResident};
// Of the `pixels` kernels; k are pixels.
inline constexpr TileShape kPixels128{128, 128, 32, 64, 64}, kPixels64{64, 64, 32, 32, 32};
inline constexpr const TileShape* kPixelsTiles[] = {&kPixels128, &kPixels64};

// What an operand's prologue needs beside its tile.
struct Extras {
  bool second, mask;
};
constexpr int mask_bytes(int rows, int cols) { return rows * cols / 8 + 128; }  // with room to spread panels
constexpr int stage_bytes(int rows, int cols, Extras extras) {
  return rows * cols * 2 * (extras.second ? 2 : 1) + (extras.mask ? mask_bytes(rows, cols) : 0);
}
constexpr int shared_bytes(const TileShape& t, Extras left) {
  return kStages * (stage_bytes(t.m, t.k, left) + stage_bytes(t.k, t.n, {}));
}

// A warp's way to the epilogue: 16 rows of 64 floats and 16 bytes, see rows.cuh.
constexpr int kStagingBytes = 16 * (64 * 4 + 16);
constexpr int resident_bytes(int k) {
  const TileShape& t = kResident;
  return (k + t.k - 1) / t.k * t.m * t.k * 2 + kStages * t.n * t.k * 2 + t.threads() / 32 * kStagingBytes;
}

// ---------------------------------------------------------------------------------------------------- params

// One k range of a `rows` kernel: A [*, K] through the map, B [N, K] or [K, N].
struct Phase {
  const void* a;
  const void* b;
  int32_t K;
};

template <class Prologue, class Prologue2, class Epilogue>
struct RowsParams {
  int32_t M, N;
  Phase phase[2];  // the second has K = 0 where there is none
  PixelMap map;    // of what is strided: the last phase's A, or a dgrad's output, or both
  Prologue prologue;
  Prologue2 prologue2;
  Epilogue epilogue;
};

template <class Left, class Right>
struct PixelsParams {
  int32_t M, I, J;    // pixels, channels of L, channels of R
  int32_t per_split;  // pixels of a split, a multiple of the k tile
  const void* left;   // [M, I]
  const void* right;  // [*, J] through the map
  PixelMap map;
  Left prologue;
  Right prologue2;
  float* partial;  // [splits, I, J], then [splits, I]: sums over the pixels of L
};

}  // namespace resnet_fused
