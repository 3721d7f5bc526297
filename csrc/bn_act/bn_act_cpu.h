#pragma once

#include "../common/dtype.h"
#include "../common/rows.h"

namespace resnet_fused {

// Activations are [M, C] of type dtype, per-channel vectors [C] of AccOf<dtype>, masks [ceil(C/32), M].
// Pointers to absent arguments are null.

struct BnActCpu {
  DType dtype;
  int64_t m, c;
  const void *x, *scale, *shift;
  const void *residual, *residual_scale, *residual_shift;
  PaddedShortcut padded;  // of the residual, see rows.h
  bool relu;
  void* y;
  int64_t y_pitch;  // elements from a row of y to its next; 0: c
  uint32_t* mask;
};
void bn_act_cpu(const BnActCpu& args);

void relu_mask_cpu(DType dtype, const void* y, int64_t m, int64_t c, uint32_t* mask);

// dz = dy * relu', with relu' from the mask, else from the sign of scale * x + shift, else 1.
struct BnActBackwardCpu {
  DType dtype;
  int64_t m, c;
  const void* dy;
  const uint32_t* mask;
  const void *x, *scale, *shift, *mean;
  int64_t dy_pitch;  // elements from a row of dy to its next; 0: c
};
void bn_act_backward_reduce_cpu(const BnActBackwardCpu& args, void* dz, void* sum_dz, void* sum_dz_xc);
void bn_act_backward_apply_cpu(const BnActBackwardCpu& args, const void* coef_dz, const void* coef_x,
                               const void* coef_1, const void* addend, void* dx);

}  // namespace resnet_fused
