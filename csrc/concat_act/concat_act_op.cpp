#include "../bn_act/bn_act_cpu.h"
#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "concat_act.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> concat_act(const Tensor& x, const Tensor& u, const Tensor& scale,
                                      const Tensor& shift, bool relu, bool save_mask) {
  Checks check("concat_act");
  check.activation("u", u);
  check.other("x", x);
  const int64_t c = channels(x), k = channels(u);
  check.shape("x", x, {u.size(0), c, u.size(2), u.size(3)});
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);
  check.require(relu || !save_mask,
                "save_mask is True and relu is False, expected relu=True: only a relu has a mask");

  Tensor y = empty_nhwc(u, {u.size(0), c + k, u.size(2), u.size(3)}, u.scalar_type());
  Tensor mask = save_mask ? empty_mask(u) : empty_vector(u, 0, ScalarType::Int);
  uint32_t* bits = save_mask ? mask_data(mask) : nullptr;
  if (use_kernels(u)) {
    launch(plan_concat_act,
           {dtype_of(u), relu, pixels(u), c, k, data(x), data(u), floats(scale), floats(shift),
            y.mutable_data_ptr(), bits},
           u);
  } else {
    Tensor first = torch::stable::narrow(y, 1, 0, c), second = torch::stable::narrow(y, 1, c, k);
    torch::stable::copy_(first, x);
    bn_act_cpu({dtype_of(u),
                pixels(u),
                k,
                data(u),
                data(scale),
                data(shift),
                nullptr,
                nullptr,
                nullptr,
                {},
                relu,
                second.mutable_data_ptr(),
                c + k,
                bits});
  }
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> concat_act_backward(const Tensor& dy, const OptionalTensor& mask,
                                                       const OptionalTensor& u, const OptionalTensor& mean,
                                                       int64_t before) {
  Checks check("concat_act_backward");
  check.activation("dy", dy);
  check.require(before >= 1 && before < channels(dy), "before is ", before, ", expected 1 to ",
                channels(dy) - 1, " (dy has ", channels(dy), " channels)");
  const int64_t k = channels(dy) - before;
  const Sizes shape{dy.size(0), k, dy.size(2), dy.size(3)};
  check.mask("mask", mask, shape);
  check.both_or_none("u", u, "mean", mean);
  check.activation("u", u, shape);
  if (mean) check.per_channel("mean", *mean, k);

  Tensor dz = empty_nhwc(dy, shape, dy.scalar_type());
  Tensor sum_dz = empty_vector(dy, k, acc_type(dy));
  Tensor sum_dz_xc = empty_vector(dy, mean ? k : 0, acc_type(dy));
  if (use_kernels(dy)) {
    launch(plan_concat_act_backward,
           {dtype_of(dy),
            pixels(dy),
            before,
            k,
            data(dy),
            mask_data(mask),
            data(u),
            floats(mean),
            dz.mutable_data_ptr(),
            mutable_floats(sum_dz),
            mutable_floats(sum_dz_xc),
            {}},
           dy);
  } else {
    const Tensor second = torch::stable::narrow(const_cast<Tensor&>(dy), 1, before, k);
    bn_act_backward_reduce_cpu({dtype_of(dy), pixels(dy), k, data(second), mask_data(mask), data(u), nullptr,
                                nullptr, data(mean), channels(dy)},
                               dz.mutable_data_ptr(), sum_dz.mutable_data_ptr(),
                               sum_dz_xc.mutable_data_ptr());
  }
  return {dz, sum_dz, sum_dz_xc};
}

}  // namespace resnet_fused
