#include "common/tile.cuh"
#include "concat_act/concat_act.h"

namespace resnet_fused {

template <typename T, bool kVector>
__device__ void copy_rows(const CopyRowsParams& p) {
  using View = Tile<T, kVector>;
  constexpr int kStaged = View::kStaged;
  const View tile(p.rows);
  for (int64_t m0 = tile.first; m0 < tile.end; m0 += kStaged * tile.step) {
    typename View::Raw xs[kStaged];
#pragma unroll
    for (int u = 0; u < kStaged; ++u) xs[u] = tile.load(static_cast<const T*>(p.x), m0 + u * tile.step);
#pragma unroll
    for (int u = 0; u < kStaged; ++u) tile.store(static_cast<T*>(p.y), m0 + u * tile.step, xs[u], p.pitch);
  }
}

RESNET_FUSED_TAIL_KERNELS(concat_act_copy, 3, CopyRowsParams, copy_rows);

}  // namespace resnet_fused
