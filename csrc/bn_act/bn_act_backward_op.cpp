#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "bn_act.h"
#include "bn_act_cpu.h"

namespace resnet_fused {
namespace {

// The arguments that both passes share.
BnActBackwardCpu check_backward(Checks& check, const Tensor& dy, const OptionalTensor& mask,
                                const OptionalTensor& x, const OptionalTensor& scale,
                                const OptionalTensor& shift, const OptionalTensor& mean) {
  check.activation("dy", dy);
  check.mask("mask", mask);
  check.same("x", x);
  check.both_or_none("scale", scale, "shift", shift);
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);
  check.per_channel("mean", mean);
  check.require(x || !scale, "scale is given without x");
  check.require(x || !mean, "mean is given without x");
  return {dtype_of(dy), pixels(dy),  channels(dy), data(dy),   mask_data(mask),
          data(x),      data(scale), data(shift),  data(mean), 0};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> bn_act_backward_reduce(const Tensor& dy, const OptionalTensor& mask,
                                                          const OptionalTensor& x,
                                                          const OptionalTensor& scale,
                                                          const OptionalTensor& shift,
                                                          const OptionalTensor& mean, bool write_dz) {
  Checks check("bn_act_backward_reduce");
  const BnActBackwardCpu args = check_backward(check, dy, mask, x, scale, shift, mean);

  Tensor dz = write_dz ? torch::stable::empty_like(dy) : empty_vector(dy, 0, dy.scalar_type());
  Tensor sum_dz = empty_vector(dy, channels(dy), acc_type(dy));
  Tensor sum_dz_xc = empty_vector(dy, mean ? channels(dy) : 0, acc_type(dy));
  void* dz_data = write_dz ? dz.mutable_data_ptr() : nullptr;
  if (use_kernels(dy)) {
    launch(plan_bn_act_backward_reduce,
           {args.dtype,
            0,
            args.m,
            args.c,
            args.dy,
            {args.mask, floats(scale), floats(shift)},
            args.x,
            floats(mean),
            dz_data,
            mutable_floats(sum_dz),
            mutable_floats(sum_dz_xc),
            {}},
           dy);
  } else {
    bn_act_backward_reduce_cpu(args, dz_data, sum_dz.mutable_data_ptr(), sum_dz_xc.mutable_data_ptr());
  }
  return {dz, sum_dz, sum_dz_xc};
}

Tensor bn_act_backward_apply(const Tensor& dy, const OptionalTensor& mask, const Tensor& x,
                             const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& mean,
                             const Tensor& coef_dz, const Tensor& coef_x, const Tensor& coef_1,
                             const OptionalTensor& addend) {
  Checks check("bn_act_backward_apply");
  const BnActBackwardCpu args = check_backward(check, dy, mask, x, scale, shift, mean);
  check.per_channel("coef_dz", coef_dz);
  check.per_channel("coef_x", coef_x);
  check.per_channel("coef_1", coef_1);
  check.same("addend", addend);

  Tensor dx = torch::stable::empty_like(x);
  if (use_kernels(dy)) {
    launch(plan_bn_act_backward_apply,
           {args.dtype,
            args.m,
            args.c,
            args.dy,
            {args.mask, floats(scale), floats(shift)},
            args.x,
            floats(mean),
            floats(coef_dz),
            floats(coef_x),
            floats(coef_1),
            data(addend),
            dx.mutable_data_ptr()},
           dy);
  } else {
    bn_act_backward_apply_cpu(args, data(coef_dz), data(coef_x), data(coef_1), data(addend),
                              dx.mutable_data_ptr());
  }
  return dx;
}

}  // namespace resnet_fused
