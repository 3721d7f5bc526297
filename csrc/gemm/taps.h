// What the plans and the kernels of k x k convolutions share. One loop serves fprop and dgrad:
//
//   out[m, n] = sum over taps t and channels c of A[source(m) + t, c] B_t[c, n], m an output pixel
//
// A block's outputs are a run of flattened pixels, and so is what they read: its halo. Slices of 32 channels
// of the halo are copied into shared memory once, transformed there once, and read by every tap at shifted
// rows. A dgrad with a stride falls into phases, one for each residue of its outputs' rows and columns, whose
// taps lie on a lattice of their own: nothing is multiplied by the zeros between.
#pragma once

#include "gemm/gemm.h"

namespace resnet_fused {

constexpr int kSliceChannels = 32;
// Bytes from a pixel of the halo to the next: an odd number of 16-byte chunks, so that eight neighbours lie
// in different banks. The last chunk holds the pixel's mask words, one for each of the four threads that copy
// it.
constexpr int kPixelBytes = 2 * kSliceChannels + 16;
constexpr int kZeroBytes =
    256;  // what taps outside of the image read, at the bank where they would have read
constexpr int kMaxTapRows = 16;  // kernel rows and columns: bits of half a word
constexpr int kMaxPhases = 4;

inline constexpr TileShape kTapsWide{256, 128, 32, 64, 64}, kTapsTall{256, 64, 32, 64, 64},
    kTapsNarrow{128, 64, 32, 32, 64};
inline constexpr const TileShape* kTapsTiles[] = {&kTapsWide, &kTapsTall, &kTapsNarrow};

// Outputs whose taps are the same lattice: (rows x cols) taps, of which the first of output (n, i, j) is the
// source's pixel (n, i*stride + row, j*stride + col).
struct TapsPhase {
  Divider P, Q;  // its outputs [N, P, Q]
  int32_t M;     // pixels
  int32_t tile;  // its first row tile's number
  int32_t row, col;
  int32_t rows, cols;
  int32_t weight;  // elements from the weight to the first tap's
  int32_t first;   // the output tensor's pixel of output (0, 0, 0)
  int32_t folds;   // whether the source's pixels step back from a row or an image to the next: a wide padding
};

struct TapsSource {
  const void* x;  // [*, H, W, C]
  int32_t pixels, H, W, C;
  int32_t stride;              // of the source's pixels from one output to the next, 1 or 2
  int32_t step_row, step_col;  // from one tap to the next
  int32_t transforms;          // whether the prologue does anything
};

// Weights: of B_t[c, n], c's and n's groups are the same or the element is 0.
struct TapsWeight {
  const void* w;
  int32_t channel, row,
      col;  // elements from one output channel of the convolution, tap row or column to the next
  int32_t group_c, group_n;  // channels of a group
};

// Where shared memory goes: buffers of the halo, and of the prologue's second tensor, `halo` pixels each.
struct HaloBuffers {
  int32_t halo, buffers, seconds;
};
constexpr int halo_bytes(const HaloBuffers& b) { return b.halo * kPixelBytes * (b.buffers + b.seconds); }
constexpr int taps_bytes(const TileShape& t, const HaloBuffers& b) {
  return kZeroBytes + kStages * t.n * t.k * 2 + halo_bytes(b);
}

// The epilogue takes it over: a warp's staging, then the sums of ColumnSums.
constexpr int taps_epilogue_bytes(const TileShape& t) {
  return t.threads() / 32 * kStagingBytes + t.m / t.warp_m * 2 * t.n * 4;
}

template <class Prologue, class Epilogue>
struct TapsParams {
  TapsSource source;
  TapsWeight weight;
  HaloBuffers shared;
  int32_t N;                         // output channels
  int32_t out_stride, out_H, out_W;  // of the output tensor, where phases interleave; else 1
  int32_t phases;
  TapsPhase phase[kMaxPhases];
  Prologue prologue;
  Epilogue epilogue;
};

}  // namespace resnet_fused
