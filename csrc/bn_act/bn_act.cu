#include "bn_act/bn_act.h"
#include "common/tile.cuh"

namespace resnet_fused {

template <typename T, bool kVector, bool kPadded>
__device__ void affine_rows(const BnActParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  const T* x = static_cast<const T*>(p.io.x);
  const T* residual = static_cast<const T*>(p.io.residual);
  float scale[View::kChannels], shift[View::kChannels], residual_scale[View::kChannels];
  tile.coefficients(p.io.scale, scale);
  tile.coefficients(p.io.shift, shift);
#pragma unroll
  for (int i = 0; i < View::kChannels; ++i) residual_scale[i] = 1.0f;
  if (p.io.residual_scale) {  // z = scale*x + residual_scale*residual + (shift + residual_shift)
    float residual_shift[View::kChannels];
    tile.coefficients(p.io.residual_scale, residual_scale);
    tile.coefficients(p.io.residual_shift, residual_shift);
#pragma unroll
    for (int i = 0; i < View::kChannels; ++i) shift[i] += residual_shift[i];
  }

  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw xs[kStaged], rs[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      xs[u] = tile.load(x, m0 + u * tile.step);
      if constexpr (kPadded) {
        rs[u] = tile.load(residual, m0 + u * tile.step, p.io.padded);
      } else if (residual) {
        rs[u] = tile.load(residual, m0 + u * tile.step);
      }
    }
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      uint32_t on = 0;
      typename View::Raw out;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        float z = fmaf(scale[View::of(e)], View::get(xs[u], e), shift[View::of(e)]);
        if (residual) z = fmaf(residual_scale[View::of(e)], View::get(rs[u], e), z);
        on |= relu_gate(z) << e;
        View::set(out, e, p.io.relu ? relu(z) : z);
      }
      tile.store(static_cast<T*>(p.io.y), m0 + u * tile.step, out, p.io.y_pitch);
      if (p.io.mask) tile.store_mask(p.io.mask, m0 + u * tile.step, on);
    }
  }
}

template <typename T, bool kVector>
__device__ void bn_act_rows(const BnActParams& p) {
  affine_rows<T, kVector, false>(p);
}
template <typename T, bool kVector>
__device__ void bn_act_padded_rows(const BnActParams& p) {
  affine_rows<T, kVector, true>(p);
}

template <typename T, bool kVector>
__device__ void relu_mask_rows(const ReluMaskParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw ys[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) ys[u] = tile.load(static_cast<const T*>(p.io.y), m0 + u * tile.step);
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      uint32_t on = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) on |= relu_gate(View::get(ys[u], e)) << e;
      tile.store_mask(p.io.mask, m0 + u * tile.step, on);
    }
  }
}

RESNET_FUSED_TAIL_KERNELS(bn_act, 3, BnActParams, bn_act_rows);
RESNET_FUSED_TAIL_KERNELS(bn_act_padded, 3, BnActParams, bn_act_padded_rows);
RESNET_FUSED_TAIL_KERNELS(relu_mask, 3, ReluMaskParams, relu_mask_rows);

}  // namespace resnet_fused
