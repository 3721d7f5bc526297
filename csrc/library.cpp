// The ops of torch.ops.resnet_fused: schemas, registrations, and the Python module that loads them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace resnet_fused {

STABLE_TORCH_LIBRARY(resnet_fused, m) {
  m.def("bn_stats(Tensor x) -> (Tensor mean, Tensor var)");
  m.def("add_stats(Tensor x, Tensor u, Tensor? scale, Tensor? shift) -> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "bn_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale,"
      " Tensor? residual_shift, bool relu, bool save_mask, int residual_stride=0, int residual_offset=0)"
      " -> (Tensor y, Tensor mask)");
  m.def("relu_mask(Tensor y) -> Tensor");
  m.def(
      "gram_operand(Tensor x, Tensor? scale, Tensor? shift, bool relu, Tensor center, int stride)"
      " -> (Tensor a, Tensor mean)");
  m.def(
      "bn_act_backward_reduce(Tensor dy, Tensor? mask, Tensor? x, Tensor? scale, Tensor? shift, Tensor? mean,"
      " bool write_dz) -> (Tensor dz, Tensor sum_dz, Tensor sum_dz_xc)");
  m.def(
      "bn_act_backward_apply(Tensor dy, Tensor? mask, Tensor x, Tensor? scale, Tensor? shift, Tensor mean,"
      " Tensor coef_dz, Tensor coef_x, Tensor coef_1, Tensor? addend=None) -> Tensor dx");
  m.def("gate_act(Tensor v, Tensor x, Tensor f, bool relu, bool save_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "gate_act_backward(Tensor dy, Tensor? mask, Tensor v, Tensor x, Tensor f)"
      " -> (Tensor dv, Tensor dx, Tensor df)");
  m.def(
      "concat_act(Tensor x, Tensor u, Tensor scale, Tensor shift, bool relu, bool save_mask)"
      " -> (Tensor y, Tensor mask)");
  m.def(
      "concat_act_backward(Tensor dy, Tensor? mask, Tensor? u, Tensor? mean, int before)"
      " -> (Tensor dz, Tensor sum_dz, Tensor sum_dz_xc)");
  m.def(
      "bn_act_pool(Tensor x, Tensor scale, Tensor shift, int kernel, int stride, int padding)"
      " -> (Tensor y, Tensor argmax)");
  m.def(
      "bn_act_pool_backward(Tensor dy, Tensor argmax, int height, int width, int kernel, int stride, int "
      "padding)"
      " -> Tensor da");
  m.def(
      "conv1x1(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int stride, bool stats)"
      " -> (Tensor out, Tensor mean, Tensor var)");
  m.def(
      "conv1x1_dgrad(Tensor dy, Tensor? mask, Tensor? u, Tensor? scale, Tensor? shift, Tensor? mean,"
      " Tensor? coef_dz, Tensor? coef_x, Tensor? coef_1, Tensor weight, int height, int width, int stride,"
      " Tensor? addend, Tensor? addend_mask, Tensor? gate_u, Tensor? gate_scale, Tensor? gate_shift,"
      " Tensor? gate_mean, float addend_scale=1.0, int addend_stride=0, int addend_offset=0)"
      " -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xc)");
  m.def(
      "conv1x1_wgrad(Tensor dy, Tensor? mask, Tensor? u, Tensor? scale, Tensor? shift, Tensor? mean,"
      " Tensor? coef_dz, Tensor? coef_x, Tensor? coef_1, Tensor x, Tensor? x_scale, Tensor? x_shift, int "
      "stride,"
      " bool wide, bool sums) -> (Tensor dw, Tensor sum_dz)");
  m.def(
      "gram(Tensor x, Tensor? scale, Tensor? shift, Tensor center, int stride) -> (Tensor mean, Tensor cov)");
  m.def(
      "expand(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor out_scale, Tensor out_shift,"
      " Tensor? x2, Tensor? weight2, Tensor? out_scale2, int stride, Tensor? residual, bool relu, bool "
      "save_mask)"
      " -> (Tensor y, Tensor mask)");
  m.def(
      "expand_dgrad(Tensor dy, Tensor? mask, Tensor weight, Tensor x, Tensor? scale, Tensor? shift, Tensor q,"
      " Tensor constant, Tensor? mean, int stride, Tensor? addend, Tensor? addend_mask)"
      " -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xc)");
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[] geometry, bool stats)"
      " -> (Tensor out, Tensor mean, Tensor var)");
  m.def(
      "conv2d_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[] geometry, Tensor out_scale,"
      " Tensor out_shift, Tensor? residual, bool relu, bool save_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "conv2d_dgrad(Tensor dy, Tensor? mask, Tensor? u, Tensor? scale, Tensor? shift, Tensor? mean,"
      " Tensor? coef_dz, Tensor? coef_x, Tensor? coef_1, Tensor weight, int height, int width, int[] "
      "geometry,"
      " Tensor? addend, Tensor? addend_mask, Tensor? gate_u, Tensor? gate_scale, Tensor? gate_shift,"
      " Tensor? gate_mean, float addend_scale=1.0, int addend_stride=0, int addend_offset=0)"
      " -> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xc)");
  m.def(
      "conv2d_wgrad(Tensor dy, Tensor? mask, Tensor? u, Tensor? scale, Tensor? shift, Tensor? mean,"
      " Tensor? coef_dz, Tensor? coef_x, Tensor? coef_1, Tensor x, Tensor? x_scale, Tensor? x_shift,"
      " int[] kernel_size, int[] geometry) -> Tensor dw");
}

template <class Library>
void implement(Library& m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("add_stats", TORCH_BOX(&add_stats));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("relu_mask", TORCH_BOX(&relu_mask));
  m.impl("gram_operand", TORCH_BOX(&gram_operand));
  m.impl("bn_act_backward_reduce", TORCH_BOX(&bn_act_backward_reduce));
  m.impl("bn_act_backward_apply", TORCH_BOX(&bn_act_backward_apply));
  m.impl("gate_act", TORCH_BOX(&gate_act));
  m.impl("gate_act_backward", TORCH_BOX(&gate_act_backward));
  m.impl("concat_act", TORCH_BOX(&concat_act));
  m.impl("concat_act_backward", TORCH_BOX(&concat_act_backward));
  m.impl("bn_act_pool", TORCH_BOX(&bn_act_pool));
  m.impl("bn_act_pool_backward", TORCH_BOX(&bn_act_pool_backward));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
#ifdef RESNET_FUSED_CUDA
  implement(m);
#endif
  // Kernels alone, in every build: a replaced launcher runs them for CPU tensors, which Python sends here.
  m.impl("conv1x1", TORCH_BOX(&conv1x1));
  m.impl("conv1x1_dgrad", TORCH_BOX(&conv1x1_dgrad));
  m.impl("conv1x1_wgrad", TORCH_BOX(&conv1x1_wgrad));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("expand_dgrad", TORCH_BOX(&expand_dgrad));
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_bn_act", TORCH_BOX(&conv2d_bn_act));
  m.impl("conv2d_dgrad", TORCH_BOX(&conv2d_dgrad));
  m.impl("conv2d_wgrad", TORCH_BOX(&conv2d_wgrad));
}

}  // namespace resnet_fused

// `import resnet_fused._C` loads the library, which registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
