// The border between plans and the kernels that walk an activation as a matrix [M, C] (rows are pixels).
//
// A warp works on tiles of 8 rows x 32 channels. A panel is 32 channels, which is one word of a bit mask
// (int32 [ceil(C/32), M]: bit c%32 of word [c/32][m]); a tile's eight words are one 32-byte sector. A block
// is 8 warps: `warps_across` of them side by side along C, the others further down. Each block owns
// `rows_per_block` rows, so that a warp keeps its panel and with it the per-channel coefficients in
// registers.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int kPanel = 32;
constexpr int kTileRows = 8;
constexpr int kWarps = 8;
constexpr int kFinalizeWarps = 32;

struct Rows {
  int64_t M;
  int64_t rows_per_block;  // a multiple of kTileRows * kWarps / warps_across
  int32_t C;
  int32_t warps_across;  // 1, 2, 4 or 8
};

// A shortcut without parameters: pixel (i, j) and channel c of y [N, H', W', K], H' = ceil(H / stride), read
// pixel (i*stride, j*stride) and channel c - offset of x [N, H, W, C]; channels that x does not have are 0.
struct PaddedShortcut {
  int32_t stride;  // 0: there is none, x is as y
  int32_t offset;
  int32_t H, W, C;  // of x
};

// What gates the gradient: a mask, or the sign of scale*x + shift, or nothing.
struct ReluGate {
  const uint32_t* mask;
  const float* scale;
  const float* shift;
};

// Combines the partials of a sum: out[k][c] = factor * sum over b of partial[b][k][c], in a fixed order.
struct SumPartialsParams {
  const float* partial;  // [blocks, gridDim.y, C]
  float* out[2];         // [C] each
  int64_t blocks;
  int32_t C;
  float factor;
};

}  // namespace resnet_fused
