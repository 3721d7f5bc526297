#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "gram.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> gram(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                const Tensor& center, int64_t stride) {
  Checks check("gram");
  check.activation("x", x);
  const int64_t c = channels(x);
  check.affine("scale", scale, "shift", shift, c);
  check.vector("center", center, c);
  check.stride(stride);

  Tensor mean = empty_vector(x, c, acc_type(x));
  Tensor cov = torch::stable::new_empty(x, Sizes{c, c}, acc_type(x));
  launch(plan_gram,
         {dtype_of(x),
          x.size(0),
          x.size(2),
          x.size(3),
          c,
          stride,
          data(x),
          floats(scale),
          floats(shift),
          floats(center),
          mutable_floats(cov),
          mutable_floats(mean),
          {},
          {}},
         x);
  return {mean, cov};
}

}  // namespace resnet_fused
