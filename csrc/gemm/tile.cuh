// Tiles of 16-bit matrices in shared memory: who copies what, where it lies, and how fragments are read.
#pragma once

#include "gemm/gemm.h"
#include "gemm/instructions.cuh"

namespace resnet_fused {

// kRows x kCols elements in 16-byte chunks. Chunks are swizzled within their row so that neither the copies,
// nor the prologues, nor ldmatrix meet a bank conflict. A thread owns one column of chunks, in every kStep-th
// row.
template <int kRows_, int kCols_, int kThreads>
struct SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kRowBytes = 2 * kCols, kBytes = kRows * kRowBytes;
  static constexpr int kAcross = kCols / 8;         // chunks in a row
  static constexpr int kStep = kThreads / kAcross;  // rows from one of a thread's chunks to its next
  static constexpr int kCount = kRows / kStep;      // chunks of a thread
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "the swizzle");
  static_assert(kThreads % kAcross == 0 && kRows % kStep == 0 && kStep % 8 == 0, "chunks of a thread");

  __device__ static uint32_t swizzle(uint32_t row) { return kRowBytes == 64 ? row >> 1 & 3 : row & 7; }
  __device__ static uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ swizzle(row)) << 4);
  }
  __device__ static int row(int thread, int i) { return thread / kAcross + i * kStep; }
  __device__ static int chunk(int thread) { return thread % kAcross; }
  __device__ static uint32_t own(int thread, int i) {
    return offset(thread / kAcross, chunk(thread)) + i * kStep * kRowBytes;
  }
};

// Reads mma's fragments of a tile for a warp: 16 rows or columns of the output (`group`) by 16 of k.
// kAlongRows: k runs along the tile's rows ([m or n, k]); else the rows are k ([k, m or n]) and ldmatrix
// transposes. Registers: A's a0 .. a3, or b0, b1 of B's first eight columns and of the next eight.
template <class Tile, bool kIsA, bool kAlongRows>
struct Fragments {
  uint32_t row_offset;
  uint32_t column;

  __device__ Fragments(int first, int lane) {  // first: the warp's first row or column of the output
    const int eight = (lane >> (kIsA == kAlongRows ? 3 : 4)) & 1;  // which of two 8-row matrices, ...
    const int chunk = (lane >> (kIsA == kAlongRows ? 4 : 3)) & 1;  // ... and of two chunks
    const int row = (lane & 7) + 8 * eight + (kAlongRows ? first : 0);
    row_offset = row * Tile::kRowBytes;
    column = ((kAlongRows ? chunk : chunk + first / 8) ^ Tile::swizzle(row)) << 4;
    keep_in_register(row_offset);
    keep_in_register(column);
  }
  __device__ void load(uint32_t (&r)[4], uint32_t tile, int group, int k16) const {
    const int across = kAlongRows ? k16 : group, down = kAlongRows ? group : k16;
    load_matrices<!kAlongRows>(r, tile + row_offset + down * 16 * Tile::kRowBytes + (column ^ (across * 32)));
  }
};

__device__ inline uint32_t divide(uint32_t n, const Divider& d) {
  return d.divisor == 1 ? n : __umulhi(n, d.multiplier) >> d.shift;
}

// Pixel m of [*, H, W].
struct Pixel {
  uint32_t image, h, w;
};
__device__ inline Pixel split(uint32_t m, const Divider& H, const Divider& W) {
  const uint32_t row = divide(m, W), image = divide(row, H);
  return {image, row - image * H.divisor, m - row * W.divisor};
}

// The row of x that row m of a strided convolution's output reads.
__device__ inline int64_t source_row(const PixelMap& map, int m) {
  if (map.stride == 1) return m;
  const Pixel at = split(m, map.Ho, map.Wo);
  return (static_cast<int64_t>(at.image) * map.H + at.h * map.stride) * map.W + at.w * map.stride;
}

// The pixel of a strided convolution's dx that is output m of a phase.
__device__ inline int64_t output_row(const PixelMap& map, int m) { return source_row(map, m) + map.first; }

}  // namespace resnet_fused
