// Mean and sum of squared deviations of every channel, chunk by chunk, and their combination.
#pragma once

#include "../common/cpu.h"

namespace resnet_fused {

// Sums over `kTiles` tiles at a time, `stride` apart: the accumulators are read and written once for all.
template <int kTiles, class T, class Acc>
RF_INLINE void add_tiles(const T* __restrict x, int64_t stride, Acc* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Acc s = 0;
    for (int r = 0; r < kTiles; ++r) s += load(x[r * stride + i]);
    sum[i] += s;
  }
}

template <int kTiles, class T, class Acc>
RF_INLINE void add_centred(const T* __restrict x, int64_t stride, const Acc* __restrict centre,
                           Acc* __restrict sum, Acc* __restrict square, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Acc s = 0, q = 0;
    for (int r = 0; r < kTiles; ++r) {
      const Acc d = load(x[r * stride + i]) - centre[i];
      s += d;
      q += d * d;
    }
    sum[i] += s;
    square[i] += q;
  }
}

// Mean and M2 (the sum of squares about it) of one chunk: a first pass for the mean, a second about it
// while the chunk is in cache. The second also sums the deviations, which corrects what the first
// pass's mean lost to rounding.
template <class T>
struct ChunkMoments {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T* x;
  double* moments;  // [chunks, 2, C]

  RF_INLINE void operator()(int64_t chunk) const {
    const int64_t channels = tiling.channels, width = tiling.width();
    const double count = static_cast<double>(tiling.end(chunk) - tiling.begin(chunk));
    double* mean = moments + chunk * 2 * channels;
    double* m2 = mean + channels;

    AlignedBuffer<Acc> sums(width), squares(width), centres(width);
    Acc *sum = sums.data(), *square = squares.data(), *centre = centres.data();
    tiling.for_each_four_tiles(chunk, [&](int64_t m, int64_t c, int64_t n, int tiles) RF_LAMBDA {
      const T* from = x + m * channels + c;
      tiles == 4 ? add_tiles<4>(from, width, sum + c, n) : add_tiles<1>(from, width, sum + c, n);
    });
    fold(sum, tiling, mean);
    for (int64_t c = 0; c < channels; ++c) mean[c] = centre[c] = static_cast<Acc>(mean[c] / count);
    for (int64_t i = channels; i < width; ++i) centre[i] = centre[i - channels];

    std::fill(sum, sum + width, Acc(0));
    tiling.for_each_four_tiles(chunk, [&](int64_t m, int64_t c, int64_t n, int tiles) RF_LAMBDA {
      const T* from = x + m * channels + c;
      tiles == 4 ? add_centred<4>(from, width, centre + c, sum + c, square + c, n)
                 : add_centred<1>(from, width, centre + c, sum + c, square + c, n);
    });
    fold(square, tiling, m2);
    std::vector<double> residue(channels);
    fold(sum, tiling, residue.data());
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] += residue[c] / count;
      m2[c] -= residue[c] * residue[c] / count;
    }
  }
};

// Chan's parallel update over the chunks in order, for one block of channels.
template <class Acc>
struct CombineMoments {
  static constexpr int64_t kBlock = 64;
  const Tiling& tiling;
  const double* moments;
  Acc *mean, *var;

  RF_INLINE void operator()(int64_t block) const {
    const int64_t channels = tiling.channels, first = block * kBlock;
    const int64_t n = std::min(kBlock, channels - first);
    double total_mean[kBlock] = {}, total_m2[kBlock] = {};
    for (int64_t chunk = 0; chunk < tiling.chunks(); ++chunk) {
      const double before = static_cast<double>(tiling.begin(chunk)),
                   after = static_cast<double>(tiling.end(chunk));
      const double share = (after - before) / after, weight = before * share;
      const double* chunk_mean = moments + chunk * 2 * channels + first;
      const double* chunk_m2 = chunk_mean + channels;
      for (int64_t c = 0; c < n; ++c) {
        const double delta = chunk_mean[c] - total_mean[c];
        total_mean[c] += delta * share;
        total_m2[c] += chunk_m2[c] + delta * delta * weight;
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      mean[first + c] = static_cast<Acc>(total_mean[c]);
      var[first + c] = static_cast<Acc>(total_m2[c] / static_cast<double>(tiling.pixels));
    }
  }
};

template <class Acc>
void combine_moments(const Tiling& tiling, const double* moments, Acc* mean, Acc* var) {
  using Combine = CombineMoments<Acc>;
  run_chunks((tiling.channels + Combine::kBlock - 1) / Combine::kBlock, Combine{tiling, moments, mean, var});
}

}  // namespace resnet_fused
