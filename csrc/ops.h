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

// y = x + u, or x + scale * u + shift, and the mean and biased variance of y over N, H and W.
std::tuple<Tensor, Tensor, Tensor> add_stats(const Tensor& x, const Tensor& u, const OptionalTensor& scale,
                                             const OptionalTensor& shift);

// y = relu?(scale * x + shift [+ residual | + residual_scale * residual + residual_shift]) and its mask.
// With residual_stride, residual has other pixels and channels: see PaddedShortcut in common/rows.h.
std::tuple<Tensor, Tensor> bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                  const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                  const OptionalTensor& residual_shift, bool relu, bool save_mask,
                                  int64_t residual_stride, int64_t residual_offset);

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

// dx = coef_dz * dz + coef_x * (x - mean) + coef_1 [+ addend].
Tensor bn_act_backward_apply(const Tensor& dy, const OptionalTensor& mask, const Tensor& x,
                             const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& mean,
                             const Tensor& coef_dz, const Tensor& coef_x, const Tensor& coef_1,
                             const OptionalTensor& addend);

// y = relu?((1 - g) * x + g * f) with g = sigmoid(v), and its mask.
std::tuple<Tensor, Tensor> gate_act(const Tensor& v, const Tensor& x, const Tensor& f, bool relu,
                                    bool save_mask);

// The gradients of v, x and f for dy * mask.
std::tuple<Tensor, Tensor, Tensor> gate_act_backward(const Tensor& dy, const OptionalTensor& mask,
                                                     const Tensor& v, const Tensor& x, const Tensor& f);

// y = [x | relu?(scale * u + shift)] along the channels, and the mask of the second part.
std::tuple<Tensor, Tensor> concat_act(const Tensor& x, const Tensor& u, const Tensor& scale,
                                      const Tensor& shift, bool relu, bool save_mask);

// dz = dy * mask of the channels of dy behind the first `before`, sum(dz) and sum(dz * (u - mean)).
std::tuple<Tensor, Tensor, Tensor> concat_act_backward(const Tensor& dy, const OptionalTensor& mask,
                                                       const OptionalTensor& u, const OptionalTensor& mean,
                                                       int64_t before);

// y = maxpool(relu(scale * x + shift)) and the winning tap of each window, int8.
std::tuple<Tensor, Tensor> bn_act_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                       int64_t kernel, int64_t stride, int64_t padding);

// The gradient of the max pool's input [N, C, height, width].
Tensor bn_act_pool_backward(const Tensor& dy, const Tensor& argmax, int64_t height, int64_t width,
                            int64_t kernel, int64_t stride, int64_t padding);

// The ops below have kernels for bfloat16 and float16 and channels in multiples of 8, and these functions are
// for devices that run them; on the CPU they are compositions of ATen's convolutions and the ops above, in
// Python. Weights are [K, C, 1, 1] with memory [K][C]. Each says in its plan's header what it computes.

// out = conv1x1(relu(scale*x + shift), or x), and the mean and variance of out (or empty).
std::tuple<Tensor, Tensor, Tensor> conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                           const OptionalTensor& shift, int64_t stride, bool stats);

// dx [N, C, height, width] of conv1x1 for the gradient of its output: dy, or with u, the raw output, that of
// a batch norm behind it. Then addend_scale * addend * addend_mask is added, or relu' of gate_scale*gate_u +
// gate_shift gates it, and the sums of dx and dx * (gate_u - gate_mean) are taken. With addend_stride, the
// addend is the gradient of what a padded shortcut makes of x: see PaddedAddend in gemm/gemm.h.
std::tuple<Tensor, Tensor, Tensor> conv1x1_dgrad(
    const Tensor& dy, const OptionalTensor& mask, const OptionalTensor& u, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& coef_dz,
    const OptionalTensor& coef_x, const OptionalTensor& coef_1, const Tensor& weight, int64_t height,
    int64_t width, int64_t stride, const OptionalTensor& addend, const OptionalTensor& addend_mask,
    const OptionalTensor& gate_u, const OptionalTensor& gate_scale, const OptionalTensor& gate_shift,
    const OptionalTensor& gate_mean, double addend_scale, int64_t addend_stride, int64_t addend_offset);

