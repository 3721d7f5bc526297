#include <string>

#include "conv2d/conv2d_few.h"
#include "gemm/planning.h"

namespace resnet_fused {
namespace {

constexpr const char* kFprop = "conv2d/conv2d_few.cu";
constexpr const char* kWgrad = "conv2d/conv2d_few_wgrad.cu";

// False, with the plan's reason set, where the kernels do not take the shape. They have no prologue on x.
bool check_few(Plan& plan, const char* op, const ConvShape& q, bool activated) {
  if (q.C < 1 || q.C > kFewChannels) {
    refuse(plan, "%s: the kernels take 1 to %d channels or a multiple of 8, got %lld", op, kFewChannels,
           static_cast<long long>(q.C));
  } else if (activated) {
    refuse(plan, "%s: the kernels take %lld channels as they are, without scale and shift", op,
           static_cast<long long>(q.C));
  } else if (q.groups != 1) {
    refuse(plan, "%s: no kernel takes %lld channels in groups", op, static_cast<long long>(q.C));
  } else if (q.R < 1 || q.S < 1 || std::max(q.R, q.S) > kFewTaps) {
    refuse(plan, "%s: the kernels of few channels have up to %dx%d taps, got %lldx%lld", op, kFewTaps,
           kFewTaps, static_cast<long long>(q.R), static_cast<long long>(q.S));
  } else if (std::min(q.stride_h, q.stride_w) < 1 || std::max(q.stride_h, q.stride_w) > 2) {
    refuse(plan, "%s: the kernels of few channels have strides 1 and 2, got %lld and %lld", op,
           static_cast<long long>(q.stride_h), static_cast<long long>(q.stride_w));
  } else if (q.dilation_h != 1 || q.dilation_w != 1) {
    refuse(plan, "%s: the kernels of few channels have no dilation", op);
  } else if (std::max(q.padding_h, q.padding_w) > kMaxChannels || std::min(q.P(), q.Q()) < 1) {
    refuse(plan, "%s: paddings %lld and %lld", op, static_cast<long long>(q.padding_h),
           static_cast<long long>(q.padding_w));
  }
  return plan.reason[0] == '\0';
}

int pad_of(const ConvShape& q) { return q.C <= 4 ? 4 : 8; }

// For tiles of `pixels`.
FewImage image_of(const ConvShape& q, const void* x, int pixels) {
  const int pad = pad_of(q);
  const int64_t P = q.P(), Q = q.Q(), steps = ceil_div(q.S * pad, 16);
  const int64_t gap = ceil_div(std::max<int64_t>(q.S - q.stride_w, 0), 2) * 2;
  const int64_t lines_before_last = (Q - 1 + pixels - 1) / Q;  // of a tile that begins at a line's end
  const int64_t positions = (pixels - 1) * q.stride_w + lines_before_last * gap + steps * (16 / pad);
  const bool two = pad * q.stride_w == 4 || pad * q.stride_w == 16;
  const int64_t plane = two ? ceil_div(positions * 8, 128) * 128 + 64 : 0;
  const auto i = [](int64_t v) { return static_cast<int32_t>(v); };
  return {x,
          i(q.H),
          i(q.W),
          i(q.C),
          i(q.R),
          i(q.S),
          i(q.stride_h),
          i(q.stride_w),
          i(q.padding_h),
          i(q.padding_w),
          i(q.N * P * Q),
          i(q.N * P),
          i(steps),
          i(gap),
          i(plane),
          i(two ? 2 * plane : ceil_div(positions * pad * 2, 16) * 16),
          make_divider(P),
          make_divider(Q),
          make_divider(Q * q.stride_w + gap)};
}

bool check_shared(Plan& plan, const char* op, int arch, int64_t bytes) {
  if (bytes + 1024 <= shared_memory(arch)) return true;
  return refuse(plan, "%s: %lld bytes of shared memory are more than compute capability %d.%d has", op,
                static_cast<long long>(bytes), arch / 10, arch % 10),
         false;
}

template <class Params>
void add_few(Plan& plan, const char* source, const std::string& name, DType dtype, int64_t grid_x,
             int64_t grid_y, int threads, int64_t bytes, const Params& params) {
  const std::string symbol = name + (dtype == DType::kBFloat16 ? "_bf16" : "_f16");
  Step& step = append(plan, source, symbol.c_str(), grid_x, grid_y, threads / 32);
  step.smem = static_cast<uint32_t>(bytes);
  set_params(step, params);
}

template <class Prologue>
void add_wgrad(Plan& plan, const Conv2dWgradProblem& q, const std::string& name, const FewImage& image,
               int64_t splits, int64_t per_split, int64_t bytes, const Prologue& prologue) {
  const bool four = pad_of(q.shape) == 4;
  const FewWgradParams<Prologue> params{
      image, q.dy, static_cast<int32_t>(q.shape.K), static_cast<int32_t>(per_split), prologue, q.workspace};
  add_few(plan, kWgrad, name + (four ? "_4" : "_8"), q.dtype, ceil_div(q.shape.K, kFewWgrad4.m), splits,
          (four ? kFewWgrad4 : kFewWgrad8).threads(), bytes, params);
}

}  // namespace

Plan plan_conv2d_few(const Conv2dProblem& q, int arch) {
  constexpr int64_t kBlocksWanted = 2048;  // weights are rearranged once a block
  Plan plan{};
  const ConvShape& s = q.shape;
  if (!check_few(plan, "conv2d", s, q.scale)) return plan;
  const int64_t M = s.N * s.P() * s.Q();
  if (!check_gemm(plan, "conv2d", q.dtype, arch, {M, s.N * s.H * s.W}, {s.K}, {q.out})) return plan;
  if (q.tile < 0 || q.tile > 1) return refuse(plan, "tile %d does not exist, there is one", q.tile), plan;
  if (M == 0) return q.mean ? refuse(plan, "conv2d: no pixels to take statistics of") : void(), plan;

  const FewImage image = image_of(s, q.x, kFew.m);
  const int64_t weight_pitch = (image.R * image.steps * 2 + 1) * 16;
  const int64_t end = kFew.threads() / 32 * (kStagingBytes + 2 * kFew.n * 4);  // ColumnSums
  const int64_t bytes = kFew.n * weight_pitch + std::max<int64_t>(image.R * image.pitch, end);
  if (!check_shared(plan, "conv2d", arch, bytes)) return plan;
  const int64_t tiles = ceil_div(M, kFew.m), across = ceil_div(s.K, kFew.n);
  const int64_t of_block = std::clamp<int64_t>(tiles * across / kBlocksWanted, 1, 16);
  if (q.mean) plan.workspace = tiles * 2 * s.K;
  const FewFpropParams params{image,
                              q.weight,
                              static_cast<int32_t>(s.K),
                              static_cast<int32_t>(weight_pitch),
                              static_cast<int32_t>(of_block),
                              {q.out, q.mean ? q.workspace : nullptr}};
  const char* name = pad_of(s) == 8     ? "conv2d_few_fprop_8"
                     : image.steps == 1 ? "conv2d_few_fprop_4x1"
                                        : "conv2d_few_fprop_4x2";
  add_few(plan, kFprop, name, q.dtype, ceil_div(tiles, of_block), across, kFew.threads(), bytes, params);
  if (q.mean) add_merge_stats(plan, q.workspace, q.mean, q.var, M, s.K, kFew);
  return plan;
}

Plan plan_conv2d_wgrad_few(const Conv2dWgradProblem& q, int arch) {
  constexpr int64_t kBlocksWanted = 512, kShortest = 4;  // tiles of a split
  Plan plan{};
  const ConvShape& s = q.shape;
  if (!check_few(plan, "conv2d_wgrad", s, q.scale)) return plan;
  const int64_t M = s.N * s.P() * s.Q();
  if (!check_gemm(plan, "conv2d_wgrad", q.dtype, arch, {M, s.N * s.H * s.W}, {s.K},
                  {q.dy, q.backward.u, q.dw})) {
    return plan;
  }
  if (q.tile < 0 || q.tile > 1) return refuse(plan, "tile %d does not exist, there is one", q.tile), plan;
  if (M == 0) return refuse(plan, "conv2d_wgrad: no pixels to sum over"), plan;

  const TileShape& tile = pad_of(s) == 4 ? kFewWgrad4 : kFewWgrad8;
  const FewImage image = image_of(s, q.x, tile.k);
  const bool backward = q.backward.coef_dz;
  const int64_t bytes = kStages * (stage_bytes(tile.k, tile.m, {backward, backward}) + image.R * image.pitch);
  if (!check_shared(plan, "conv2d_wgrad", arch, bytes)) return plan;
  const int64_t tiles = ceil_div(M, tile.k), across = ceil_div(s.K, tile.m);
  const int64_t wanted = std::min(std::max<int64_t>(kBlocksWanted / across, 1), ceil_div(tiles, kShortest));
  const int64_t per_split = ceil_div(tiles, wanted) * tile.k, splits = ceil_div(M, per_split);
  const int64_t n = s.K * s.R * s.S * s.C;
  plan.workspace = splits * n;
  if (backward) {
    add_wgrad(plan, q, "conv2d_few_wgrad_backward", image, splits, per_split, bytes, q.backward);
  } else {
    add_wgrad(plan, q, "conv2d_few_wgrad", image, splits, per_split, bytes, Nothing{});
  }
  add_sum_splits(plan, q.workspace, splits, n, q.dw, q.dtype, 0, nullptr);
  return plan;
}

}  // namespace resnet_fused
