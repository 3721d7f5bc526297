#include "gemm/kernels.cuh"
#include "gemm/resident.cuh"

namespace resnet_fused {

template <typename T, class S>
using Expand = RowsKernel<T, S, Plain<T>, void, false, AffineResidualEpilogue<T, S, false>>;
template <typename T, class S>
using ExpandAffine = RowsKernel<T, S, AffineRelu<T>, void, false, AffineResidualEpilogue<T, S, false>>;
template <typename T, class S>
using ExpandDual = RowsKernel<T, S, AffineRelu<T>, Plain<T>, false, AffineResidualEpilogue<T, S, true>>;
template <typename T, class S>
using ExpandResident = ResidentKernel<T, S, Plain<T>, AffineResidualEpilogue<T, S, false>>;
template <typename T, class S>
using ExpandAffineResident = ResidentKernel<T, S, AffineRelu<T>, AffineResidualEpilogue<T, S, false>>;

RESNET_FUSED_RESIDENT_KERNELS(expand, ExpandResident);
RESNET_FUSED_RESIDENT_KERNELS(expand_affine, ExpandAffineResident);
RESNET_FUSED_ROWS_KERNELS(expand, 1, Expand);
RESNET_FUSED_ROWS_KERNELS(expand_affine, 1, ExpandAffine);
RESNET_FUSED_ROWS_KERNELS(expand_dual, 1, ExpandDual);

}  // namespace resnet_fused
