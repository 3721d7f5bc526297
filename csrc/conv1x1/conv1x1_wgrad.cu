#include "gemm/kernels.cuh"
#include "gemm/pixels.cuh"

namespace resnet_fused {

// dy's prologue; x's prologue; kSums: also the sums of dy; kStrided: x through the map.
template <typename T, class S, template <class> class Dy, template <class> class X, bool kSums, bool kStrided>
using Wgrad = PixelsKernel<T, S, Dy<T>, X<T>, kSums, kStrided>;

template <typename T, class S>
using WgradPlain = Wgrad<T, S, Plain, Plain, false, false>;
template <typename T, class S>
using WgradStrided = Wgrad<T, S, Plain, Plain, false, true>;
template <typename T, class S>
using WgradAffine = Wgrad<T, S, Plain, AffineRelu, false, false>;
template <typename T, class S>
using WgradMasked = Wgrad<T, S, Masked, Plain, true, false>;
template <typename T, class S>
using WgradMaskedStrided = Wgrad<T, S, Masked, Plain, true, true>;
template <typename T, class S>
using WgradMaskedAffine = Wgrad<T, S, Masked, AffineRelu, true, false>;
template <typename T, class S>
using WgradBackward = Wgrad<T, S, Backward, Plain, false, false>;
template <typename T, class S>
using WgradBackwardStrided = Wgrad<T, S, Backward, Plain, false, true>;
template <typename T, class S>
using WgradBackwardAffine = Wgrad<T, S, Backward, AffineRelu, false, false>;

RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad, WgradPlain);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_strided, WgradStrided);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_affine, WgradAffine);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_masked, WgradMasked);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_masked_strided, WgradMaskedStrided);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_masked_affine, WgradMaskedAffine);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_backward, WgradBackward);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_backward_strided, WgradBackwardStrided);
RESNET_FUSED_PIXELS_KERNELS(conv1x1_wgrad_backward_affine, WgradBackwardAffine);

}  // namespace resnet_fused
