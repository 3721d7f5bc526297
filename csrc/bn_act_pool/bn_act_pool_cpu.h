#pragma once

#include "../common/dtype.h"

namespace resnet_fused {

// Pooling windows: out = floor((in + 2 * padding - kernel) / stride) + 1 in each direction.
struct PoolShape {
  int64_t n, c, h, w, out_h, out_w;
  int64_t kernel, stride, padding;
};

// y = maxpool(relu(scale * x + shift)); argmax[n, i, j, c] = the winning tap, kh * kernel + kw.
void bn_act_pool_cpu(DType dtype, const PoolShape& shape, const void* x, const void* scale, const void* shift,
                     void* y, int8_t* argmax);

// da[n, h, w, c] = the sum of dy over the windows that (h, w) won.
void bn_act_pool_backward_cpu(DType dtype, const PoolShape& shape, const void* dy, const int8_t* argmax,
                              void* da);

}  // namespace resnet_fused
