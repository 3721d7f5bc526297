// A warp's view of an activation [M, C]: tiles of 8 rows x 32 channels (rows.h), eight elements a thread.
//
//   kVector   thread = (row lane/4, 16-byte accesses q = lane%4): 8 channels of one row. Channels q*8 ..
//   q*8+7 of the
//             panel for 2-byte elements; q*4 .. q*4+3 and 16+q*4 .. 16+q*4+3 for floats, so that the four
//             threads of a row always touch 64 contiguous bytes.
//   otherwise thread = channel `lane` of the panel, in all 8 rows.
#pragma once

#include "common/kernel.cuh"
#include "common/rows.h"

namespace resnet_fused {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kElements = 8;

// Row of x [N*H*W] that a row of y [N*H'*W'] reads, every stride-th pixel.
struct SourceRow {
  uint32_t stride, H, W;
  __device__ int64_t operator()(int64_t row) const {
    if (stride == 1) return row;
    const uint32_t Wo = (W - 1) / stride + 1, Ho = (H - 1) / stride + 1;
    const uint32_t m = static_cast<uint32_t>(row);  // the plan keeps it below 2^31
    const uint32_t j = m % Wo, i = m / Wo % Ho, n = m / Wo / Ho;
    return (static_cast<int64_t>(n) * H + i * stride) * W + j * stride;
  }
};

template <typename T, bool kVector>
struct Tile {
  static constexpr int kWidth = Chunk<T>::kWidth;
  static constexpr int kChunks = kElements / kWidth;
  static constexpr int kChannels = kVector ? kElements : 1;  // different channels of a thread
  static constexpr int kStaged =
      kVector && sizeof(T) == 2 ? 2 : 1;  // tiles that a warp reads before it works on them

  // What a thread has loaded of a tile and not yet unpacked: loads of several tiles stay in flight.
  struct Raw {
    Chunk<T> chunk[kChunks];
  };

  int lane = threadIdx.x;
  int C;
  int panel;
  int64_t step;   // rows from one of the warp's tiles to its next
  int64_t first;  // the warp's first row
  int64_t end;    // one past the last row of the block
  int64_t M;

  __device__ explicit Tile(const Rows& rows) : C(rows.C), M(rows.M) {
    const int warp = threadIdx.y;
    panel = blockIdx.y * rows.warps_across + warp % rows.warps_across;
    step = kTileRows * (kWarps / rows.warps_across);
    const int64_t start = blockIdx.x * rows.rows_per_block;
    first = start + kTileRows * (warp / rows.warps_across);
    end = min(rows.M, start + rows.rows_per_block);
    if (panel * kPanel >= C) first = end;  // a warp beyond the last panel has no rows
  }

  // Place in the panel of a thread's element (or of its only channel).
  __device__ int slot(int element) const {
    return kVector ? element / kWidth * 4 * kWidth + lane % 4 * kWidth + element % kWidth : lane;
  }
  __device__ int channel(int element) const { return panel * kPanel + slot(element); }
  __device__ int64_t row(int64_t m0, int element) const { return m0 + (kVector ? lane / 4 : element); }
  __device__ bool holds(int64_t m0, int element) const {
    return channel(element) < C && row(m0, element) < end;
  }
  // Index of an element's coefficient among the thread's kChannels.
  __device__ static constexpr int of(int element) { return kVector ? element : 0; }

  __device__ void coefficients(const float* source, float (&out)[kChannels]) const {  // source: [C]
#pragma unroll
    for (int i = 0; i < kChannels; ++i) out[i] = channel(i) < C ? source[channel(i)] : 0.0f;
  }

