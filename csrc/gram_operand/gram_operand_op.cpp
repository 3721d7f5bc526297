#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "gram_operand.h"
#include "gram_operand_cpu.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> gram_operand(const Tensor& x, const OptionalTensor& scale,
                                        const OptionalTensor& shift, bool relu, const Tensor& center,
                                        int64_t stride) {
  Checks check("gram_operand");
  check.activation("x", x);
  check.both_or_none("scale", scale, "shift", shift);
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);
  check.per_channel("center", center);
  check.require(stride >= 1, "stride is ", stride, ", expected at least 1");

  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  Tensor a = stride == 1 ? torch::stable::empty_like(x)
                         : empty_nhwc(x, {n, c, (h + stride - 1) / stride, (w + stride - 1) / stride},
                                      x.scalar_type());
  Tensor mean = empty_vector(x, c, acc_type(x));
  if (use_kernels(x)) {
    launch(plan_gram_operand,
           {dtype_of(x),
            relu,
            n,
            h,
            w,
            c,
            stride,
            data(x),
            floats(scale),
            floats(shift),
            floats(center),
            a.mutable_data_ptr(),
            mutable_floats(mean),
            {}},
           x);
  } else {
    gram_operand_cpu({dtype_of(x), n, h, w, c, stride, data(x), data(scale), data(shift), data(center), relu,
                      a.mutable_data_ptr(), mean.mutable_data_ptr()});
  }
  return {a, mean};
}

}  // namespace resnet_fused
