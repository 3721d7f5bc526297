#include "../common/cpu.h"
#include "../common/mask.h"
#include "bn_act_cpu.h"

namespace resnet_fused {
namespace {

template <class T, class Acc>
RF_INLINE void widen(const T* __restrict dy, Acc* __restrict dz, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dz[i] = load(dy[i]);
}

// Gates are all ones or 0 and work on bits: a select between a loaded value and 0 tempts the compiler
// to load under a branch.
template <class T, class Acc>
RF_INLINE void sign_gate(const T* __restrict x, const Acc* __restrict scale, const Acc* __restrict shift,
                         BitsOf<Acc>* __restrict gate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = BitsOf<Acc>{scale[i] * load(x[i]) + shift[i] <= 0} - 1;
}

template <class T, class Acc>
RF_INLINE void apply_gate(const T* __restrict dy, const BitsOf<Acc>* __restrict gate, Acc* __restrict dz,
                          int64_t n) {
  for (int64_t i = 0; i < n; ++i) dz[i] = bit_cast<Acc>(bit_cast<BitsOf<Acc>>(load(dy[i])) & gate[i]);
}

template <class T>
struct ReluBackward {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T *dy, *x;
  int64_t dy_pitch;
  const uint32_t* mask;
  const Acc *scale, *shift;

  ReluBackward(const BnActBackwardCpu& a, const Tiling& tiling, const Acc* scale, const Acc* shift)
      : tiling(tiling),
        dy(static_cast<const T*>(a.dy)),
        x(static_cast<const T*>(a.x)),
        dy_pitch(a.dy_pitch != 0 ? a.dy_pitch : a.c),
        mask(a.mask),
        scale(scale),
        shift(shift) {}

  // dz of one tile; gate[kTileBuffer] is scratch.
  RF_INLINE void operator()(int64_t m, int64_t c, int64_t n, BitsOf<Acc>* gate, Acc* dz) const {
    if (dy_pitch == tiling.channels) return apply(dy + m * tiling.channels + c, m, c, n, gate, dz);
    alignas(64) T dense[kTileBuffer];
    tiling.for_each_pixel(m, n, [&](int64_t pixel, int64_t i, int64_t width) RF_LAMBDA {
      std::copy_n(dy + pixel * dy_pitch + c, width, dense + i);
    });
    apply(dense, m, c, n, gate, dz);
  }

 private:
  RF_INLINE void apply(const T* dys, int64_t m, int64_t c, int64_t n, BitsOf<Acc>* gate, Acc* dz) const {
    if (mask == nullptr && scale == nullptr) return widen(dys, dz, n);
    if (mask != nullptr) {
      unpack_tile(mask, tiling, m, c, n, gate);
    } else {
      sign_gate(x + m * tiling.channels + c, scale + c, shift + c, gate, n);
    }
    apply_gate(dys, gate, dz, n);
  }
};

template <class Acc>
RF_INLINE void add(const Acc* __restrict dz, Acc* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += dz[i];
}

template <class T, class Acc>
RF_INLINE void add_products(const Acc* __restrict dz, const T* __restrict x, const Acc* __restrict mean,
                            Acc* __restrict sum, Acc* __restrict sum_xc, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    sum[i] += dz[i];
    sum_xc[i] += dz[i] * (load(x[i]) - mean[i]);
  }
}

template <class T, class Acc>
RF_INLINE void round_to(const Acc* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = store<T>(from[i]);
}

template <class T>
struct Reduce {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const ReluBackward<T>& relu_backward;
  const T* x;
  const Acc* mean;
  T* dz_out;
  double* partials;  // [chunks, mean ? 2 : 1, C]

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc dz[kTileBuffer] = {};
    alignas(64) BitsOf<Acc> gate[kTileBuffer] = {};
    const int64_t channels = tiling.channels, sums = mean != nullptr ? 2 : 1;
    AlignedBuffer<Acc> buffer(tiling.width()), buffer_xc(tiling.width());
    Acc *sum = buffer.data(), *sum_xc = buffer_xc.data();
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * channels + c;
      relu_backward(m, c, n, gate, dz);
      if (dz_out != nullptr) round_to(dz, dz_out + at, n);
      if (mean != nullptr) {
        add_products(dz, x + at, mean + c, sum + c, sum_xc + c, n);
      } else {
        add(dz, sum + c, n);
      }
    });
    fold(sum, tiling, partials + chunk * sums * channels);
    if (mean != nullptr) fold(sum_xc, tiling, partials + (chunk * sums + 1) * channels);
  }
};

