#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "add_stats.h"
#include "add_stats_cpu.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor, Tensor> add_stats(const Tensor& x, const Tensor& u, const OptionalTensor& scale,
                                             const OptionalTensor& shift) {
  Checks check("add_stats");
  check.activation("x", x);
  check.require(pixels(x) > 0, "x has shape ", to_string(sizes_of(x)),
                ", expected at least one value per channel");
  check.same("u", u);
  check.both_or_none("scale", scale, "shift", shift);
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);

  Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty_vector(x, channels(x), acc_type(x));
  Tensor var = empty_vector(x, channels(x), acc_type(x));
  if (use_kernels(x)) {
    launch(plan_add_stats,
           {dtype_of(x),
            pixels(x),
            channels(x),
            data(x),
            data(u),
            floats(scale),
            floats(shift),
            y.mutable_data_ptr(),
            mutable_floats(mean),
            mutable_floats(var),
            {}},
           x);
  } else {
    add_stats_cpu({dtype_of(x), pixels(x), channels(x), data(x), data(u), data(scale), data(shift),
                   y.mutable_data_ptr(), mean.mutable_data_ptr(), var.mutable_data_ptr()});
  }
  return {y, mean, var};
}

}  // namespace resnet_fused
