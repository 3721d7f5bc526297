#include "add_stats_cpu.h"

#include "../bn_stats/moments.h"

namespace resnet_fused {
namespace {

template <class T>
RF_INLINE void sum(const T* __restrict x, const T* __restrict u, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(load(x[i]) + load(u[i]));
}

template <class T, class Acc>
RF_INLINE void affine_sum(const T* __restrict x, const T* __restrict u, const Acc* __restrict scale,
                          const Acc* __restrict shift, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(load(x[i]) + (scale[i] * load(u[i]) + shift[i]));
}

// y of one chunk, and its moments while it is in cache.
template <class T>
struct AddStats {
  using Acc = AccOf<T>;
  const Tiling& tiling;
  const T *x, *u;
  const Acc *scale, *shift;
  T* y;
  ChunkMoments<T> moments;

  RF_INLINE void operator()(int64_t chunk) const {
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      const int64_t at = m * tiling.channels + c;
      if (scale != nullptr) {
        affine_sum(x + at, u + at, scale + c, shift + c, y + at, n);
      } else {
        sum(x + at, u + at, y + at, n);
      }
    });
    moments(chunk);
  }
};

}  // namespace

void add_stats_cpu(const AddStatsCpu& a) {
  const Tiling tiling(a.m, a.c, kMinReductionPixels);
  std::vector<double> moments(tiling.chunks() * 2 * a.c);
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    const PerChannel<Acc> scale(a.scale, tiling), shift(a.shift, tiling);
    T* y = static_cast<T*>(a.y);
    run_chunks(tiling.chunks(), AddStats<T>{tiling, static_cast<const T*>(a.x), static_cast<const T*>(a.u),
                                            scale, shift, y, ChunkMoments<T>{tiling, y, moments.data()}});
    combine_moments(tiling, moments.data(), static_cast<Acc*>(a.mean), static_cast<Acc*>(a.var));
  });
}

}  // namespace resnet_fused
