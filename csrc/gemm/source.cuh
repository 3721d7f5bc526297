// Where a tile's elements come from: copies of one k tile after the other, and the prologue on each.
//
// A thread transforms the chunks that it has copied itself, but reads mask words that others have: those are
// copied a tile ahead (load_mask), so that a barrier lies between. In shared memory they are [panel][pixel].
#pragma once

#include "gemm/prologue.cuh"

namespace resnet_fused {

// The prologue on a thread's chunks of a tile; `outside(row)` is whether a row is beyond the matrix, and
// stays zero. `channel` is that of the thread's chunks.
template <class Tile, class Bytes, class Prologue, class Outside>
__device__ void transform_chunks(const typename Prologue::Params& p, uint32_t slot, int channel, int thread,
                                 Outside outside) {
  const Prologue prologue(p, channel);
  const int chunk = Tile::chunk(thread);
  const uint32_t own = slot + Tile::own(thread, 0);
  const uint32_t words =
      slot + Bytes::kMask + (chunk / 4 * Bytes::kPanelWords + Tile::row(thread, 0)) * 4 + chunk % 4;
#pragma unroll
  for (int i = 0; i < Tile::kCount; ++i) {
    const uint32_t at = own + i * Tile::kStep * Tile::kRowBytes;
    uint4 u = {};
    uint32_t bits = 0;
    if constexpr (Prologue::kSecond) u = load_shared(at + Bytes::kSecond);
    if constexpr (Prologue::kMask) {
      if (prologue.masked) bits = load_shared_byte(words + i * Tile::kStep * 4);
    }
    const uint4 transformed = prologue(load_shared(at), u, bits);
    if (!outside(Tile::row(thread, i))) store_shared(at, transformed);
  }
}

// Rows of X [rows, K] with k along the tile's rows: the activation of a `rows` kernel, or weights [N, K].
// Rows past the end are copies of the last one (what is made of them is never stored), channels past K are
// zero.
template <class Tile, class Bytes>
struct AlongRows {
  static constexpr int kPanels = Tile::kCols / kPanel;  // of a tile
  const char* row[Tile::kCount];                        // a thread's chunks in the next tile
  int64_t second = 0;                                   // bytes from X to the second tensor
  const uint32_t* mask =
      nullptr;  // the word of this thread's row in the next tile of the mask; null without one
  int mask_k;   // of that tile
  int k, K;     // of this thread's chunk in the next tile; where X ends
  int rows;
  int first;

  __device__ void begin(const void* x, int K_, int first_, int rows_, const PixelMap& map, int thread) {
    K = K_, first = first_, rows = rows_;
    k = Tile::chunk(thread) * 8;
    if constexpr (Bytes::kHasMask) mask = nullptr;
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) {
      const int m = min(first + Tile::row(thread, i), rows - 1);
      row[i] = static_cast<const char*>(x) + (source_row(map, m) * K + k) * 2;
    }
  }
  template <class Prologue>
  __device__ void begin_prologue(const typename Prologue::Params& p, const void* x, int thread) {
    if constexpr (Prologue::kSecond) {
      second = static_cast<const char*>(Prologue::second(p)) - static_cast<const char*>(x);
    }
    if constexpr (Prologue::kMask) {
      mask = Prologue::mask(p);
      if (mask) mask += min(first + thread, rows - 1);
      mask_k = 0;
    }
  }

  // Returns the size of the thread's copies: 0 past K.
  __device__ int load(uint32_t slot, int thread) {
    const int bytes = k < K ? 16 : 0;
    load(slot, thread, bytes);
    k += Tile::kCols;
    return bytes;
  }
  __device__ void load(uint32_t slot, int thread, int bytes) {
    const uint32_t to = slot + Tile::own(thread, 0);
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) {
      const uint32_t at = to + i * Tile::kStep * Tile::kRowBytes;
      copy_async(at, row[i], bytes);
      if constexpr (Bytes::kHasSecond) copy_async(at + Bytes::kSecond, row[i] + second, bytes);
      row[i] += Tile::kRowBytes;
    }
  }
  // Of the tile after the one that is loaded.
  __device__ void load_mask(uint32_t slot, int thread) {
    if constexpr (Bytes::kHasMask) {
      static_assert(Tile::kRows <= Tile::kStep * Tile::kAcross, "a row a thread");
      if (!mask || thread >= Tile::kRows) return;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {  // one that does not exist has no words
        const uint32_t to = slot + Bytes::kMask + (panel * Bytes::kPanelWords + thread) * 4;
        copy_async_word(to, mask, mask_k < K ? 4 : 0);
        mask += rows;
        mask_k += kPanel;
      }
    }
  }

  // On the tile whose first channel is k0, of which this thread's copies have landed.
  template <class Prologue>
  static __device__ void transform(const typename Prologue::Params& p, uint32_t slot, int k0, int K,
                                   int thread) {
    if constexpr (Prologue::kTransforms) {
      const int channel = k0 + 8 * Tile::chunk(thread);
      if (channel >= K) return;
      transform_chunks<Tile, Bytes, Prologue>(p, slot, channel, thread, [](int) { return false; });
    }
  }
};

