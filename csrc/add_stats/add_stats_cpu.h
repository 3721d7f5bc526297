#pragma once

#include "../common/dtype.h"

namespace resnet_fused {

// y = x + u, or x + scale*u + shift, and the mean and biased variance of its rows; y, x and u are [M, C], M
// >= 1, vectors AccOf<dtype> [C]. scale and shift may both be null.
struct AddStatsCpu {
  DType dtype;
  int64_t m, c;
  const void *x, *u, *scale, *shift;
  void *y, *mean, *var;
};
void add_stats_cpu(const AddStatsCpu& args);

}  // namespace resnet_fused
