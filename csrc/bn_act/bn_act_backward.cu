#include "bn_act/bn_act.h"
#include "common/reduce.cuh"

namespace resnet_fused {

// dz = dy * relu'(z), with relu' from the bit mask, or from the sign of scale*x + shift, or 1.
template <typename T, bool kVector>
struct Gradient {
  using View = Tile<T, kVector>;
  const ReluGate& gate;
  float scale[View::kChannels], shift[View::kChannels];

  __device__ Gradient(const ReluGate& gate, const View& tile) : gate(gate) {
#pragma unroll
    for (int i = 0; i < View::kChannels; ++i) scale[i] = shift[i] = 0.0f;
    if (gate.scale) {
      tile.coefficients(gate.scale, scale);
      tile.coefficients(gate.shift, shift);
    }
  }
  __device__ uint32_t word(const View& tile, int64_t m0) const {
    return gate.mask ? tile.load_mask(gate.mask, m0) : kAllLanes;
  }
  // The whole warp takes part.
  __device__ float dz(const View& tile, float dy, float x, uint32_t word, int element) const {
    bool open = tile.bit(word, element);
    if (gate.scale && !gate.mask)
      open = relu_gate(fmaf(scale[View::of(element)], x, shift[View::of(element)]));
    return open ? dy : 0.0f;
  }
};

template <typename T, bool kVector>
__device__ void reduce_rows(const BnActBackwardReduceParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  const Gradient<T, kVector> gradient(p.io.gate, tile);
  const T* dy = static_cast<const T*>(p.io.dy);
  const T* x = static_cast<const T*>(p.io.x);
  T* dz = static_cast<T*>(p.io.dz);
  float mean[View::kChannels] = {};
  if (p.io.mean) tile.coefficients(p.io.mean, mean);
  float sums[2][View::kChannels] = {};  // of dz and of dz * (x - mean)

  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw dys[kStaged], xs[kStaged];
    uint32_t words[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      dys[u] = tile.load(dy, m0 + u * tile.step, p.io.dy_pitch);
      if (x) xs[u] = tile.load(x, m0 + u * tile.step);
      words[u] = gradient.word(tile, m0 + u * tile.step);
    }
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      typename View::Raw out;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {  // beyond the end dy was loaded as 0, and adds nothing
        const float value = View::get(xs[u], e);
        const float d = gradient.dz(tile, View::get(dys[u], e), value, words[u], e);
        sums[0][View::of(e)] += d;
        sums[1][View::of(e)] = fmaf(d, value - mean[View::of(e)], sums[1][View::of(e)]);
        View::set(out, e, d);
      }
      if (dz) tile.store(dz, m0 + u * tile.step, out);
    }
  }
  write_block_sums(tile, sums, p.rows.warps_across, p.io.mean ? 2 : 1, p.io.workspace);
}

template <typename T, bool kVector>
__device__ void apply_rows(const BnActBackwardApplyParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  const Gradient<T, kVector> gradient(p.io.gate, tile);
  const T* dy = static_cast<const T*>(p.io.dy);
  const T* x = static_cast<const T*>(p.io.x);
  float mean[View::kChannels], coef_dz[View::kChannels], coef_x[View::kChannels], coef_1[View::kChannels];
  tile.coefficients(p.io.mean, mean);
  tile.coefficients(p.io.coef_dz, coef_dz);
  tile.coefficients(p.io.coef_x, coef_x);
  tile.coefficients(p.io.coef_1, coef_1);
  const T* addend = static_cast<const T*>(p.io.addend);

  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw dys[kStaged], xs[kStaged], addends[kStaged];
    uint32_t words[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      dys[u] = tile.load(dy, m0 + u * tile.step);
      xs[u] = tile.load(x, m0 + u * tile.step);
      if (addend) addends[u] = tile.load(addend, m0 + u * tile.step);
      words[u] = gradient.word(tile, m0 + u * tile.step);
    }
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      typename View::Raw out;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int i = View::of(e);
        const float value = View::get(xs[u], e);
        const float d = gradient.dz(tile, View::get(dys[u], e), value, words[u], e);
        float dx = fmaf(coef_dz[i], d, fmaf(coef_x[i], value - mean[i], coef_1[i]));
        if (addend) dx += View::get(addends[u], e);
        View::set(out, e, dx);
      }
      tile.store(static_cast<T*>(p.io.dx), m0 + u * tile.step, out);
    }
  }
}

RESNET_FUSED_TAIL_KERNELS(bn_act_backward_reduce, 2, BnActBackwardReduceParams, reduce_rows);
RESNET_FUSED_TAIL_KERNELS(bn_act_backward_apply, 2, BnActBackwardApplyParams, apply_rows);

}  // namespace resnet_fused
