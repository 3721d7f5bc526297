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
template <int kStride>
__device__ int halo_slot(int pixel, int halo) {
  return kStride == 1 ? pixel : (pixel >> 1) + (pixel & 1) * (halo >> 1);
}

// Where a thread stands in the rounds of a slice. In a round every thread has one 16-byte chunk of the halo;
// four threads share a pixel.
struct HaloCursor {
  uint32_t at;  // the chunk's place in a buffer
  int pixel;    // of the source
  int slice;    // channels from the block's first
  int left;     // rounds
  uint32_t buffer, second;
};

// Copies and transforms the halo.
template <class Prologue, int kThreads, int kStride>
class HaloSource {
 public:
  static constexpr int kPixels = kThreads / 4;  // of a round
  static constexpr uint32_t kStep = kPixels / kStride * kPixelBytes;

  __device__ HaloSource(const TapsSource& s, const typename Prologue::Params& p, const HaloBuffers& shared,
                        const Window& window, int first_channel, int end_channel, int thread)
      : p_(p), s_(s) {
    // A quarter of a warp takes two pixels that lie four apart in shared memory: no bank conflict.
    constexpr int kApart = 4 * kStride;
    const int quad = thread / 4, within = quad % (2 * kApart);
    const int pixel = quad - within + within / 2 + quad % 2 * kApart;
    chunk_ = thread % 4;
    first_ = window.lo + pixel;
    end_pixel_ = min(window.lo + window.count, s.pixels);
    channel_ = first_channel + 8 * chunk_;
    end_ = end_channel;
    own_ = halo_slot<kStride>(pixel, shared.halo) * kPixelBytes + 16 * chunk_;
    rounds_ = (window.count + kPixels - 1) / kPixels;
    from_ = static_cast<const char*>(s.x) + (static_cast<int64_t>(first_) * s.C + channel_) * 2;
    step_ = static_cast<int64_t>(kPixels) * s.C * 2;
  }

  __device__ int rounds() const { return rounds_; }
  // At the first round of a slice.
  __device__ HaloCursor begin(uint32_t buffer, uint32_t second, int slice) const {
    return {own_, first_, slice, rounds_, buffer, second};
  }

  __device__ void load(HaloCursor& c, int rounds) {
    const int channel = channel_ + c.slice, bytes = channel < end_ ? 16 : 0;
    int64_t second = 0;
    const uint32_t* words = nullptr;
    if constexpr (Prologue::kSecond) {
      if (s_.transforms) {
        second = static_cast<const char*>(Prologue::second(p_)) - static_cast<const char*>(s_.x);
        words = Prologue::mask(p_);
        if (words) words += static_cast<int64_t>(channel / kPanel) * s_.pixels;
      }
    }
    const bool masked = words;
    c.left -= rounds;
#pragma unroll 1
    for (; rounds > 0; --rounds) {
      if (exists(c.pixel)) {
        copy_async(c.buffer + c.at, from_, bytes);
        if constexpr (Prologue::kSecond) {
          if (s_.transforms) copy_async(c.second + c.at, from_ + second, bytes);
          if (masked) copy_async_word(c.buffer + word_of(c.at), words + c.pixel, bytes / 4);
        }
      }
      from_ += step_;
      next(c);
    }
  }
  // After a slice's last round: its first one, of the next slice.
  __device__ void rewind() { from_ += 2 * kSliceChannels - rounds_ * step_; }

  // What this thread has copied so, and waited for.
  __device__ void transform(HaloCursor& c, int rounds) const {
    const int channel = channel_ + c.slice;
    if (!s_.transforms || channel >= end_) return;
    const Prologue prologue(p_, channel);
    c.left -= rounds;
#pragma unroll 1
    for (; rounds > 0; --rounds) {
      if (exists(c.pixel)) {
        const uint32_t at = c.buffer + c.at;
        uint4 u = {};
        uint32_t bits = 0;
        if constexpr (Prologue::kSecond) u = load_shared(c.second + c.at);
        if constexpr (Prologue::kMask) {
          if (prologue.masked) bits = load_shared_byte(word_of(at) + (channel / 8) % 4);
        }
        store_shared(at, prologue(load_shared(at), u, bits));
      }
      next(c);
    }
  }

 private:
  __device__ static void next(HaloCursor& c) { c.at += kStep, c.pixel += kPixels; }
  __device__ bool exists(int pixel) const {
    return static_cast<uint32_t>(pixel) < static_cast<uint32_t>(end_pixel_);
  }
  __device__ uint32_t word_of(uint32_t at) const { return at - 12 * chunk_ + 2 * kSliceChannels; }

  const typename Prologue::Params& p_;
  const TapsSource& s_;
  const char* from_;  // of the cursor that loads
  int64_t step_;      // bytes from a round to the next
  uint32_t own_;
  int first_, end_pixel_, chunk_, channel_, end_, rounds_;
};

// Reads mma's fragments of the halo for a warp: rows are outputs, whose pixels each tap shifts.
template <class S, int kStride>
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
      even_[g] = halo_slot<kStride>(pixel, halo) * kPixelBytes + lane / 16 * 16;
      if constexpr (kStride == 2) {  // an odd shift changes sides
        odd_[g] = (pixel & 1 ? (pixel + 1) / 2 : pixel / 2 + halo / 2) * kPixelBytes + lane / 16 * 16;
      }
      outside_[g] = 0;
      for (int r = 0; r < p.rows; ++r) {
        outside_[g] |= static_cast<uint32_t>(outside(at.i + r * s.step_row, s.H)) << r;
      }
      for (int c = 0; c < p.cols; ++c) {
        outside_[g] |= static_cast<uint32_t>(outside(at.j + c * s.step_col, s.W)) << (kMaxTapRows + c);
      }
    }
  }

  // On to a tap: `shift` pixels from the first, whose row and column are the bits of `tap`.
  __device__ void turn(uint32_t buffer, int shift, uint32_t tap) {
    const uint32_t to = buffer + (shift >> (kStride - 1)) * kPixelBytes;
#pragma unroll
    for (int g = 0; g < S::kGroupsM; ++g) {
      const uint32_t at = (kStride == 2 && shift & 1 ? odd_[g] : even_[g]) + to;
      address[g] = outside_[g] & tap ? zeros_ | (at & 0x70) : at;
    }
  }
  __device__ void load(uint32_t (&r)[4], uint32_t, int group, int k16) const {
    load_matrices<false>(r, address[group] + 32 * k16);
  }

 private:
  __device__ static bool outside(int at, int size) {
    return static_cast<uint32_t>(at) >= static_cast<uint32_t>(size);
  }

  uint32_t zeros_;
  uint32_t even_[S::kGroupsM], odd_[kStride == 2 ? S::kGroupsM : 1];
  uint32_t outside_[S::kGroupsM];  // which kernel rows and columns are outside of the image
};

}  // namespace resnet_fused
