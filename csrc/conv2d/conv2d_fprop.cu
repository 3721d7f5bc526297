#include "gemm/kernels.cuh"
#include "gemm/taps.cuh"

namespace resnet_fused {

template <typename T, class S>
using Fprop = TapsKernel<T, S, AffineRelu<T>, false, StoreStatsEpilogue<T, S>>;
template <typename T, class S>
using BnAct = TapsKernel<T, S, AffineRelu<T>, false, AffineResidualEpilogue<T, S, false>>;

RESNET_FUSED_TAPS_KERNELS(conv2d_fprop, Fprop);
RESNET_FUSED_TAPS_KERNELS(conv2d_bn_act, BnAct);

}  // namespace resnet_fused
