// Checks that the convolutions' gradients share.
#pragma once

#include "../common/checks.h"
#include "../common/device.h"
#include "gemm.h"

namespace resnet_fused {

// The gradient dy [N, K, H', W'] of a convolution's output, and what it is before the batch norm after that.
inline BnBackward check_backward(Checks& check, const Tensor& dy, const OptionalTensor& mask,
                                 const OptionalTensor& u, const OptionalTensor& scale,
                                 const OptionalTensor& shift, const OptionalTensor& mean,
                                 const OptionalTensor& coef_dz, const OptionalTensor& coef_x,
                                 const OptionalTensor& coef_1) {
  check.activation("dy", dy);
  const int64_t k = channels(dy);
  check.mask("mask", mask);
  check.same("u", u);
  check.together({{"u", u}, {"mean", mean}, {"coef_dz", coef_dz}, {"coef_x", coef_x}, {"coef_1", coef_1}});
  check.affine("scale", scale, "shift", shift, k);
  check.needs("scale", scale, "u", u);
  check.excludes("mask", mask, "scale", scale);
  check.vector("mean", mean, k);
  check.vector("coef_dz", coef_dz, k);
  check.vector("coef_x", coef_x, k);
  check.vector("coef_1", coef_1, k);
  return {data(u),        {mask_data(mask), floats(scale), floats(shift)},
          floats(mean),   floats(coef_dz),
          floats(coef_x), floats(coef_1)};
}

// What a dgrad's epilogue adds to dx [shape], or gates it with.
inline void check_dgrad_end(const Checks& check, const Sizes& shape, const OptionalTensor& addend,
                            const OptionalTensor& addend_mask, const OptionalTensor& gate_u,
                            const OptionalTensor& gate_scale, const OptionalTensor& gate_shift,
                            const OptionalTensor& gate_mean, int64_t addend_stride = 0) {
  const Sizes of = addend && addend_stride > 0 ? sizes_of(*addend) : shape;
  if (addend_stride == 0) check.activation("addend", addend, shape);
  check.mask("addend_mask", addend_mask, of);
  check.needs("addend_mask", addend_mask, "addend", addend);
  check.activation("gate_u", gate_u, shape);
  check.together(
      {{"gate_u", gate_u}, {"gate_scale", gate_scale}, {"gate_shift", gate_shift}, {"gate_mean", gate_mean}});
  check.vector("gate_scale", gate_scale, shape[1]);
  check.vector("gate_shift", gate_shift, shape[1]);
  check.vector("gate_mean", gate_mean, shape[1]);
  check.excludes("addend", addend, "gate_u", gate_u);
}

// The addend as the gradient of what a padded shortcut makes of dx [shape]; nothing where stride is 0.
inline PaddedAddend check_padded_addend(const Checks& check, const Sizes& shape, const OptionalTensor& addend,
                                        int64_t stride, int64_t offset) {
  check.require(stride >= 0, "addend_stride is ", stride, ", expected 0 or more");
  check.require(stride > 0 || offset == 0, "addend_offset is given without addend_stride");
  if (stride == 0) return {};
  check.require(addend.has_value(), "addend_stride is given without addend");
  check.other("addend", *addend);
  const Sizes got = sizes_of(*addend);
  check.require(
      got[0] == shape[0] && got[2] == strided(shape[2], stride) && got[3] == strided(shape[3], stride),
      "addend has shape ", to_string(got), ", whose pixels are not those that stride ", stride,
      " makes of dx, which is ", to_string(shape));
  check.require(offset >= 0 && offset + shape[1] <= got[1], "addend_offset is ", offset, ", expected 0 to ",
                got[1] - shape[1], " (dx has ", shape[1], " channels, addend ", got[1], ")");
  const auto narrow = [](int64_t n) { return static_cast<int32_t>(n); };
  return {narrow(stride),   narrow(offset), narrow(shape[2]),
          narrow(shape[3]), narrow(got[1]), narrow(got[0] * got[2] * got[3])};
}

}  // namespace resnet_fused
