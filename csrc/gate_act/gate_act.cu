#include "common/tile.cuh"
#include "gate_act/gate_act.h"

namespace resnet_fused {

// g = sigmoid(v) and 1 - g, neither of them by subtracting from 1.
struct Gate {
  float g, rest;
  __device__ explicit Gate(float v) {
    const float e = expf(-fmaxf(v, -80.0f));  // larger ones would overflow in the product
    g = __fdividef(1.0f, 1.0f + e);
    rest = e * g;
    if (v != v) g = rest = v;  // fmaxf drops a NaN
  }
};

template <typename T, bool kVector>
__device__ void gate_rows(const GateActParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  const T *v = static_cast<const T*>(p.io.v), *x = static_cast<const T*>(p.io.x),
          *f = static_cast<const T*>(p.io.f);
  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw vs[kStaged], xs[kStaged], fs[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      vs[u] = tile.load(v, m0 + u * tile.step);
      xs[u] = tile.load(x, m0 + u * tile.step);
      fs[u] = tile.load(f, m0 + u * tile.step);
    }
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      uint32_t on = 0;
      typename View::Raw out;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const Gate gate(View::get(vs[u], e));
        const float z = fmaf(gate.rest, View::get(xs[u], e), gate.g * View::get(fs[u], e));
        on |= relu_gate(z) << e;
        View::set(out, e, p.io.relu ? relu(z) : z);
      }
      tile.store(static_cast<T*>(p.io.y), m0 + u * tile.step, out);
      if (p.io.mask) tile.store_mask(p.io.mask, m0 + u * tile.step, on);
    }
  }
}

template <typename T, bool kVector>
__device__ void gate_backward_rows(const GateActBackwardParams& p) {
  using View = Tile<T, kVector>;
  const View tile(p.rows);
  for (int64_t m0 = tile.first; m0 < tile.end; m0 += tile.step) {
    const typename View::Raw dys = tile.load(static_cast<const T*>(p.io.dy), m0),
                             vs = tile.load(static_cast<const T*>(p.io.v), m0),
                             xs = tile.load(static_cast<const T*>(p.io.x), m0),
                             fs = tile.load(static_cast<const T*>(p.io.f), m0);
    const uint32_t word = p.io.mask ? tile.load_mask(p.io.mask, m0) : kAllLanes;
    typename View::Raw dv, dx, df;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const Gate gate(View::get(vs, e));
      const float dz = tile.bit(word, e) ? View::get(dys, e) : 0.0f;
      const float into_f = gate.g * dz;
      View::set(df, e, into_f);
      View::set(dx, e, gate.rest * dz);
      View::set(dv, e, gate.rest * into_f * (View::get(fs, e) - View::get(xs, e)));
    }
    tile.store(static_cast<T*>(p.io.dv), m0, dv);
    tile.store(static_cast<T*>(p.io.dx), m0, dx);
    tile.store(static_cast<T*>(p.io.df), m0, df);
  }
}

RESNET_FUSED_TAIL_KERNELS(gate_act, 2, GateActParams, gate_rows);
RESNET_FUSED_TAIL_KERNELS(gate_act_backward, 2, GateActBackwardParams, gate_backward_rows);

}  // namespace resnet_fused
