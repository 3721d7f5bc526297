#pragma once

#include "../common/dtype.h"

namespace resnet_fused {

// a[n, i, j] = round(act(scale * x[n, i * stride, j * stride] + shift) - center) and the mean of a.
struct GramOperandCpu {
  DType dtype;
  int64_t n, h, w, c, stride;
  const void *x, *scale, *shift, *center;  // scale and shift may be null: identity
  bool relu;
  void *a, *mean;
};
void gram_operand_cpu(const GramOperandCpu& args);

}  // namespace resnet_fused
