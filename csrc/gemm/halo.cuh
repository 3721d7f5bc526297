// The operand of a k x k convolution in shared memory: see taps.h.
#pragma once

#include "gemm/source.cuh"
#include "gemm/taps.h"

namespace resnet_fused {

// A block's outputs and their source, in one phase.
struct Window {
  int m0, last;   // its first and last output
  int lo, count;  // the halo: pixels lo .. lo + count - 1 of the source, of which some may not exist
};

// The source pixel of the first tap of output m = (n, i, j).
struct FirstTap {
  int pixel;
  int i, j;  // its row and column in the image; may be outside
  __device__ FirstTap(const TapsSource& s, const TapsPhase& p, int m) {
    const uint32_t row = divide(m, p.Q), image = divide(row, p.P);
    i = static_cast<int>(row - image * p.P.divisor) * s.stride + p.row;
    j = static_cast<int>(m - row * p.Q.divisor) * s.stride + p.col;
    pixel = (static_cast<int>(image) * s.H + i) * s.W + j;
  }
};

__device__ inline Window window_of(const TapsSource& s, const TapsPhase& p, int m0, int rows) {
  const int last = min(m0 + rows, p.M) - 1;
  const int down = (p.rows - 1) * s.step_row * s.W, across = (p.cols - 1) * s.step_col;
  int lo = FirstTap(s, p, m0).pixel, hi = FirstTap(s, p, last).pixel;
  if (p.folds) {  // a row's or an image's first output may read lower pixels, its last one higher ones
    const int row = p.Q.divisor, image = p.P.divisor * row;
    for (const int size : {row, image}) {
      const int next = (m0 / size + 1) * size, before = last / size * size - 1;
      if (next <= last) lo = min(lo, FirstTap(s, p, next).pixel);
      if (before >= m0) hi = max(hi, FirstTap(s, p, before).pixel);
    }
  }
  lo += min(down, 0) + min(across, 0);
  hi += max(down, 0) + max(across, 0);
  return {m0, last, lo, hi - lo + 1};
}

// Where a pixel of the halo lies, in pixels. With stride 2 a tap's outputs read every second pixel: even ones
// and odd ones lie apart, so that those are neighbours.
__device__ inline int halo_slot(int pixel, int stride, int halo) {
  return stride == 1 ? pixel : (pixel >> 1) + (pixel & 1) * (halo >> 1);
}

// Copies and transforms the halo, round by round: in a round every thread has one 16-byte chunk. Four threads
// share a pixel.
template <class Prologue, int kThreads>
class HaloSource {
 public:
  static constexpr int kPixels = kThreads / 4;  // of a round

  __device__ HaloSource(const TapsSource& s, const typename Prologue::Params& p, const HaloBuffers& shared,
                        const Window& window, int first_channel, int end_channel, int thread)
      : p_(p), pixels_(s.pixels), end_(end_channel), transforms_(s.transforms) {
    // Of eight neighbouring pixels, a quarter of a warp takes two that are four apart: no bank conflict.
    const int quad = thread / 4, pixel = (quad & ~7) | (quad & 7) >> 1 | (quad & 1) << 2;
    chunk_ = thread % 4;
    pixel_ = window.lo + pixel;
    limit_ = window.lo + window.count;
    channel_ = first_channel + 8 * chunk_;
    own_ = halo_slot(pixel, s.stride, shared.halo) * kPixelBytes + 16 * chunk_;
    step_ = kPixels / s.stride * kPixelBytes;
    from_ = static_cast<const char*>(s.x) + (static_cast<int64_t>(pixel_) * s.C + channel_) * 2;
    round_ = static_cast<int64_t>(kPixels) * s.C * 2;
    rounds_ = (window.count + kPixels - 1) / kPixels;
    if constexpr (Prologue::kSecond) {
      if (transforms_) {
        second_ = static_cast<const char*>(Prologue::second(p)) - static_cast<const char*>(s.x);
      }
    }
  }

  __device__ int rounds() const { return rounds_; }

  // Rounds `begin` to `end` of the slice whose first channel is `slice` channels behind the first.
  __device__ void load(uint32_t buffer, uint32_t second, int slice, int begin, int end) const {
    const int channel = channel_ + slice, bytes = channel < end_ ? 16 : 0;
    const char* from = from_ + begin * round_ + slice * 2;
    uint32_t to = own_ + begin * step_;
    const uint32_t* words = nullptr;
    if constexpr (Prologue::kMask) {
      if (transforms_ && Prologue::mask(p_) && bytes) {
        words = Prologue::mask(p_) + static_cast<int64_t>(channel / kPanel) * pixels_;
      }
    }
#pragma unroll 1
    for (int i = begin; i < end; ++i, from += round_, to += step_) {
      const int pixel = pixel_ + i * kPixels;
      if (!exists(pixel)) continue;
      copy_async(buffer + to, from, bytes);
      if constexpr (Prologue::kSecond) {
        if (transforms_) copy_async(second + to, from + second_, bytes);
      }
      if constexpr (Prologue::kMask) {
        if (words) copy_async_word(buffer + word_of(to), words + pixel, 4);
      }
    }
  }

