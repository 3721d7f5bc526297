#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "bn_act.h"
#include "bn_act_cpu.h"

namespace resnet_fused {
namespace {

// A residual like x, or with a stride, one that a padded shortcut brings to x's shape.
PaddedShortcut check_padded(const Checks& check, const Tensor& x, const OptionalTensor& residual,
                            int64_t stride, int64_t offset) {
  check.require(stride >= 0, "residual_stride is ", stride, ", expected 0 or more");
  check.require(residual || stride == 0, "residual_stride is given without residual");
  check.require(stride > 0 || offset == 0, "residual_offset is given without residual_stride");
  if (stride == 0) return check.same("residual", residual), PaddedShortcut{};
  check.other("residual", *residual);
  const Sizes got = sizes_of(*residual);
  check.require(
      got[0] == x.size(0) && strided(got[2], stride) == x.size(2) && strided(got[3], stride) == x.size(3),
      "residual has shape ", to_string(got), ", of which stride ", stride, " does not make x's pixels, x is ",
      to_string(sizes_of(x)));
  check.require(offset >= 0 && offset + got[1] <= channels(x), "residual_offset is ", offset,
                ", expected 0 to ", channels(x) - got[1], " (x has ", channels(x), " channels, residual ",
                got[1], ")");
  return {static_cast<int32_t>(stride), static_cast<int32_t>(offset), static_cast<int32_t>(got[2]),
          static_cast<int32_t>(got[3]), static_cast<int32_t>(got[1])};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                  const OptionalTensor& residual_shift, bool relu, bool save_mask,
                                  int64_t residual_stride, int64_t residual_offset) {
  Checks check("bn_act");
  check.activation("x", x);
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);
  const PaddedShortcut padded = check_padded(check, x, residual, residual_stride, residual_offset);
  check.both_or_none("residual_scale", residual_scale, "residual_shift", residual_shift);
  check.require(residual || !residual_scale, "residual_scale is given without residual");
  check.per_channel("residual_scale", residual_scale);
  check.per_channel("residual_shift", residual_shift);
  check.require(relu || !save_mask,
                "save_mask is True and relu is False, expected relu=True: only a relu has a mask");

  Tensor y = torch::stable::empty_like(x);
  Tensor mask = save_mask ? empty_mask(x) : empty_vector(x, 0, ScalarType::Int);
  uint32_t* bits = save_mask ? mask_data(mask) : nullptr;
  if (use_kernels(x)) {
    launch(plan_bn_act,
           {dtype_of(x), relu, 0, padded, pixels(x), channels(x), data(x), floats(scale), floats(shift),
            data(residual), floats(residual_scale), floats(residual_shift), y.mutable_data_ptr(), bits},
           x);
  } else {
    bn_act_cpu({dtype_of(x), pixels(x), channels(x), data(x), data(scale), data(shift), data(residual),
                data(residual_scale), data(residual_shift), padded, relu, y.mutable_data_ptr(), 0, bits});
  }
  return {y, mask};
}

Tensor relu_mask(const Tensor& y) {
  Checks check("relu_mask");
  check.activation("y", y);

  Tensor mask = empty_mask(y);
  if (use_kernels(y)) {
    launch(plan_relu_mask, {dtype_of(y), pixels(y), channels(y), data(y), mask_data(mask)}, y);
  } else {
    relu_mask_cpu(dtype_of(y), data(y), pixels(y), channels(y), mask_data(mask));
  }
  return mask;
}

}  // namespace resnet_fused
