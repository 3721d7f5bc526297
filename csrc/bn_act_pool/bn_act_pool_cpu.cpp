#include "bn_act_pool_cpu.h"

#include "../common/cpu.h"

namespace resnet_fused {
namespace {

// One tap of a window: the first maximum wins, but a NaN over anything before it, as in PyTorch. Written as
// selects of one comparison each: GCC does not vectorise a select on the union of two.
template <class T, class Acc>
RF_INLINE void take_max(const T* __restrict x, const Acc* __restrict scale, const Acc* __restrict shift,
                        int32_t tap, Acc* __restrict best, int32_t* __restrict arg, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc z = scale[i] * load(x[i]) + shift[i];
    const Acc a = z < 0 ? Acc(0) : z;
    const Acc max = a > best[i] ? a : best[i];
    const int32_t max_tap = a > best[i] ? tap : arg[i];
    best[i] = a != a ? a : max;
    arg[i] = a != a ? tap : max_tap;
  }
}

template <class T, class Acc>
RF_INLINE void write_max(const Acc* __restrict best, const int32_t* __restrict arg, T* __restrict y,
                         int8_t* __restrict argmax, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = store<T>(best[i]);
  for (int64_t i = 0; i < n; ++i) argmax[i] = static_cast<int8_t>(arg[i]);
}

// A chunk is one row of outputs; channels go by segments that fit the buffers.
template <class T>
struct Pool {
  using Acc = AccOf<T>;
  const PoolShape& s;
  const T* x;
  const Acc *scale, *shift;
  T* y;
  int8_t* argmax;

  RF_INLINE void operator()(int64_t row) const {
    alignas(64) Acc best[kTileElements];
    alignas(64) int32_t arg[kTileElements];
    const int64_t image = row / s.out_h, top = row % s.out_h * s.stride - s.padding;
    for (int64_t j = 0; j < s.out_w; ++j) {
      const int64_t left = j * s.stride - s.padding, at = (row * s.out_w + j) * s.c;
      for (int64_t c = 0; c < s.c; c += kTileElements) {
        const int64_t n = std::min(kTileElements, s.c - c);
        std::fill(best, best + n, -std::numeric_limits<Acc>::infinity());
        for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + s.kernel, s.h); ++h) {
          for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + s.kernel, s.w); ++w) {
            const T* pixel = x + ((image * s.h + h) * s.w + w) * s.c + c;
            const auto tap = static_cast<int32_t>((h - top) * s.kernel + (w - left));
            take_max(pixel, scale + c, shift + c, tap, best, arg, n);
          }
        }
        write_max(best, arg, y + at + c, argmax + at + c, n);
      }
    }
  }
};

template <class T, class Acc>
RF_INLINE void add_if_won(const T* __restrict dy, const int8_t* __restrict argmax, int8_t tap,
                          Acc* __restrict da, int64_t n) {
  for (int64_t i = 0; i < n; ++i) da[i] += argmax[i] == tap ? load(dy[i]) : Acc(0);
}

// A chunk is one row of inputs. Each input gathers from the windows that cover it, in a fixed order.
template <class T>
struct PoolBackward {
  using Acc = AccOf<T>;
  const PoolShape& s;
  const T* dy;
  const int8_t* argmax;
  T* da;

  // The first window that covers position p; windows end at (p + padding) / stride.
  RF_INLINE int64_t first_window(int64_t p) const {
    const int64_t before = p + s.padding - s.kernel;
    return before < 0 ? 0 : before / s.stride + 1;
  }

  RF_INLINE void operator()(int64_t row) const {
    alignas(64) Acc sum[kTileElements];
    const int64_t image = row / s.h, h = row % s.h;
    const int64_t last_i = std::min((h + s.padding) / s.stride, s.out_h - 1);
    for (int64_t w = 0; w < s.w; ++w) {
      const int64_t last_j = std::min((w + s.padding) / s.stride, s.out_w - 1);
      for (int64_t c = 0; c < s.c; c += kTileElements) {
        const int64_t n = std::min(kTileElements, s.c - c);
        std::fill(sum, sum + n, Acc(0));
        for (int64_t i = first_window(h); i <= last_i; ++i) {
          for (int64_t j = first_window(w); j <= last_j; ++j) {
            const int64_t at = ((image * s.out_h + i) * s.out_w + j) * s.c + c;
            const int64_t kh = h + s.padding - i * s.stride, kw = w + s.padding - j * s.stride;
            add_if_won(dy + at, argmax + at, static_cast<int8_t>(kh * s.kernel + kw), sum, n);
          }
        }
        T* to = da + (row * s.w + w) * s.c + c;
        for (int64_t k = 0; k < n; ++k) to[k] = store<T>(sum[k]);
      }
    }
  }
};

}  // namespace

void bn_act_pool_cpu(DType dtype, const PoolShape& s, const void* x, const void* scale, const void* shift,
                     void* y, int8_t* argmax) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    run_chunks(s.n * s.out_h, Pool<T>{s, static_cast<const T*>(x), static_cast<const Acc*>(scale),
                                      static_cast<const Acc*>(shift), static_cast<T*>(y), argmax});
  });
}

void bn_act_pool_backward_cpu(DType dtype, const PoolShape& s, const void* dy, const int8_t* argmax,
                              void* da) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_chunks(s.n * s.h, PoolBackward<T>{s, static_cast<const T*>(dy), argmax, static_cast<T*>(da)});
  });
}

}  // namespace resnet_fused