template <class T, class Acc>
RF_INLINE void combine(const Acc* __restrict dz, const T* __restrict x, const Acc* __restrict mean,
                       const Acc* __restrict coef_dz, const Acc* __restrict coef_x,
                       const Acc* __restrict coef_1, T* __restrict dx, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = store<T>(coef_dz[i] * dz[i] + (coef_x[i] * (load(x[i]) - mean[i]) + coef_1[i]));
  }
}

template <class T, class Acc>
RF_INLINE void combine_add(const Acc* __restrict dz, const T* __restrict x, const Acc* __restrict mean,
                           const Acc* __restrict coef_dz, const Acc* __restrict coef_x,
                           const Acc* __restrict coef_1, const T* __restrict addend, T* __restrict dx,
                           int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = store<T>(coef_dz[i] * dz[i] + (coef_x[i] * (load(x[i]) - mean[i]) + coef_1[i]) + load(addend[i]));
  }
}

template <class T>
struct Apply {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const ReluBackward<T>& relu_backward;
  const T* x;
  const Acc *mean, *coef_dz, *coef_x, *coef_1;
  const T* addend;
  T* dx;

  RF_INLINE void operator()(int64_t chunk) const {
    alignas(64) Acc dz[kTileBuffer] = {};
    alignas(64) BitsOf<Acc> gate[kTileBuffer] = {};
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * tiling.channels + c;
      relu_backward(m, c, n, gate, dz);
      if (addend != nullptr) {
        combine_add(dz, x + at, mean + c, coef_dz + c, coef_x + c, coef_1 + c, addend + at, dx + at, n);
      } else {
        combine(dz, x + at, mean + c, coef_dz + c, coef_x + c, coef_1 + c, dx + at, n);
      }
    });
  }
};

}  // namespace

void bn_act_backward_reduce_cpu(const BnActBackwardCpu& a, void* dz, void* sum_dz, void* sum_dz_xc) {
  const Tiling tiling(a.m, a.c, kMinReductionPixels);
  const int64_t sums = a.mean != nullptr ? 2 : 1;
  std::vector<double> partials(tiling.chunks() * sums * a.c);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    const T* x = static_cast<const T*>(a.x);
    const PerChannel<Acc> scale(a.scale, tiling), shift(a.shift, tiling), mean(a.mean, tiling);
    const ReluBackward<T> relu_backward(a, tiling, scale, shift);
    run_chunks(tiling.chunks(),
               Reduce<T>{tiling, relu_backward, x, mean, static_cast<T*>(dz), partials.data()});
    sum_partials(partials.data(), tiling.chunks(), sums * a.c, a.c, static_cast<Acc*>(sum_dz));
    if (sums == 2) {
      sum_partials(partials.data() + a.c, tiling.chunks(), sums * a.c, a.c, static_cast<Acc*>(sum_dz_xc));
    }
  });
}

void bn_act_backward_apply_cpu(const BnActBackwardCpu& a, const void* coef_dz, const void* coef_x,
                               const void* coef_1, const void* addend, void* dx) {
  const Tiling tiling(a.m, a.c);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    const T* x = static_cast<const T*>(a.x);
    const PerChannel<Acc> scale(a.scale, tiling), shift(a.shift, tiling), mean(a.mean, tiling);
    const PerChannel<Acc> wide_dz(coef_dz, tiling), wide_x(coef_x, tiling), wide_1(coef_1, tiling);
    const ReluBackward<T> relu_backward(a, tiling, scale, shift);
    run_chunks(tiling.chunks(), Apply<T>{tiling, relu_backward, x, mean, wide_dz, wide_x, wide_1,
                                         static_cast<const T*>(addend), static_cast<T*>(dx)});
  });
}

}  // namespace resnet_fused