  // Elements outside of the matrix are 0. `map` turns the row of the tile's matrix into that of `source`,
  // whose rows are `pitch` elements apart.
  template <typename RowMap>
  __device__ Raw load(const T* source, int64_t m0, RowMap map, int pitch) const {
    Raw raw;
    if constexpr (kVector) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (holds(m0, j * kWidth)) {
          const T* from = source + map(row(m0, 0)) * pitch + channel(j * kWidth);
          raw.chunk[j].bits = __ldg(reinterpret_cast<const uint4*>(from));
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (holds(m0, e))
          raw.chunk[e / kWidth].value[e % kWidth] = __ldg(source + map(row(m0, e)) * pitch + channel(0));
      }
    }
    return raw;
  }
  template <typename RowMap>
  __device__ Raw load(const T* source, int64_t m0, RowMap map) const {
    return load(source, m0, map, C);
  }
  __device__ Raw load(const T* source, int64_t m0, int pitch) const {
    return load(source, m0, [](int64_t row) { return row; }, pitch);
  }
  __device__ Raw load(const T* source, int64_t m0) const { return load(source, m0, C); }
  // Of a padded shortcut's x. With kVector its C and offset are whole accesses.
  __device__ Raw load(const T* source, int64_t m0, const PaddedShortcut& from) const {
    const SourceRow map{static_cast<uint32_t>(from.stride), static_cast<uint32_t>(from.H),
                        static_cast<uint32_t>(from.W)};
    Raw raw;
    constexpr int kStep = kVector ? kWidth : 1;
#pragma unroll
    for (int e = 0; e < kElements; e += kStep) {
      const uint32_t c = static_cast<uint32_t>(channel(e) - from.offset);
      if (!holds(m0, e) || c >= static_cast<uint32_t>(from.C)) continue;
      const T* at = source + map(row(m0, e)) * from.C + c;
      if constexpr (kVector) {
        raw.chunk[e / kWidth].bits = __ldg(reinterpret_cast<const uint4*>(at));
      } else {
        raw.chunk[e / kWidth].value[e % kWidth] = __ldg(at);
      }
    }
    return raw;
  }
  __device__ static float get(const Raw& raw, int element) {
    return to_float(raw.chunk[element / kWidth].value[element % kWidth]);
  }
  __device__ static void set(Raw& raw, int element, float value) {
    raw.chunk[element / kWidth].value[element % kWidth] = from_float<T>(value);
  }

  // Rows `pitch` elements apart.
  __device__ void store(T* target, int64_t m0, const Raw& raw, int pitch) const {
    if constexpr (kVector) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (holds(m0, j * kWidth)) {
          *reinterpret_cast<uint4*>(target + row(m0, 0) * pitch + channel(j * kWidth)) = raw.chunk[j].bits;
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (holds(m0, e)) target[row(m0, e) * pitch + channel(0)] = raw.chunk[e / kWidth].value[e % kWidth];
      }
    }
  }
  __device__ void store(T* target, int64_t m0, const Raw& raw) const { store(target, m0, raw, C); }

  // Writes the tile's mask words, one a row; bit e of `on` is the thread's element e. Elements outside of the
  // matrix must come with their bit off, and do where it is that of relu_gate(0). The whole warp takes part.
  __device__ void store_mask(uint32_t* mask, int64_t m0, uint32_t on) const {  // [panels, M]
    uint32_t word = 0;
    if constexpr (kVector) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) word |= (on >> j * kWidth & ((1u << kWidth) - 1)) << slot(j * kWidth);
      word |= __shfl_xor_sync(kAllLanes, word, 1);
      word |= __shfl_xor_sync(kAllLanes, word, 2);
      if (lane % 4 == 0 && row(m0, 0) < end) mask[panel * M + row(m0, 0)] = word;
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const uint32_t ballot = __ballot_sync(kAllLanes, on >> e & 1u);
        if (lane == e) word = ballot;
      }
      if (lane < kTileRows && m0 + lane < end) mask[panel * M + m0 + lane] = word;
    }
  }

  // What a thread loads of the tile's mask: its own row's word with its first element at bit 0 if kVector,
  // else the word of row m0 + lane % 8.
  __device__ uint32_t load_mask(const uint32_t* mask, int64_t m0) const {
    const int64_t m = m0 + (kVector ? lane / 4 : lane % kTileRows);
    const uint32_t word = m < end ? __ldg(mask + panel * M + m) : 0;
    return kVector ? word >> lane % 4 * kWidth : word;
  }
  // An element's bit of what load_mask gave. The whole warp takes part.
  __device__ bool bit(uint32_t word, int element) const {
    if constexpr (kVector) return word >> (element / kWidth * 4 * kWidth + element % kWidth) & 1u;
    return __shfl_sync(kAllLanes, word, element) >> lane & 1u;
  }
};

}  // namespace resnet_fused
