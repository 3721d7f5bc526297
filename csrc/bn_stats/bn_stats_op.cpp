#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "bn_stats.h"
#include "bn_stats_cpu.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x) {
  Checks check("bn_stats");
  check.activation("x", x);
  check.require(pixels(x) > 0, "x has shape ", to_string(sizes_of(x)),
                ", expected at least one value per channel");

  Tensor mean = empty_vector(x, channels(x), acc_type(x));
  Tensor var = empty_vector(x, channels(x), acc_type(x));
  if (use_kernels(x)) {
    launch(plan_bn_stats,
           {dtype_of(x), pixels(x), channels(x), data(x), mutable_floats(mean), mutable_floats(var), {}}, x);
  } else {
    bn_stats_cpu(dtype_of(x), data(x), pixels(x), channels(x), mean.mutable_data_ptr(),
                 var.mutable_data_ptr());
  }
  return {mean, var};
}

}  // namespace resnet_fused