// dw [K, C, 1, 1] of conv1x1, in the accumulation type if `wide`; without u, also the sums of dy * mask (or
// empty).
std::tuple<Tensor, Tensor> conv1x1_wgrad(const Tensor& dy, const OptionalTensor& mask,
                                         const OptionalTensor& u, const OptionalTensor& scale,
                                         const OptionalTensor& shift, const OptionalTensor& mean,
                                         const OptionalTensor& coef_dz, const OptionalTensor& coef_x,
                                         const OptionalTensor& coef_1, const Tensor& x,
                                         const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                                         int64_t stride, bool wide, bool sums);

// Mean [C] and covariance [C, C] of a = round(relu(scale*x + shift), or x, - center); center is representable
// in x's dtype.
std::tuple<Tensor, Tensor> gram(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                const Tensor& center, int64_t stride);

// y = relu?(out_scale * conv1x1(a, weight) + out_shift + shortcut) and its mask; the shortcut is residual, or
// out_scale2 * conv1x1(x2, weight2).
std::tuple<Tensor, Tensor> expand(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                  const Tensor& weight, const Tensor& out_scale, const Tensor& out_shift,
                                  const OptionalTensor& x2, const OptionalTensor& weight2,
                                  const OptionalTensor& out_scale2, int64_t stride,
                                  const OptionalTensor& residual, bool relu, bool save_mask);

// The gradient of a batch-normalised 1x1 convolution's operand a: (dy * mask) W + a q + constant, gated by
// a's ReLU and summed up, or scattered to x's strided pixels and added to addend * addend_mask.
std::tuple<Tensor, Tensor, Tensor> expand_dgrad(const Tensor& dy, const OptionalTensor& mask,
                                                const Tensor& weight, const Tensor& x,
                                                const OptionalTensor& scale, const OptionalTensor& shift,
                                                const Tensor& q, const Tensor& constant,
                                                const OptionalTensor& mean, int64_t stride,
                                                const OptionalTensor& addend,
                                                const OptionalTensor& addend_mask);

// The k x k convolution [K, C / groups, R, S], memory KRSC. geometry: stride, padding, dilation (two each),
// groups.

// out = conv2d(relu(scale*x + shift), or x), and the mean and variance of out (or empty).
std::tuple<Tensor, Tensor, Tensor> conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                          const OptionalTensor& shift, std::vector<int64_t> geometry,
                                          bool stats);

// y = relu?(out_scale * conv2d(relu(scale*x + shift), or x) + out_shift + residual) and its mask.
std::tuple<Tensor, Tensor> conv2d_bn_act(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                         const OptionalTensor& shift, std::vector<int64_t> geometry,
                                         const Tensor& out_scale, const Tensor& out_shift,
                                         const OptionalTensor& residual, bool relu, bool save_mask);

// dx [N, C, height, width] of conv2d: see conv1x1_dgrad.
std::tuple<Tensor, Tensor, Tensor> conv2d_dgrad(
    const Tensor& dy, const OptionalTensor& mask, const OptionalTensor& u, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& coef_dz,
    const OptionalTensor& coef_x, const OptionalTensor& coef_1, const Tensor& weight, int64_t height,
    int64_t width, std::vector<int64_t> geometry, const OptionalTensor& addend,
    const OptionalTensor& addend_mask, const OptionalTensor& gate_u, const OptionalTensor& gate_scale,
    const OptionalTensor& gate_shift, const OptionalTensor& gate_mean, double addend_scale,
    int64_t addend_stride, int64_t addend_offset);

// dw [K, C / groups, *kernel_size] of conv2d, memory KRSC: see conv1x1_wgrad.
Tensor conv2d_wgrad(const Tensor& dy, const OptionalTensor& mask, const OptionalTensor& u,
                    const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
                    const OptionalTensor& coef_dz, const OptionalTensor& coef_x, const OptionalTensor& coef_1,
                    const Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                    std::vector<int64_t> kernel_size, std::vector<int64_t> geometry);

}  // namespace resnet_fused
