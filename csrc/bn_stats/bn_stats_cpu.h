#pragma once

#include "../common/dtype.h"

namespace resnet_fused {

// Mean and biased variance over the rows of x [M, C], M >= 1; mean and var are AccOf<dtype> [C].
void bn_stats_cpu(DType dtype, const void* x, int64_t m, int64_t c, void* mean, void* var);

}  // namespace resnet_fused
