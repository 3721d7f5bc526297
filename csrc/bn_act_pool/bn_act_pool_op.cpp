#include "../common/checks.h"
#include "../common/device.h"
#include "../ops.h"
#include "bn_act_pool.h"
#include "bn_act_pool_cpu.h"

namespace resnet_fused {
namespace {

PoolShape check_pool(const Checks& check, int64_t n, int64_t c, int64_t h, int64_t w, int64_t kernel,
                     int64_t stride, int64_t padding) {
  check.require(kernel >= 1 && kernel <= 11, "kernel is ", kernel, ", expected 1 to 11");
  check.require(stride >= 1, "stride is ", stride, ", expected at least 1");
  check.require(padding >= 0 && padding <= kernel / 2, "padding is ", padding, ", expected 0 to ", kernel / 2,
                " (half the kernel)");
  check.require(h + 2 * padding >= kernel && w + 2 * padding >= kernel, "the input is ", h, " by ", w,
                ", expected at least ", kernel, " by ", kernel, " with its padding of ", padding);
  const int64_t out_h = (h + 2 * padding - kernel) / stride + 1,
                out_w = (w + 2 * padding - kernel) / stride + 1;
  return {n, c, h, w, out_h, out_w, kernel, stride, padding};
}

Window window(const PoolShape& s) {
  const int64_t most = std::min<int64_t>(std::max(s.h, s.w) + 2 * s.padding, INT32_MAX);
  return {static_cast<int32_t>(s.kernel),
          static_cast<int32_t>(std::min(s.stride, most)),  // a larger one has the same windows
          static_cast<int32_t>(s.padding)};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_act_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                       int64_t kernel, int64_t stride, int64_t padding) {
  Checks check("bn_act_pool");
  check.activation("x", x);
  check.per_channel("scale", scale);
  check.per_channel("shift", shift);
  const PoolShape s = check_pool(check, x.size(0), x.size(1), x.size(2), x.size(3), kernel, stride, padding);

  Tensor y = empty_nhwc(x, {s.n, s.c, s.out_h, s.out_w}, x.scalar_type());
  Tensor argmax = empty_nhwc(x, {s.n, s.c, s.out_h, s.out_w}, ScalarType::Char);
  auto* winners = static_cast<int8_t*>(argmax.mutable_data_ptr());
  if (use_kernels(x)) {
    launch(plan_bn_act_pool,
           {dtype_of(x), window(s), s.n, s.h, s.w, s.c, data(x), floats(scale), floats(shift),
            y.mutable_data_ptr(), winners},
           x);
  } else {
    bn_act_pool_cpu(dtype_of(x), s, data(x), data(scale), data(shift), y.mutable_data_ptr(), winners);
  }
  return {y, argmax};
}

Tensor bn_act_pool_backward(const Tensor& dy, const Tensor& argmax, int64_t height, int64_t width,
                            int64_t kernel, int64_t stride, int64_t padding) {
  Checks check("bn_act_pool_backward");
  check.activation("dy", dy);
  check.dtype("argmax", argmax, ScalarType::Char);
  check.shape("argmax", argmax, sizes_of(dy));
  check.layout("argmax", argmax);
  check.device("argmax", argmax);
  const PoolShape s = check_pool(check, dy.size(0), dy.size(1), height, width, kernel, stride, padding);
  check.shape("dy", dy, {s.n, s.c, s.out_h, s.out_w});

  Tensor da = empty_nhwc(dy, {s.n, s.c, height, width}, dy.scalar_type());
  const auto* winners = static_cast<const int8_t*>(data(argmax));
  if (use_kernels(dy)) {
    launch(plan_bn_act_pool_backward,
           {dtype_of(dy), window(s), s.n, s.h, s.w, s.c, data(dy), winners, da.mutable_data_ptr()}, dy);
  } else {
    bn_act_pool_backward_cpu(dtype_of(dy), s, data(dy), winners, da.mutable_data_ptr());
  }
  return da;
}

}  // namespace resnet_fused