  // What this thread has copied so, and waited for.
  __device__ void transform(uint32_t buffer, uint32_t second, int slice, int begin, int end) const {
    const int channel = channel_ + slice;
    if (!transforms_ || begin >= end || channel >= end_) return;
    const Prologue prologue(p_, channel);
    uint32_t at = own_ + begin * step_;
#pragma unroll 1
    for (int i = begin; i < end; ++i, at += step_) {
      if (!exists(pixel_ + i * kPixels)) continue;
      uint4 u = {};
      uint32_t bits = 0;
      if constexpr (Prologue::kSecond) u = load_shared(second + at);
      if constexpr (Prologue::kMask) {
        if (prologue.masked) bits = load_shared_byte(buffer + word_of(at) + (channel / 8) % 4);
      }
      store_shared(buffer + at, prologue(load_shared(buffer + at), u, bits));
    }
  }

 private:
  __device__ bool exists(int pixel) const {
    return pixel < limit_ && static_cast<uint32_t>(pixel) < static_cast<uint32_t>(pixels_);
  }
  __device__ uint32_t word_of(uint32_t at) const { return at - 12 * chunk_ + 2 * kSliceChannels; }

  const typename Prologue::Params& p_;
  const char* from_;
  int64_t round_, second_ = 0;  // bytes from a round to the next, and to the second tensor
  uint32_t own_, step_;
  int pixel_, limit_, pixels_, chunk_, channel_, end_, rounds_, transforms_;
};

// Reads mma's fragments of the halo for a warp: rows are outputs, whose pixels each tap shifts.
template <class S>
class HaloFragments {
 public:
  uint32_t address[S::kGroupsM];  // of this lane's row in the present tap

  __device__ HaloFragments(const TapsSource& s, const TapsPhase& p, const Window& window, int halo,
                           uint32_t zeros, int first, int lane)
      : zeros_(zeros) {
#pragma unroll
    for (int g = 0; g < S::kGroupsM; ++g) {
      const FirstTap at(s, p, min(first + g * 16 + lane % 16, window.last));
      const int pixel = at.pixel - window.lo;
      even_[g] = halo_slot(pixel, s.stride, halo) * kPixelBytes + lane / 16 * 16;
      odd_[g] = even_[g];
      if (s.stride == 2) {  // an odd shift changes sides
        odd_[g] = (pixel & 1 ? (pixel + 1) / 2 : pixel / 2 + halo / 2) * kPixelBytes + lane / 16 * 16;
      }
      inside_[g] = 0;
      for (int r = 0; r < p.rows; ++r) {
        inside_[g] |=
            static_cast<uint32_t>(static_cast<uint32_t>(at.i + r * s.step_row) < static_cast<uint32_t>(s.H))
            << r;
      }
      for (int c = 0; c < p.cols; ++c) {
        inside_[g] |=
            static_cast<uint32_t>(static_cast<uint32_t>(at.j + c * s.step_col) < static_cast<uint32_t>(s.W))
            << (kMaxTapRows + c);
      }
    }
  }

  // On to a tap: `shift` pixels from the first, whose row and column are the bits of `tap`.
  __device__ void turn(uint32_t buffer, int shift, int stride, uint32_t tap) {
    const bool odd = stride == 2 && shift & 1;
    const uint32_t to = buffer + (stride == 2 ? shift >> 1 : shift) * kPixelBytes;
#pragma unroll
    for (int g = 0; g < S::kGroupsM; ++g) {
      const uint32_t at = (odd ? odd_[g] : even_[g]) + to;
      address[g] = (inside_[g] & tap) == tap ? at : zeros_ | (at & 0x70);
    }
  }
  __device__ void load(uint32_t (&r)[4], uint32_t, int group, int k16) const {
    load_matrices<false>(r, address[group] + 32 * k16);
  }

 private:
  uint32_t zeros_;
  uint32_t even_[S::kGroupsM], odd_[S::kGroupsM];
  uint32_t inside_[S::kGroupsM];  // which kernel rows and columns are inside of the image
};

}  // namespace resnet_fused
