// What plans and kernels share of the weight gradient of a k x k convolution:
//
//   dw[k, r, s, c] = sum over pixels m of dy of dy[m, k] * x[source of m for the tap (r, s), c]
//
// A block has a tile of c x k, and of the kernel's taps a batch: up to three segments of up to three taps
// side by side. It walks over the pixels of dy, `pixels` a stage. x passes through a ring of rows of its
// images in shared memory, each pixel once; taps are shifts within the ring.
#pragma once

#include "gemm/gemm.h"

namespace resnet_fused {

struct WgradTile {
  int32_t c, k, pixels;
  constexpr int threads() const { return 32 * (c / kWarpC) * (k / kWarpK); }
  constexpr int pitch() const { return 2 * c + 16; }  // bytes from a pixel of the ring to the next
  static constexpr int kWarpC = 16, kWarpK = 32;      // of a warp, for each tap
};
// kWgradLong has the fewest barriers; kWgradShort needs less shared memory; kWgradNarrow least, and wastes
// less on few channels.
inline constexpr WgradTile kWgradLong{64, 64, 64}, kWgradShort{64, 64, 32}, kWgradNarrow{32, 64, 32};
inline constexpr const WgradTile* kWgradTiles[] = {&kWgradLong, &kWgradShort, &kWgradNarrow};

constexpr int kSegments = 3, kSegmentTaps = 3;  // of a batch, of a segment

// Two stages of a word for each pixel and segment: where its row is in the ring. A fourth word makes it a
// 16-byte access.
constexpr int wgrad_table_bytes(const WgradTile& t) { return 2 * t.pixels * (kSegments + 1) * 4; }
// Coefficients of the prologues of a block's channels: vectors for dy, and for x.
constexpr int kWgradVectorsDy = 5, kWgradVectorsX = 2;
constexpr int wgrad_coefficient_bytes(const WgradTile& t) {
  return (kWgradVectorsDy * t.k + kWgradVectorsX * t.c) * 4;
}
// What lies before the ring.
constexpr int wgrad_stage_bytes(const WgradTile& t, Extras dy) {
  return kStages * stage_bytes(t.pixels, t.k, dy) + wgrad_table_bytes(t) + wgrad_coefficient_bytes(t);
}
// A warp's way out: a tap's c x k, k in rows.
constexpr int kWgradStagingPitch = WgradTile::kWarpC * 4 + 16;
constexpr int kWgradStagingBytes = WgradTile::kWarpK * kWgradStagingPitch;

// Rows of x [N * H, W] in shared memory, the row y of image n in place (n * H + y + padding) % rows. A row
// consists of a part for each phase of the stride: columns phase, phase + stride, .... Before each part are
// `lead` bytes of zeros, which are the columns left of it and right of the part before; behind all rows are
// zeros that stand for a row outside of the image.
struct Ring {
  Divider rows;
  int32_t row_pitch, phase_pitch, lead;  // bytes
  int32_t zeros;                         // where they begin, a multiple of 128
  int32_t bytes;                         // of all
  // A column of x is column * phase_pitch + (column / stride) * back from the row's begin; the quotient is
  // column * inverse >> 16, of columns below 4096 and strides up to 16.
  uint32_t inverse;
  int32_t back;
  // What a thread that copies every `step`-th pixel goes on by: bytes of whole rows, and columns.
  int32_t step_rows, step_columns;
};
// Pixels that the threads of a block copy at once, a chunk each.
constexpr int wgrad_step(const WgradTile& t) { return t.threads() / (t.c / 8); }

template <class Dy, class X>
struct WgradParams {
  const void* dy;  // [M, K]
  const void* x;   // [N * H * W, C]
  float* partial;  // [splits, K, R * S, group_c]
  int32_t M, C, K;
  int32_t per_split;  // pixels of dy of a split, a multiple of the tile's
  int32_t H, W;
  int32_t R, S;
  int32_t stride_h, padding_h, padding_w, dilation_h, dilation_w;
  int32_t group_c, tiles_c;   // channels of x in a group; tiles of them for a tile of k
  int32_t segments, batches;  // of all taps
  int32_t per_batch;          // segments
  Divider P, Q, width, stride_w, group_k;
  Ring ring;
  Dy prologue;
  X prologue2;
};

}  // namespace resnet_fused