// Rows of X [rows, C] with k down the tile's rows: pixels of an activation in a `pixels` kernel, or weights
// [K, N]. Rows past the end are zero, channels past C are copies. kStrided: X's rows go through a map.
template <class Tile, class Bytes, bool kStrided = false>
struct DownRows {
  const char* x;
  const char* row[Tile::kCount];  // where rows come as they are
  int64_t second = 0;
  const uint32_t* mask = nullptr;  // a word of this thread's in the next tile of the mask; null without one
  int C, end;                      // of X: channels, one past the last row
  int channel;                     // of this thread's chunks
  int k;                           // this thread's first row in the next tile
  int pixel;                       // of that word

  __device__ void begin(const void* x_, int C_, int first, int k_, int end_, int thread) {
    C = C_, end = end_;
    channel = min(first + 8 * Tile::chunk(thread), C - 8);
    k = k_ + Tile::row(thread, 0);
    x = static_cast<const char*>(x_) + channel * 2;
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) row[i] = x + 2 * static_cast<int64_t>(C) * (k + i * Tile::kStep);
  }
  template <class Prologue>
  __device__ void begin_prologue(const typename Prologue::Params& p, const void* from, int first, int k_,
                                 int rows, int thread) {
    if constexpr (Prologue::kSecond) {
      second = static_cast<const char*>(Prologue::second(p)) - static_cast<const char*>(from);
    }
    if constexpr (Prologue::kMask) {
      static_assert(Tile::kRows * Tile::kCols / kPanel <= Tile::kStep * Tile::kAcross, "a word a thread");
      const int panel = min(first / kPanel + thread / Tile::kRows, (C - 1) / kPanel);
      pixel = k_ + thread % Tile::kRows;
      mask = Prologue::mask(p);
      if (mask) mask += static_cast<int64_t>(panel) * rows + pixel;
    }
  }

  // Bytes to the next tile.
  __device__ int64_t step() const { return 2 * static_cast<int64_t>(Tile::kRows) * C; }
  __device__ void load(uint32_t slot, const PixelMap& map, int thread) { load(slot, map, thread, step()); }
  __device__ void load(uint32_t slot, const PixelMap& map, int thread, int64_t step) {
    const uint32_t to = slot + Tile::own(thread, 0);
#pragma unroll
    for (int i = 0; i < Tile::kCount; ++i) {
      const uint32_t at = to + i * Tile::kStep * Tile::kRowBytes;
      const int bytes = k < end - i * Tile::kStep ? 16 : 0;
      const char* from = row[i];
      if constexpr (kStrided) from = x + 2 * static_cast<int64_t>(C) * source_row(map, k + i * Tile::kStep);
      copy_async(at, from, bytes);
      if constexpr (Bytes::kHasSecond) copy_async(at + Bytes::kSecond, from + second, bytes);
      if constexpr (!kStrided) row[i] += step;
    }
    k += Tile::kRows;
  }
  // Of the tile after the one that is loaded.
  __device__ void load_mask(uint32_t slot, int thread) {
    if constexpr (Bytes::kHasMask) {
      if (!mask || thread >= Tile::kRows * Tile::kCols / kPanel) return;
      const int word = thread / Tile::kRows * Bytes::kPanelWords + thread % Tile::kRows;
      copy_async_word(slot + Bytes::kMask + word * 4, mask, pixel < end ? 4 : 0);
      mask += Tile::kRows;
      pixel += Tile::kRows;
    }
  }

  // On the tile whose first row is k0.
  template <class Prologue>
  __device__ void transform(const typename Prologue::Params& p, uint32_t slot, int k0, int thread) const {
    if constexpr (Prologue::kTransforms) {
      const int left = end - k0;
      transform_chunks<Tile, Bytes, Prologue>(p, slot, channel, thread, [=](int r) { return r >= left; });
    }
  }
};

}  // namespace resnet_fused
