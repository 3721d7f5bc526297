// The C++ functions behind torch.ops.resnet_fused; library.cpp has their schemas.
//
// Activations are [N, C, H, W] tensors, dense NHWC in memory, of dtype float32, bfloat16, float16 or
// float64. Per-channel vectors are contiguous [C], float64 for float64 activations, else float32.
// A mask holds relu' as bit panels, int32 [ceil(C/32), M] with M = N * H * W.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace resnet_fused {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Mean and biased variance of x over N, H and W.
std::tuple<Tensor, Tensor> bn_stats(const Tensor& x);

// y = relu?(scale * x + shift [+ residual | + residual_scale * residual + residual_shift]) and its mask.
std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                  const OptionalTensor& residual_shift, bool relu, bool save_mask);

// The mask of an already activated tensor.
Tensor relu_mask(const Tensor& y);

// a = round(act(scale * x + shift) - center) of every stride-th pixel, and the mean of a.
std::tuple<Tensor, Tensor> gram_operand(const Tensor& x, const OptionalTensor& scale,
                                        const OptionalTensor& shift, bool relu, const Tensor& center,
                                        int64_t stride);

// dz = dy * relu', sum(dz) and sum(dz * (x - mean)).
std::tuple<Tensor, Tensor, Tensor> bn_act_backward_reduce(const Tensor& dy, const OptionalTensor& mask,
                                                          const OptionalTensor& x,
                                                          const OptionalTensor& scale,
                                                          const OptionalTensor& shift,
                                                          const OptionalTensor& mean, bool write_dz);

// dx = coef_dz * dz + coef_x * (x - mean) + coef_1.
Tensor bn_act_backward_apply(const Tensor& dy, const OptionalTensor& mask, const Tensor& x,
                             const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& mean,
                             const Tensor& coef_dz, const Tensor& coef_x, const Tensor& coef_1);

// y = maxpool(relu(scale * x + shift)) and the winning tap of each window, int8.
std::tuple<Tensor, Tensor> bn_act_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                       int64_t kernel, int64_t stride, int64_t padding);

// The gradient of the max pool's input [N, C, height, width].
Tensor bn_act_pool_backward(const Tensor& dy, const Tensor& argmax, int64_t height, int64_t width,
                            int64_t kernel, int64_t stride, int64_t padding);

}  // namespace resnet_fused
