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

// z += scale * A(r), A the padded shortcut. Adds for the pixels of one tile, see Tiling::for_each_tile.
template <class T, class Acc>
struct AddPadded {
  const Tiling& tiling;
  const PaddedShortcut& from;
  const T* r;
  const Acc* scale;  // [C], or null: 1

  RF_INLINE int64_t source(int64_t m) const {
    const int64_t wide = (from.W - 1) / from.stride + 1, high = (from.H - 1) / from.stride + 1;
    const int64_t j = m % wide, i = m / wide % high, n = m / wide / high;
    return (n * from.H + i * from.stride) * from.W + j * from.stride;
  }
  RF_INLINE void operator()(int64_t m, int64_t c, int64_t n, Acc* __restrict z) const {
    const int64_t width = std::min(n, tiling.channels), offset = from.offset, size = from.C;  // of one pixel
    const int64_t first = std::max(c, offset), count = std::min(c + width, offset + size) - first;
    for (int64_t i = 0; i < n; i += width, ++m) {
      const T* __restrict row = r + source(m) * size;
      for (int64_t k = 0; k < count; ++k) {
        const Acc value = load(row[first - offset + k]);
        z[i + first - c + k] += scale != nullptr ? scale[first + k] * value : value;
      }
    }
  }
};

template <class Acc>
RF_INLINE void add_vector(const Acc* __restrict v, Acc* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] += v[i];
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
  const PaddedShortcut& padded;
  Acc floor;  // 0 with relu, else -infinity
  T* y;
  int64_t y_pitch;
  uint32_t* mask;

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc z[kTileBuffer] = {};
    alignas(64) T dense[kTileBuffer];
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * tiling.channels + c;
      affine(x + at, scale + c, shift + c, z, n);
      if (residual != nullptr && padded.stride != 0) {
        if (residual_shift != nullptr) add_vector(residual_shift + c, z, n);
        AddPadded<T, Acc>{tiling, padded, residual, residual_scale}(m, c, n, z);
      } else if (residual_scale != nullptr) {
        add_affine(residual + at, residual_scale + c, residual_shift + c, z, n);
      } else if (residual != nullptr) {
        add_residual(residual + at, z, n);
      }
      if (mask != nullptr) pack_tile(z, tiling, m, c, n, mask);
      if (y_pitch == tiling.channels) return round_above(z, floor, y + at, n);
      round_above(z, floor, dense, n);
      tiling.for_each_pixel(m, n, [&](int64_t pixel, int64_t i, int64_t width) RF_LAMBDA {
        std::copy_n(dense + i, width, y + pixel * y_pitch + c);
      });
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
                        residual_scale, residual_shift, a.padded, floor, static_cast<T*>(a.y),
                        a.y_pitch != 0 ? a.y_pitch : a.c, a.mask});
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
