// What the plans of k x k convolutions share. Host code only.
#pragma once

#include <iterator>

#include "conv2d/conv2d.h"
#include "gemm/planning.h"
#include "gemm/taps.h"

namespace resnet_fused {

// A k x k convolution's geometry as taps kernels take it.
struct Taps {
  TapsSource source;
  TapsWeight weight;
  int32_t N;
  int32_t out_stride, out_H, out_W;
  int32_t phases;
  TapsPhase phase[kMaxPhases];

  int64_t row_tiles;  // of all phases
  HaloBuffers shared;
  const TileShape* tile;  // null, with the plan's reason set, where no kernel takes the problem
};

// out [N, P, Q, K] of x, or dx [N, H, W, C] of dy. two: the prologue loads a second tensor. wanted: a tile's
// number, or 0.
Taps fprop_taps(Plan& plan, const char* op, const ConvShape& shape, int arch, const void* x,
                const void* weight, bool transforms, int wanted);
Taps dgrad_taps(Plan& plan, const char* op, const ConvShape& shape, int arch, const void* dy,
                const void* weight, bool transforms, int wanted);

template <class Prologue, class Epilogue>
void add_taps(Plan& plan, const char* source, const char* name, DType dtype, const Taps& t,
              const Prologue& prologue, const Epilogue& epilogue) {
  TapsParams<Prologue, Epilogue> params{t.source, t.weight, t.shared, t.N,      t.out_stride, t.out_H,
                                        t.out_W,  t.phases, {},       prologue, epilogue};
  std::copy(std::begin(t.phase), std::end(t.phase), params.phase);
  Step& step = append_gemm(plan, source, name, dtype, *t.tile, {}, t.row_tiles * ceil_div(t.N, t.tile->n), 1);
  step.smem = static_cast<uint32_t>(std::max(taps_bytes(*t.tile, t.shared), taps_epilogue_bytes(*t.tile)));
  set_params(step, params);
}

}  // namespace resnet_fused
