#include "gemm/kernels.cuh"
#include "gemm/rows.cuh"

namespace resnet_fused {

// The main path's unit: its operand is relu(scale*u + shift), and so is the gate of its gradient.
template <typename T, class S>
using ExpandDgrad = RowsKernel<T, S, Masked<T>, AffineRelu<T>, true, GateSumsEpilogue<T, S>>;
// The projection's: its operand is the block's input.
template <typename T, class S>
using ExpandDgradProjection =
    RowsKernel<T, S, Masked<T>, Plain<T>, true, AddShortcutEpilogue<T, S, true, false>>;

RESNET_FUSED_ROWS_KERNELS(expand_dgrad, 1, ExpandDgrad);
RESNET_FUSED_ROWS_KERNELS(expand_dgrad_projection, 1, ExpandDgradProjection);

}  // namespace resnet_fused
