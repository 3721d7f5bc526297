#include "../gemm/checks.h"
#include "../ops.h"
#include "conv1x1.h"

namespace resnet_fused {
namespace {

Sizes strided_shape(const Tensor& x, int64_t channels, int64_t stride) {
  return {x.size(0), channels, strided(x.size(2), stride), strided(x.size(3), stride)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                           const OptionalTensor& shift, int64_t stride, bool stats) {
  Checks check("conv1x1");
  check.activation("x", x);
  check.stride(stride);
  check.weight("weight", weight, {}, channels(x));
  check.affine("scale", scale, "shift", shift, channels(x));

  const int64_t k = weight.size(0);
  Tensor out = empty_nhwc(x, strided_shape(x, k, stride), x.scalar_type());
  Tensor mean = empty_vector(x, stats ? k : 0, acc_type(x));
  Tensor var = empty_vector(x, stats ? k : 0, acc_type(x));
  launch(plan_conv1x1,
         {dtype_of(x),
          x.size(0),
          x.size(2),
          x.size(3),
          channels(x),
          k,
          stride,
          data(x),
          floats(scale),
          floats(shift),
          data(weight),
          out.mutable_data_ptr(),
          stats ? mutable_floats(mean) : nullptr,
          stats ? mutable_floats(var) : nullptr,
          {},
          {}},
         x);
  return {out, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_dgrad(
    const Tensor& dy, const OptionalTensor& mask, const OptionalTensor& u, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& coef_dz,
    const OptionalTensor& coef_x, const OptionalTensor& coef_1, const Tensor& weight, int64_t height,
    int64_t width, int64_t stride, const OptionalTensor& addend, const OptionalTensor& addend_mask,
    const OptionalTensor& gate_u, const OptionalTensor& gate_scale, const OptionalTensor& gate_shift,
    const OptionalTensor& gate_mean, double addend_scale, int64_t addend_stride, int64_t addend_offset) {
  Checks check("conv1x1_dgrad");
  const BnBackward backward = check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1);
  check.needs("mask", mask, "u", u);
  check.stride(stride);
  check.require(dy.size(2) == strided(height, stride) && dy.size(3) == strided(width, stride),
                "dy has shape ", to_string(sizes_of(dy)), ", which is not the output's for height ", height,
                ", width ", width, " and stride ", stride);
  check.weight("weight", weight, channels(dy), {});
  const int64_t c = weight.size(1);
  const Sizes shape{dy.size(0), c, height, width};
  const PaddedAddend padded = check_padded_addend(check, shape, addend, addend_stride, addend_offset);
  check_dgrad_end(check, shape, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean,
                  addend_stride);
  check.require(addend_scale != 0, "addend_scale is 0, expected another value");
  check.require(!gate_u || stride == 1, "stride is ", stride, ", expected 1 with gate_u");

  Tensor dx = empty_nhwc(dy, shape, dy.scalar_type());
  Tensor sum_dz = empty_vector(dy, gate_u ? c : 0, acc_type(dy));
  Tensor sum_dz_xc = empty_vector(dy, gate_u ? c : 0, acc_type(dy));
  launch(plan_conv1x1_dgrad,
         {dtype_of(dy),
          padded,
          dy.size(0),
          height,
          width,
          c,
          channels(dy),
          stride,
          data(dy),
          backward,
          data(weight),
          data(addend),
          mask_data(addend_mask),
          data(gate_u),
          floats(gate_scale),
          floats(gate_shift),
          floats(gate_mean),
          dx.mutable_data_ptr(),
          mutable_floats(sum_dz),
          mutable_floats(sum_dz_xc),
          {},
          {},
          static_cast<float>(addend_scale)},
         dy);
  return {dx, sum_dz, sum_dz_xc};
}

std::tuple<Tensor, Tensor> conv1x1_wgrad(const Tensor& dy, const OptionalTensor& mask,
                                         const OptionalTensor& u, const OptionalTensor& scale,
                                         const OptionalTensor& shift, const OptionalTensor& mean,
                                         const OptionalTensor& coef_dz, const OptionalTensor& coef_x,
                                         const OptionalTensor& coef_1, const Tensor& x,
                                         const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                                         int64_t stride, bool wide, bool sums) {
  Checks check("conv1x1_wgrad");
  const BnBackward backward = check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1);
  check.stride(stride);
  check.require(!u || !sums, "sums is True with u, expected False: sums are those of dy * mask");
  check.other("x", x);
  check.require(strided_shape(x, channels(dy), stride) == sizes_of(dy), "x has shape ",
                to_string(sizes_of(x)), ", of which stride ", stride, " does not make dy's, which is ",
                to_string(sizes_of(dy)));
  check.affine("x_scale", x_scale, "x_shift", x_shift, channels(x));

  const int64_t k = channels(dy), c = channels(x);
  Tensor dw = torch::stable::new_empty(x, Sizes{k, c, 1, 1}, wide ? acc_type(x) : x.scalar_type());
  Tensor sum_dz = empty_vector(dy, sums ? k : 0, acc_type(dy));
  launch(plan_conv1x1_wgrad,
         {dtype_of(dy),
          wide,
          x.size(0),
          x.size(2),
          x.size(3),
          c,
          k,
          stride,
          data(dy),
          backward,
          data(x),
          floats(x_scale),
          floats(x_shift),
          dw.mutable_data_ptr(),
          sums ? mutable_floats(sum_dz) : nullptr,
          {},
          {}},
         dy);
  return {dw, sum_dz};
}

}  // namespace resnet_fused
