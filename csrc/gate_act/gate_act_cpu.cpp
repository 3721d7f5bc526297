#include "gate_act_cpu.h"

#include <cmath>

#include "../common/cpu.h"
#include "../common/mask.h"

namespace resnet_fused {
namespace {

// exp of |x| < 88, in arithmetic that every compiler vectorises: 2^n e^r with r in [-ln2/2, ln2/2], where
// eight terms of the series leave an error of 6e-9. A NaN stays one.
RF_INLINE float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // adding it rounds to an integer, in the lowest bits
  const float shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float sum = 1.0f / 5040.0f;
  for (const float term : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    sum = sum * r + term;
  }
  return sum * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
}
RF_INLINE double exponential(double x) { return std::exp(x); }

// g[i] = sigmoid(v[i]) and rest[i] = 1 - g[i], neither of them by subtracting from 1.
template <class T, class Acc>
RF_INLINE void sigmoid(const T* __restrict v, Acc* __restrict g, Acc* __restrict rest, int64_t n) {
  constexpr Acc kMost = sizeof(Acc) == 8 ? 600 : 80;  // e and its square stay finite
  for (int64_t i = 0; i < n; ++i) {
    const Acc minus = -load(v[i]);
    const Acc below = minus > kMost ? kMost : minus;
    const Acc e = exponential(below < -kMost ? -kMost : below);
    g[i] = Acc(1) / (Acc(1) + e);
    rest[i] = e * g[i];
  }
}

template <class T, class Acc>
RF_INLINE void mix(const T* __restrict x, const T* __restrict f, const Acc* __restrict rest,
                   Acc* __restrict g, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = rest[i] * load(x[i]) + g[i] * load(f[i]);
}

// max(z, floor), with a NaN kept.
template <class T, class Acc>
RF_INLINE void round_above(const Acc* __restrict z, Acc floor, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(z[i] < floor ? floor : z[i]);
}

template <class T>
struct GateAct {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T *v, *x, *f;
  Acc floor;  // 0 with relu, else -infinity
  T* y;
  uint32_t* mask;

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc z[kTileBuffer] = {}, rest[kTileBuffer];
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * tiling.channels + c;
      sigmoid(v + at, z, rest, n);
      mix(x + at, f + at, rest, z, n);
      if (mask != nullptr) pack_tile(z, tiling, m, c, n, mask);
      round_above(z, floor, y + at, n);
    });
  }
};

template <class T, class Acc>
RF_INLINE void gradients(const T* __restrict dy, const BitsOf<Acc>* __restrict open, const T* __restrict x,
                         const T* __restrict f, const Acc* __restrict g, const Acc* __restrict rest,
                         T* __restrict dv, T* __restrict dx, T* __restrict df, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc dz = bit_cast<Acc>(bit_cast<BitsOf<Acc>>(load(dy[i])) & open[i]);
    const Acc into_f = g[i] * dz;
    df[i] = store<T>(into_f);
    dx[i] = store<T>(rest[i] * dz);
    dv[i] = store<T>(rest[i] * into_f * (load(f[i]) - load(x[i])));
  }
}

template <class T>
struct GateActBackward {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T* dy;
  const uint32_t* mask;
  const T *v, *x, *f;
  T *dv, *dx, *df;

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc g[kTileBuffer], rest[kTileBuffer];
    alignas(64) BitsOf<Acc> open[kTileBuffer];
    if (mask == nullptr) std::fill(open, open + kTileBuffer, ~BitsOf<Acc>{0});
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * tiling.channels + c;
      sigmoid(v + at, g, rest, n);
      if (mask != nullptr) unpack_tile(mask, tiling, m, c, n, open);
      gradients(dy + at, open, x + at, f + at, g, rest, dv + at, dx + at, df + at, n);
    });
  }
};

}  // namespace

void gate_act_cpu(const GateActCpu& a) {
  const Tiling tiling(a.m, a.c);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    const Acc floor = a.relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
    run_chunks(tiling.chunks(), GateAct<T>{tiling, static_cast<const T*>(a.v), static_cast<const T*>(a.x),
                                           static_cast<const T*>(a.f), floor, static_cast<T*>(a.y), a.mask});
  });
}

void gate_act_backward_cpu(const GateActBackwardCpu& a) {
  const Tiling tiling(a.m, a.c);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_chunks(tiling.chunks(),
               GateActBackward<T>{tiling, static_cast<const T*>(a.dy), a.mask, static_cast<const T*>(a.v),
                                  static_cast<const T*>(a.x), static_cast<const T*>(a.f),
                                  static_cast<T*>(a.dv), static_cast<T*>(a.dx), static_cast<T*>(a.df)});
  });
}

}  // namespace resnet_fused
