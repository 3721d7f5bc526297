#include "../gemm/checks.h"
#include "../ops.h"
#include "conv2d.h"

namespace resnet_fused {
namespace {

using Ints = std::vector<int64_t>;

// stride, padding and dilation (two each, down and across), groups
void check_geometry(const Checks& check, const Ints& geometry) {
  check.require(geometry.size() == 7, "geometry is ", to_string(geometry),
                ", expected stride, padding and dilation, two integers each, and groups");
  for (int i : {0, 1, 4, 5, 6}) {
    check.require(geometry[i] >= 1, "geometry is ", to_string(geometry),
                  ", expected strides, dilations and groups from 1");
  }
  check.require(geometry[2] >= 0 && geometry[3] >= 0, "geometry is ", to_string(geometry),
                ", expected paddings from 0");
}

ConvShape shape_of(int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t r, int64_t s,
                   const Ints& g) {
  return {n, h, w, c, k, r, s, g[0], g[1], g[2], g[3], g[4], g[5], g[6]};
}

// Weights [K, C / groups, R, S] with memory KRSC for c input channels; `k` of 0: any.
void check_weight(const Checks& check, const Tensor& weight, int64_t k, int64_t c, int64_t groups,
                  ScalarType type) {
  check.dtype("weight", weight, type);
  check.require(weight.dim() == 4 && weight.numel() > 0, "weight has shape ", to_string(sizes_of(weight)),
                ", expected 4 dimensions [K, C / groups, R, S]");
  check.require((!k || weight.size(0) == k) && weight.size(0) % groups == 0 && c == weight.size(1) * groups,
                "weight has shape ", to_string(sizes_of(weight)), ", which does not convolve ", c,
                " channels in ", groups, " groups", k ? " into " + std::to_string(k) : std::string());
  check.layout("weight", weight);
  check.device("weight", weight);
}

ConvShape check_fprop(Checks& check, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                      const OptionalTensor& shift, const Ints& geometry) {
  check.activation("x", x);
  check_geometry(check, geometry);
  check_weight(check, weight, 0, channels(x), geometry[6], x.scalar_type());
  check.affine("scale", scale, "shift", shift, channels(x));
  const ConvShape shape = shape_of(x.size(0), x.size(2), x.size(3), channels(x), weight.size(0),
                                   weight.size(2), weight.size(3), geometry);
  check.require(shape.P() >= 1 && shape.Q() >= 1, "x has shape ", to_string(sizes_of(x)),
                ", smaller than the kernel [", shape.R, ", ", shape.S, "] with geometry ",
                to_string(geometry));
  return shape;
}

// dy is the gradient of what a convolution of this shape gives.
void check_output(const Checks& check, const Tensor& dy, const ConvShape& q) {
  check.require(dy.size(0) == q.N && channels(dy) == q.K && dy.size(2) == q.P() && dy.size(3) == q.Q(),
                "dy has shape ", to_string(sizes_of(dy)), ", expected the convolution's output, ",
                to_string({q.N, q.K, q.P(), q.Q()}));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                          const OptionalTensor& shift, std::vector<int64_t> geometry,
                                          bool stats) {
  Checks check("conv2d");
  const ConvShape shape = check_fprop(check, x, weight, scale, shift, geometry);
  Tensor out = empty_nhwc(x, {shape.N, shape.K, shape.P(), shape.Q()}, x.scalar_type());
  Tensor mean = empty_vector(x, stats ? shape.K : 0, acc_type(x));
  Tensor var = empty_vector(x, stats ? shape.K : 0, acc_type(x));
  launch(plan_conv2d,
         {dtype_of(x),
          shape,
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

std::tuple<Tensor, Tensor> conv2d_bn_act(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                         const OptionalTensor& shift, std::vector<int64_t> geometry,
                                         const Tensor& out_scale, const Tensor& out_shift,
                                         const OptionalTensor& residual, bool relu, bool save_mask) {
  Checks check("conv2d_bn_act");
  const ConvShape shape = check_fprop(check, x, weight, scale, shift, geometry);
  const Sizes out{shape.N, shape.K, shape.P(), shape.Q()};
  check.vector("out_scale", out_scale, shape.K);
  check.vector("out_shift", out_shift, shape.K);
  check.activation("residual", residual, out);
  check.require(relu || !save_mask,
                "save_mask is True and relu is False, expected relu=True: only a relu has a mask");
  Tensor y = empty_nhwc(x, out, x.scalar_type());
  Tensor mask = save_mask ? empty_mask(y) : empty_vector(y, 0, ScalarType::Int);
  launch(plan_conv2d_bn_act,
         {dtype_of(x),
          relu,
          shape,
          data(x),
          floats(scale),
          floats(shift),
          data(weight),
          floats(out_scale),
          floats(out_shift),
          data(residual),
          y.mutable_data_ptr(),
          save_mask ? mask_data(mask) : nullptr,
          {}},
         x);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_dgrad(
    const Tensor& dy, const OptionalTensor& mask, const OptionalTensor& u, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& coef_dz,
    const OptionalTensor& coef_x, const OptionalTensor& coef_1, const Tensor& weight, int64_t height,
    int64_t width, std::vector<int64_t> geometry, const OptionalTensor& addend,
    const OptionalTensor& addend_mask, const OptionalTensor& gate_u, const OptionalTensor& gate_scale,
    const OptionalTensor& gate_shift, const OptionalTensor& gate_mean, double addend_scale,
    int64_t addend_stride, int64_t addend_offset) {
  Checks check("conv2d_dgrad");
  const BnBackward backward = check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1);
  check.needs("mask", mask, "u", u);
  check_geometry(check, geometry);
  check.require(weight.dim() == 4, "weight has shape ", to_string(sizes_of(weight)),
                ", expected 4 dimensions [K, C / groups, R, S]");
  const int64_t c = weight.size(1) * geometry[6];
  check_weight(check, weight, channels(dy), c, geometry[6], dy.scalar_type());
  const ConvShape shape =
      shape_of(dy.size(0), height, width, c, channels(dy), weight.size(2), weight.size(3), geometry);
  check_output(check, dy, shape);
  const Sizes dx_shape{dy.size(0), c, height, width};
  const PaddedAddend padded = check_padded_addend(check, dx_shape, addend, addend_stride, addend_offset);
  check_dgrad_end(check, dx_shape, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean,
                  addend_stride);
  check.require(addend_scale != 0, "addend_scale is 0, expected another value");

  Tensor dx = empty_nhwc(dy, dx_shape, dy.scalar_type());
  Tensor sum_dz = empty_vector(dy, gate_u ? c : 0, acc_type(dy));
  Tensor sum_dz_xc = empty_vector(dy, gate_u ? c : 0, acc_type(dy));
  launch(plan_conv2d_dgrad,
         {dtype_of(dy),
          padded,
          shape,
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

Tensor conv2d_wgrad(const Tensor& dy, const OptionalTensor& mask, const OptionalTensor& u,
                    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
                    const OptionalTensor& coef_dz, const OptionalTensor& coef_x, const OptionalTensor& coef_1,
                    const Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                    std::vector<int64_t> kernel_size, std::vector<int64_t> geometry) {
  Checks check("conv2d_wgrad");
  const BnBackward backward = check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1);
  check.needs("mask", mask, "u", u);
  check_geometry(check, geometry);
  check.require(kernel_size.size() == 2 && kernel_size[0] >= 1 && kernel_size[1] >= 1, "kernel_size is ",
                to_string(kernel_size), ", expected two integers from 1");
  check.other("x", x);
  const int64_t k = channels(dy), c = channels(x), groups = geometry[6];
  check.require(k % groups == 0 && c % groups == 0, "geometry is ", to_string(geometry), ", whose ", groups,
                " groups divide not both dy's channels, ", k, ", and x's, ", c);
  const ConvShape shape =
      shape_of(x.size(0), x.size(2), x.size(3), c, k, kernel_size[0], kernel_size[1], geometry);
  check_output(check, dy, shape);
  check.affine("x_scale", x_scale, "x_shift", x_shift, c);

  Tensor dw = empty_nhwc(x, {k, c / groups, kernel_size[0], kernel_size[1]}, x.scalar_type());
  launch(plan_conv2d_wgrad,
         {dtype_of(dy),
          shape,
          data(dy),
          backward,
          data(x),
          floats(x_scale),
          floats(x_shift),
          dw.mutable_data_ptr(),
          {},
          {}},
         dy);
  return dw;
}

}  // namespace resnet_fused
