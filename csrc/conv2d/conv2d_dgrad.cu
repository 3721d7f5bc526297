#include "gemm/kernels.cuh"
#include "gemm/taps.cuh"

namespace resnet_fused {

template <typename T, class S>
using DgradAdd = TapsKernel<T, S, Backward<T>, true, AddShortcutEpilogue<T, S, false>>;
template <typename T, class S>
using DgradGate = TapsKernel<T, S, Backward<T>, true, GateSumsEpilogue<T, S, true>>;

RESNET_FUSED_TAPS_KERNELS(conv2d_dgrad_add, DgradAdd);
RESNET_FUSED_TAPS_KERNELS(conv2d_dgrad_gate, DgradGate);

}  // namespace resnet_fused
