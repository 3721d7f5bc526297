#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "gate_act.h"
#include "gate_act_cpu.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> gate_act(const Tensor& v, const Tensor& x, const Tensor& f, bool relu,
                                    bool save_mask) {
  Checks check("gate_act");
  check.activation("v", v);
  check.same("x", x);
  check.same("f", f);
  check.require(relu || !save_mask,
                "save_mask is True and relu is False, expected relu=True: only a relu has a mask");

  Tensor y = torch::stable::empty_like(v);
  Tensor mask = save_mask ? empty_mask(v) : empty_vector(v, 0, ScalarType::Int);
  uint32_t* bits = save_mask ? mask_data(mask) : nullptr;
  if (use_kernels(v)) {
    launch(plan_gate_act,
           {dtype_of(v), relu, pixels(v), channels(v), data(v), data(x), data(f), y.mutable_data_ptr(), bits},
           v);
  } else {
    gate_act_cpu(
        {dtype_of(v), pixels(v), channels(v), data(v), data(x), data(f), relu, y.mutable_data_ptr(), bits});
  }
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> gate_act_backward(const Tensor& dy, const OptionalTensor& mask,
                                                     const Tensor& v, const Tensor& x, const Tensor& f) {
  Checks check("gate_act_backward");
  check.activation("dy", dy);
  check.mask("mask", mask);
  check.same("v", v);
  check.same("x", x);
  check.same("f", f);

  Tensor dv = torch::stable::empty_like(dy), dx = torch::stable::empty_like(dy),
         df = torch::stable::empty_like(dy);
  if (use_kernels(dy)) {
    launch(plan_gate_act_backward,
           {dtype_of(dy), pixels(dy), channels(dy), data(dy), mask_data(mask), data(v), data(x), data(f),
            dv.mutable_data_ptr(), dx.mutable_data_ptr(), df.mutable_data_ptr()},
           dy);
  } else {
    gate_act_backward_cpu({dtype_of(dy), pixels(dy), channels(dy), data(dy), mask_data(mask), data(v),
                           data(x), data(f), dv.mutable_data_ptr(), dx.mutable_data_ptr(),
                           df.mutable_data_ptr()});
  }
  return {dv, dx, df};
}

}  // namespace resnet_fused
