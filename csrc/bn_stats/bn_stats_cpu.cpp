#include "bn_stats_cpu.h"

#include "moments.h"

namespace resnet_fused {

void bn_stats_cpu(DType dtype, const void* x, int64_t m, int64_t c, void* mean, void* var) {
  const Tiling tiling(m, c, kMinReductionPixels);
  std::vector<double> moments(tiling.chunks() * 2 * c);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Acc = AccOf<T>;
    run_chunks(tiling.chunks(), ChunkMoments<T>{tiling, static_cast<const T*>(x), moments.data()});
    combine_moments(tiling, moments.data(), static_cast<Acc*>(mean), static_cast<Acc*>(var));
  });
}

}  // namespace resnet_fused
