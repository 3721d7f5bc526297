#include "gemm/kernels.cuh"
#include "gemm/rows.cuh"

namespace resnet_fused {

template <typename T, class S>
using Fprop = RowsKernel<T, S, Plain<T>, void, false, StoreStatsEpilogue<T, S>>;
template <typename T, class S>
using FpropAffine = RowsKernel<T, S, AffineRelu<T>, void, false, StoreStatsEpilogue<T, S>>;

RESNET_FUSED_ROWS_KERNELS(conv1x1_fprop, 2, Fprop);
RESNET_FUSED_ROWS_KERNELS(conv1x1_fprop_affine, 2, FpropAffine);

}  // namespace resnet_fused
