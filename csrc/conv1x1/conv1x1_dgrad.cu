#include "gemm/kernels.cuh"
#include "gemm/rows.cuh"

namespace resnet_fused {

template <typename T, class S>
using DgradAdd = RowsKernel<T, S, Plain<T>, void, true, AddShortcutEpilogue<T, S>>;
template <typename T, class S>
using DgradGate = RowsKernel<T, S, Plain<T>, void, true, GateSumsEpilogue<T, S>>;
template <typename T, class S>
using DgradBackwardAdd = RowsKernel<T, S, Backward<T>, void, true, AddShortcutEpilogue<T, S>>;
template <typename T, class S>
using DgradBackwardGate = RowsKernel<T, S, Backward<T>, void, true, GateSumsEpilogue<T, S>>;

RESNET_FUSED_ROWS_KERNELS(conv1x1_dgrad_add, 1, DgradAdd);
RESNET_FUSED_ROWS_KERNELS(conv1x1_dgrad_gate, 1, DgradGate);
RESNET_FUSED_ROWS_KERNELS_2(conv1x1_dgrad_backward_add, 1, DgradBackwardAdd);
RESNET_FUSED_ROWS_KERNELS_2(conv1x1_dgrad_backward_gate, 1, DgradBackwardGate);

}  // namespace resnet_fused
