#include "bn_act_cpu.h"

#include "../common/cpu.h"
#include "../common/mask.h"

namespace resnet_fused {
namespace {

template <class T, class Acc>
RF_INLINE void affine(const T* __restrict x, const Acc* __restrict scale, const Acc* __restrict shift,
                      Acc* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = scale[i] * load(x[i]) + shift[i];
}

template <class T, class Acc>
RF_INLINE void add_residual(const T* __restrict r, Acc* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] += load(r[i]);
}

template <class T, class Acc>
RF_INLINE void add_affine(const T* __restrict r, const Acc* __restrict scale, const Acc* __restrict shift,
                          Acc* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] += scale[i] * load(r[i]) + shift[i];
}

// max(z, floor), with a NaN kept.
template <class T, class Acc>
RF_INLINE void round_above(const Acc* __restrict z, Acc floor, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(z[i] < floor ? floor : z[i]);
}

template <class T>
struct BnAct {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T *x, *residual;
  const Acc *scale, *shift, *residual_scale, *residual_shift;
  Acc floor;  // 0 with relu, else -infinity
  T* y;
  uint32_t* mask;

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc z[kTileBuffer] = {};
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * tiling.channels + c;
      affine(x + at, scale + c, shift + c, z, n);
      if (residual_scale != nullptr) {
        add_affine(residual + at, residual_scale + c, residual_shift + c, z, n);
      } else if (residual != nullptr) {
        add_residual(residual + at, z, n);
      }
      if (mask != nullptr) pack_tile(z, tiling, m, c, n, mask);
      round_above(z, floor, y + at, n);
    });
  }
};

template <class T>
struct ReluMask {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T* y;
  uint32_t* mask;

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc z[kTileBuffer] = {};
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const T* from = y + m * tiling.channels + c;
      for (int64_t i = 0; i < n; ++i) z[i] = load(from[i]);
      pack_tile(z, tiling, m, c, n, mask);
    });
  }
};

}  // namespace

void bn_act_cpu(const BnActCpu& a) {
  const Tiling tiling(a.m, a.c);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    const PerChannel<Acc> scale(a.scale, tiling), shift(a.shift, tiling);
    const PerChannel<Acc> residual_scale(a.residual_scale, tiling), residual_shift(a.residual_shift, tiling);
    const Acc floor = a.relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
    run_chunks(tiling.chunks(),
               BnAct<T>{tiling, static_cast<const T*>(a.x), static_cast<const T*>(a.residual), scale, shift,
                        residual_scale, residual_shift, floor, static_cast<T*>(a.y), a.mask});
  });
}

void relu_mask_cpu(DType dtype, const void* y, int64_t m, int64_t c, uint32_t* mask) {
  const Tiling tiling(m, c);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_chunks(tiling.chunks(), ReluMask<T>{tiling, static_cast<const T*>(y), mask});
  });
}

}  // namespace resnet_fused
