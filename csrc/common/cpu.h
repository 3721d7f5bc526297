// How a CPU pass over a matrix [M, C] is cut into tiles and run: on every core, with the best
// instruction set that the machine has, and with results that do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dtype.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define RF_X86 1
#endif

namespace resnet_fused {

// Instruction sets with kernels of their own; anything that is not x86-64 has only the baseline.
enum class Isa : int { kBaseline, kAvx2, kAvx512 };

// The best one that the machine has, or a lower one set by resnet_fused_limit_isa.
Isa current_isa();

// A kernel is a struct whose always_inline operator()(chunk) const is plain C++. Inlined into each of
// these functions, it is vectorised for that function's instruction set.
template <class Kernel>
void run_baseline(const Kernel& kernel, int64_t chunk) {
  kernel(chunk);
}

#ifdef RF_X86
template <class Kernel>
__attribute__((target("avx2,fma"))) void run_avx2(const Kernel& kernel, int64_t chunk) {
  kernel(chunk);
}

template <class Kernel>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void
run_avx512(const Kernel& kernel, int64_t chunk) {
  kernel(chunk);
}
#endif

// Runs kernel(0) ... kernel(chunks - 1), in any order.
template <class Kernel>
void run_chunks(int64_t chunks, const Kernel& kernel) {
  auto run = &run_baseline<Kernel>;
#ifdef RF_X86
  const Isa isa = current_isa();
  run = isa == Isa::kAvx512 ? &run_avx512<Kernel> : isa == Isa::kAvx2 ? &run_avx2<Kernel> : run;
#endif
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) run(kernel, chunk);
  });
}

// A tile's intermediate values live in a buffer of this many elements, in the first-level cache.
constexpr int64_t kTileElements = 2048;
// Packing and unpacking of masks works on whole words and may pass the end of a tile by one.
constexpr int64_t kTileBuffer = kTileElements + 32;
// Elements of a chunk: small enough for the second-level cache, large enough to be worth a thread.
constexpr int64_t kChunkElements = 32768;
// Pixels of a reduction's chunk at the least, so that the per-chunk sums stay small beside the input.
constexpr int64_t kMinReductionPixels = 64;

// Cuts [M, C] into chunks of whole pixels, and a chunk into tiles of at most kTileElements. With few
// channels a tile is `group` whole pixels, handled as one long row whose per-channel vectors repeat
// with period C; with many it is (a segment of) one pixel. Depends on nothing but M and C.
struct Tiling {
  int64_t pixels, channels;
  int64_t group = 1;  // pixels of a tile
  int64_t chunk_pixels;

  Tiling(int64_t m, int64_t c, int64_t min_chunk_pixels = 1) : pixels(m), channels(c) {
    const bool ragged = c % 16 != 0;  // 16 pixels are then a whole number of vectors
    if (c < 256 && (!ragged || c < 128)) group = (256 + c - 1) / c;
    if (ragged && group > 1) group = (group + 15) / 16 * 16;
    chunk_pixels =
        std::max((kChunkElements / c + group - 1) / group * group, std::max(group, min_chunk_pixels));
  }

  int64_t width() const { return group * channels; }
  int64_t chunks() const { return (pixels + chunk_pixels - 1) / chunk_pixels; }
  int64_t begin(int64_t chunk) const { return chunk * chunk_pixels; }
  int64_t end(int64_t chunk) const { return std::min(pixels, begin(chunk) + chunk_pixels); }

  // Calls f(m, c, n) for each tile of a chunk: n elements from channel c of pixel m on.
  template <class F>
  RF_INLINE void for_each_tile(int64_t chunk, const F& f) const {
    for (int64_t m = begin(chunk); m < end(chunk); m += group) for_each_segment(m, end(chunk), f);
  }

  // Calls f(m, i, width) for each pixel m of a tile of n elements: those from the tile's i-th on.
  template <class F>
  RF_INLINE void for_each_pixel(int64_t m, int64_t n, const F& f) const {
    const int64_t width = std::min(n, channels);
    for (int64_t i = 0; i < n; i += width, ++m) f(m, i, width);
  }

  // The same with four tiles at a time, width() apart, as long as there are four: f(m, c, n, tiles).
  template <class F>
  RF_INLINE void for_each_four_tiles(int64_t chunk, const F& f) const {
    const int64_t last = end(chunk);
    int64_t m = begin(chunk);
    for (; m + 4 * group <= last; m += 4 * group) {
      for_each_segment(m, last, [&](int64_t at, int64_t c, int64_t n) RF_LAMBDA { f(at, c, n, 4); });
    }
    for (; m < last; m += group) {
      for_each_segment(m, last, [&](int64_t at, int64_t c, int64_t n) RF_LAMBDA { f(at, c, n, 1); });
    }
  }

 private:
  template <class F>
  RF_INLINE void for_each_segment(int64_t m, int64_t last, const F& f) const {
    if (group > 1) return f(m, int64_t{0}, std::min(group, last - m) * channels);
    for (int64_t c = 0; c < channels; c += kTileElements) f(m, c, std::min(kTileElements, channels - c));
  }
};

// Zeroed elements that start on a cache line: a vector of accumulators that straddles two lines costs
// several times one that does not.
template <class Acc>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t size) : lines_((size + kPerLine - 1) / kPerLine) {}
  Acc* data() { return lines_.empty() ? nullptr : lines_.front().values; }

 private:
  static constexpr int64_t kPerLine = 64 / sizeof(Acc);
  struct alignas(64) Line {
    Acc values[kPerLine] = {};
  };
  std::vector<Line> lines_;
};

// A per-channel vector [C] repeated for every pixel of a tile: [group * C].
template <class Acc>
class PerChannel {
 public:
  PerChannel(const void* vector, const Tiling& tiling) : data_(static_cast<const Acc*>(vector)) {
    if (vector == nullptr || tiling.group == 1) return;
    repeated_.resize(tiling.width());
    for (int64_t i = 0; i < tiling.width(); ++i) repeated_[i] = data_[i % tiling.channels];
    data_ = repeated_.data();
  }
  PerChannel(const PerChannel&) = delete;
  operator const Acc*() const { return data_; }

 private:
  std::vector<Acc> repeated_;
  const Acc* data_;
};

// sum[c] of the `group` partial sums of each channel in wide[group * C].
template <class Acc>
RF_INLINE void fold(const Acc* wide, const Tiling& tiling, double* sum) {
  for (int64_t c = 0; c < tiling.channels; ++c) sum[c] = wide[c];
  for (int64_t g = 1; g < tiling.group; ++g) {
    for (int64_t c = 0; c < tiling.channels; ++c) sum[c] += wide[g * tiling.channels + c];
  }
}

// out[c] = (the sum over the chunks, in order, of partials[chunk * stride + c]) / divisor.
template <class Acc>
void sum_partials(const double* partials, int64_t chunks, int64_t stride, int64_t channels, Acc* out,
                  double divisor = 1.0) {
  std::vector<double> sum(channels);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < channels; ++c) sum[c] += partials[chunk * stride + c];
  }
  for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<Acc>(sum[c] / divisor);
}

}  // namespace resnet_fused
