#include "gram_operand_cpu.h"

#include "../common/cpu.h"

namespace resnet_fused {
namespace {

template <class T, class Acc>
RF_INLINE void activate(const T* __restrict x, const Acc* __restrict scale, const Acc* __restrict shift,
                        const Acc* __restrict center, Acc floor, T* __restrict a, Acc* __restrict sum,
                        int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc z = scale[i] * load(x[i]) + shift[i];
    a[i] = store<T>((z < floor ? floor : z) - center[i]);
    sum[i] += load(a[i]);
  }
}

template <class T>
struct GramOperand {
  using Acc = AccOf<T>;
  const Tiling& tiling;  // of a
  const GramOperandCpu& args;
  const T* x;
  const Acc *scale, *shift, *center;
  Acc floor;  // 0 with relu, else -infinity
  T* a;
  double* partials;  // [chunks, C]

  // The pixel of x that pixel m of a is made from.
  RF_INLINE int64_t source(int64_t m) const {
    if (args.stride == 1) return m;
    const int64_t out_w = (args.w - 1) / args.stride + 1, out_h = (args.h - 1) / args.stride + 1;
    const int64_t image = m / (out_w * out_h), i = m / out_w % out_h, j = m % out_w;
    return (image * args.h + i * args.stride) * args.w + j * args.stride;
  }

  RF_INLINE void operator()(int64_t chunk) const {
    const int64_t channels = tiling.channels;
    AlignedBuffer<Acc> sum(tiling.width());
    tiling.for_each_tile(chunk, [&](int64_t m, int64_t c, int64_t n) RF_LAMBDA {
      activate(x + source(m) * channels + c, scale + c, shift + c, center + c, floor, a + m * channels + c,
               sum.data() + c, n);
    });
    fold(sum.data(), tiling, partials + chunk * channels);
  }
};

}  // namespace

void gram_operand_cpu(const GramOperandCpu& g) {
  const int64_t pixels = g.n * ((g.h + g.stride - 1) / g.stride) * ((g.w + g.stride - 1) / g.stride);
  Tiling tiling(pixels, g.c, kMinReductionPixels);
  if (g.stride > 1) tiling.group = 1;  // neighbouring pixels of a are not neighbours in x
  std::vector<double> partials(tiling.chunks() * g.c);
  dispatch(g.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    const std::vector<Acc> one(g.c, Acc(1)), zero(g.c, Acc(0));
    const PerChannel<Acc> scale(g.scale != nullptr ? g.scale : one.data(), tiling);
    const PerChannel<Acc> shift(g.shift != nullptr ? g.shift : zero.data(), tiling);
    const PerChannel<Acc> center(g.center, tiling);
    const Acc floor = g.relu ? Acc(0) : -std::numeric_limits<Acc>::infinity();
    run_chunks(tiling.chunks(), GramOperand<T>{tiling, g, static_cast<const T*>(g.x), scale, shift, center,
                                               floor, static_cast<T*>(g.a), partials.data()});
    Acc* mean = static_cast<Acc*>(g.mean);
    sum_partials(partials.data(), tiling.chunks(), g.c, g.c, mean, static_cast<double>(pixels));
  });
}

}  // namespace resnet_fused
