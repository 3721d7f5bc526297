// The k x k convolution of few channels, 1 to 7: that of images. Its plans, and what they share with the
// kernels.
//
// Chunks of eight channels do not exist here, and a pixel of the image starts at any element. In shared
// memory it has four or eight channels (`pad`), of which the last are zero, so that what a row of the kernel
// multiplies, S taps of pad channels, starts at a multiple of 16 bytes for every pixel of the output:
// ldmatrix reads it where it lies, and a pixel that S taps share is there once. k is R rows of S taps, each
// row filled up to a multiple of 16.
#pragma once

#include "conv2d/conv2d.h"

namespace resnet_fused {

constexpr int kFewChannels = 7, kFewTaps = 7;  // at most

// Output pixels, in the order of memory, by output channels. k is a step.
inline constexpr TileShape kFew{128, 64, 16, 32, 64};
// Of wgrad, by the channels that a pixel has: output channels by taps; k are pixels.
inline constexpr TileShape kFewWgrad4{64, 256, 64, 32, 64}, kFewWgrad8{64, 448, 64, 32, 112};

// An image [N, H, W, C] as the pixels of the output read it. A tile's pixels lie in lines, rows of the
// output; its patch in shared memory has, for each row of the kernel, what they read there, line after line:
// `stride_w` positions a pixel and `gap` more a line, so that pixel i of the tile starts at i*stride_w + gap
// * (lines before its own). Where two neighbouring starts are 8 bytes apart, a second plane has the same
// pixels 8 bytes earlier; where they are 32, even and odd positions have a plane each, so that ldmatrix meets
// no bank conflict.
struct FewImage {
  const void* x;
  int32_t H, W, C, R, S;
  int32_t stride_h, stride_w, padding_h, padding_w;
  int32_t M, lines;    // pixels and rows of the output
  int32_t steps;       // of 16 elements of k, in a row of the kernel
  int32_t gap;         // even
  int32_t plane;       // bytes; 0 where there is one
  int32_t pitch;       // bytes from a row of the kernel to the next
  Divider P, Q, line;  // line: positions of a whole one
};

struct FewFpropParams {
  FewImage image;
  const void* weight;  // [K, R, S, C]
  int32_t K;
  int32_t weight_pitch;  // bytes of a rearranged row of weights: an odd number of chunks, for the banks
  int32_t tiles;         // of a block
  StoreStats epilogue;
};

template <class Prologue>
struct FewWgradParams {
  FewImage image;
  const void* dy;  // [M, K]
  int32_t K;
  int32_t per_split;  // pixels
  Prologue prologue;
  float* partial;  // [splits, K, R, S, C]
};

Plan plan_conv2d_few(const Conv2dProblem& problem, int arch);
Plan plan_conv2d_wgrad_few(const Conv2dWgradProblem& problem, int arch);

}  // namespace resnet_fused
