#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "bn_act.h"
#include "bn_act_cpu.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                  const OptionalTensor& residual_shift, bool relu, bool save_mask) {
  Checks check("bn_act");
  check.activation("x", x);
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);
  check.same("residual", residual);
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
           {dtype_of(x), relu, pixels(x), channels(x), data(x), floats(scale), floats(shift), data(residual),
            floats(residual_scale), floats(residual_shift), y.mutable_data_ptr(), bits},
           x);
  } else {
    bn_act_cpu({dtype_of(x), pixels(x), channels(x), data(x), data(scale), data(shift), data(residual),
                data(residual_scale), data(residual_shift), relu, y.mutable_data_ptr(), bits});
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
