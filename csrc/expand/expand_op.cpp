#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "expand.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> expand(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                  const Tensor& weight, const Tensor& out_scale, const Tensor& out_shift,
                                  const OptionalTensor& x2, const OptionalTensor& weight2,
                                  const OptionalTensor& out_scale2, int64_t stride,
                                  const OptionalTensor& residual, bool relu, bool save_mask) {
  Checks check("expand");
  check.activation("x", x);
  check.affine("scale", scale, "shift", shift, channels(x));
  check.weight("weight", weight, {}, channels(x));
  const int64_t k = weight.size(0);
  const Sizes shape{x.size(0), k, x.size(2), x.size(3)};
  check.vector("out_scale", out_scale, k);
  check.vector("out_shift", out_shift, k);
  check.together({{"x2", x2}, {"weight2", weight2}, {"out_scale2", out_scale2}});
  check.stride(stride);
  if (x2) {
    check.other("x2", *x2);
    check.require(x2->size(0) == x.size(0) && strided(x2->size(2), stride) == x.size(2) &&
                      strided(x2->size(3), stride) == x.size(3),
                  "x2 has shape ", to_string(sizes_of(*x2)), ", of which stride ", stride,
                  " does not make the pixels of x, which is ", to_string(sizes_of(x)));
    check.weight("weight2", *weight2, k, channels(*x2));
    check.vector("out_scale2", out_scale2, k);
  }
  check.require(x2 || stride == 1, "stride is ", stride, ", expected 1 without x2");
  check.excludes("residual", residual, "x2", x2);
  check.activation("residual", residual, shape);
  check.require(relu || !save_mask,
                "save_mask is True and relu is False, expected relu=True: only a relu has a mask");

  Tensor y = empty_nhwc(x, shape, x.scalar_type());
  Tensor mask = save_mask ? empty_mask(y) : empty_vector(y, 0, ScalarType::Int);
  launch(plan_expand,
         {dtype_of(x),
          relu,
          x.size(0),
          x.size(2),
          x.size(3),
          channels(x),
          k,
          x2 ? x2->size(2) : 0,
          x2 ? x2->size(3) : 0,
          x2 ? channels(*x2) : 0,
          stride,
          data(x),
          floats(scale),
          floats(shift),
          data(weight),
          floats(out_scale),
          floats(out_shift),
          data(x2),
          data(weight2),
          floats(out_scale2),
          data(residual),
          y.mutable_data_ptr(),
          save_mask ? mask_data(mask) : nullptr,
          {}},
         x);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> expand_dgrad(const Tensor& dy, const OptionalTensor& mask,
                                                const Tensor& weight, const Tensor& x,
                                                const OptionalTensor& scale, const OptionalTensor& shift,
                                                const Tensor& q, const Tensor& constant,
                                                const OptionalTensor& mean, int64_t stride,
                                                const OptionalTensor& addend,
                                                const OptionalTensor& addend_mask) {
  Checks check("expand_dgrad");
  check.activation("x", x);
  check.stride(stride);
  check.weight("weight", weight, {}, channels(x));
  const int64_t c = channels(x), k = weight.size(0);
  check.activation("dy", dy, {x.size(0), k, strided(x.size(2), stride), strided(x.size(3), stride)});
  check.mask("mask", mask, sizes_of(dy));
  check.together({{"scale", scale}, {"mean", mean}});
  check.affine("scale", scale, "shift", shift, c);
  check.vector("mean", mean, c);
  check.dtype("q", q, x.scalar_type());
  check.shape("q", q, {c, c});
  check.contiguous("q", q);
  check.device("q", q);
  check.vector("constant", constant, c);
  check.same("addend", addend);
  check.mask("addend_mask", addend_mask);
  check.needs("addend_mask", addend_mask, "addend", addend);
  check.excludes("addend", addend, "scale", scale);
  check.require(!scale || stride == 1, "stride is ", stride, ", expected 1 with scale");

  Tensor dx = empty_nhwc(x, sizes_of(x), x.scalar_type());
  Tensor sum_dz = empty_vector(x, scale ? c : 0, acc_type(x));
  Tensor sum_dz_xc = empty_vector(x, scale ? c : 0, acc_type(x));
  launch(plan_expand_dgrad,
         {dtype_of(x),
          x.size(0),
          x.size(2),
          x.size(3),
          c,
          k,
          stride,
          data(dy),
          mask_data(mask),
          data(weight),
          data(x),
          floats(scale),
          floats(shift),
          data(q),
          floats(constant),
          floats(mean),
          data(addend),
          mask_data(addend_mask),
          dx.mutable_data_ptr(),
          mutable_floats(sum_dz),
          mutable_floats(sum_dz_xc),
          {},
          {}},
         x);
  return {dx, sum_dz, sum_dz_xc};
}

}  // namespace resnet_fused
