#include "common/reduce.cuh"
#include "gram_operand/gram_operand.h"

namespace resnet_fused {

template <typename T, bool kVector>
__device__ void gram_operand_rows(const GramOperandParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  const SourceRow source{static_cast<uint32_t>(p.stride), static_cast<uint32_t>(p.H),
                         static_cast<uint32_t>(p.W)};
  const T* x = static_cast<const T*>(p.x);
  float scale[View::kChannels], shift[View::kChannels], center[View::kChannels];
#pragma unroll
  for (int i = 0; i < View::kChannels; ++i) scale[i] = 1.0f, shift[i] = 0.0f;
  if (p.scale) {
    tile.coefficients(p.scale, scale);
    tile.coefficients(p.shift, shift);
  }
  tile.coefficients(p.center, center);
  float sum[1][View::kChannels] = {};

  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw xs[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) xs[u] = tile.load(x, m0 + u * tile.step, source);
#pragma unroll
    for (int u = 0; u < kStaged; ++u) {
      typename View::Raw out;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int i = View::of(e);
        const float z = fmaf(scale[i], View::get(xs[u], e), shift[i]);
        View::set(out, e, (p.relu ? relu(z) : z) - center[i]);
        if (tile.holds(m0 + u * tile.step, e)) sum[0][i] += View::get(out, e);  // the rounded value
      }
      tile.store(static_cast<T*>(p.a), m0 + u * tile.step, out);
    }
  }
  write_block_sums(tile, sum, p.rows.warps_across, 1, p.partial);
}

RESNET_FUSED_TAIL_KERNELS(gram_operand, 3, GramOperandParams, gram_operand_rows);

}  // namespace resnet_fused
