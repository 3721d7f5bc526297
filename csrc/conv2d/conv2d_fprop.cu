#include "gemm/kernels.cuh"
#include "gemm/taps.cuh"

namespace resnet_fused {

template <typename T, class S>
using Fprop = TapsKernel<T, S, AffineRelu<T>, false, StoreStatsEpilogue<T, S>>;
template <typename T, class S>
using FpropStrided = TapsKernel<T, S, AffineRelu<T>, false, StoreStatsEpilogue<T, S>, 2>;
template <typename T, class S>
using BnAct = TapsKernel<T, S, AffineRelu<T>, false, AffineResidualEpilogue<T, S, false>>;
template <typename T, class S>
using BnActStrided = TapsKernel<T, S, AffineRelu<T>, false, AffineResidualEpilogue<T, S, false>, 2>;

RESNET_FUSED_TAPS_KERNELS(conv2d_fprop, Fprop);
RESNET_FUSED_TAPS_KERNELS(conv2d_fprop_strided, FpropStrided);
RESNET_FUSED_TAPS_KERNELS(conv2d_bn_act, BnAct);
RESNET_FUSED_TAPS_KERNELS(conv2d_bn_act_strided, BnActStrided);

}  // namespace resnet_fused
