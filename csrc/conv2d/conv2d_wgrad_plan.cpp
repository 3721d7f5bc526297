#include <numeric>
#include <string>

#include "conv2d/conv2d_few.h"
#include "gemm/planning.h"
#include "gemm/wgrad.h"

namespace resnet_fused {
namespace {

constexpr const char* kSource = "conv2d/conv2d_wgrad.cu";

int64_t floor_div(int64_t a, int64_t b) { return (a - (a % b + b) % b) / b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

// How a problem is cut into batches of taps.
struct Batches {
  int64_t per_row, segments, per_batch;

  int64_t count() const { return ceil_div(segments, per_batch); }
  int64_t first_row(int64_t batch) const { return batch * per_batch / per_row; }
  int64_t last_row(int64_t batch) const {
    return (std::min((batch + 1) * per_batch, segments) - 1) / per_row;
  }
};

// The most rows of x from the first to the last that three stages of pixels read with a batch's taps.
int64_t rows_of_stages(const ConvShape& q, const WgradTile& tile, int64_t first, int64_t last) {
  const int64_t lines = 1 + ceil_div(kStages * tile.pixels - 1, q.Q());  // of dy
  int64_t rows =
      (std::min(lines, q.P()) - 1) * q.stride_h + (last - first) * q.dilation_h + 1;  // of one image
  // Or the end of an image, all of `more` others, and the beginning of one.
  const int64_t end = q.H - ((q.P() - 1) * q.stride_h + first * q.dilation_h - q.padding_h);
  const int64_t beginning = last * q.dilation_h - q.padding_h + 1;
  if (lines >= 2 && q.N > 1) {
    for (const int64_t more : {int64_t{0}, (lines - 2) / q.P()}) {
      rows = std::max(rows, std::max<int64_t>(end, 0) + more * q.H + std::max<int64_t>(beginning, 0) +
                                (lines - 2 - more * q.P()) * q.stride_h);
    }
  }
  return std::min(rows, q.N * q.H);
}

// The ring that fits into `room` bytes; else its bytes are 0.
Ring ring_of(const ConvShape& q, const WgradTile& tile, const Batches& batches, int64_t room) {
  const int64_t pitch = tile.pitch(), width = ceil_div(q.W, q.stride_w);  // of a phase
  const int64_t left = ceil_div(q.padding_w, q.stride_w);
  const int64_t last = floor_div((q.S - 1) * q.dilation_w - q.padding_w, q.stride_w);
  const int64_t lead = std::max({left, q.Q() + last - width, int64_t{0}}) * pitch;
  const int64_t phase = lead + width * pitch;
  int64_t row = phase * q.stride_w;
  // Pixels side by side on different rows take different banks, as do those of one row.
  for (int64_t more = 0; more < 128; more += 16) {
    if (((row + more) * q.stride_h - q.Q() * pitch) % 128 == 0) {
      row += more;
      break;
    }
  }
  int64_t rows = 1;
  for (int64_t b = 0; b < batches.count(); ++b) {
    rows = std::max(rows, rows_of_stages(q, tile, batches.first_row(b), batches.last_row(b)));
  }
  const int64_t zeros =
      round_up(128 + lead + (q.stride_w - 1) * phase + (std::max<int64_t>(last, 0) + 1) * pitch, 128);
  const auto bytes = [&] { return round_up(rows * row, 128) + zeros; };
  const int64_t least = rows,
                unit = 128 / std::gcd<int64_t>(row, 128);  // so that the ring's end changes no bank
  rows = round_up(rows, unit);
  if (bytes() > room) rows = least;
  if (bytes() > room) return {};
  return {make_divider(rows),
          static_cast<int32_t>(row),
          static_cast<int32_t>(phase),
          static_cast<int32_t>(lead),
          static_cast<int32_t>(bytes() - zeros),
          static_cast<int32_t>(bytes()),
          static_cast<uint32_t>(ceil_div(65536, q.stride_w)),
          static_cast<int32_t>(pitch - q.stride_w * phase),
          static_cast<int32_t>(wgrad_step(tile) / q.W % rows * row),
          static_cast<int32_t>(wgrad_step(tile) % q.W)};
}

struct Choice {
  const WgradTile* tile;  // null: none fits
  Batches batches;
  Ring ring;
};

// Of a multiprocessor's shared memory, for one of its `blocks`.
int64_t room_of(const WgradTile& tile, int arch, Extras dy, int blocks) {
  return shared_memory(arch) / blocks - 1024 - wgrad_stage_bytes(tile, dy);
}

// The first that fits, with all segments of a batch if possible, else with fewer rows of the kernel at a
// time.
Choice choose(const ConvShape& q, int arch, Extras dy, int wanted) {
  const int64_t per_row = ceil_div(q.S, kSegmentTaps), segments = q.R * per_row;
  for (int64_t per_batch = std::min<int64_t>(kSegments, segments); per_batch >= 1; --per_batch) {
    for (int i = 0; i < static_cast<int>(std::size(kWgradTiles)); ++i) {
      const WgradTile& tile = *kWgradTiles[i];
      const bool narrow = &tile == &kWgradNarrow, few = q.C <= kWgradNarrow.c;
      if (wanted ? wanted != i + 1 : few && !narrow) continue;
      const Batches batches{per_row, segments, per_batch};
      const Ring ring = ring_of(q, tile, batches, room_of(tile, arch, dy, 1));
      if (ring.bytes) return {&tile, batches, ring};
    }
  }
  return {};
}

// Blocks along the pixels. Counted in pixels of a block's time: a wave that does not fill all
// multiprocessors, of two common GPUs, costs what it leaves idle, and a split its partial sums: eight bytes
// for each product of a pixel, at about 45 products a byte.
int64_t splits_of(int64_t M, int64_t tiles) {
  constexpr int64_t kMultiprocessors[] = {108, 132}, kSplit = 8 * 45, kMost = 512, kShortest = 256;
  const int64_t most = std::clamp<int64_t>(std::min(kMost / tiles, M / kShortest), 1, kMost);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= most; ++splits) {
    int64_t cost = kSplit * splits;
    for (const int64_t n : kMultiprocessors) {
      cost += ceil_div(tiles * splits, n) * n * M / (tiles * splits) /
              static_cast<int64_t>(std::size(kMultiprocessors));
    }
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

struct Grid {
  int64_t tiles, tiles_c;  // blocks across; tiles of c for one of k
  int64_t splits, per_split;
};

template <class Dy, class X>
void add_taps(Plan& plan, const Conv2dWgradProblem& q, const std::string& name, const Choice& choice,
              const Grid& grid, Extras extras, const Dy& dy, const X& x) {
  const ConvShape& s = q.shape;
  const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
  const WgradParams<Dy, X> params{q.dy,
                                  q.x,
                                  q.workspace,
                                  narrow(s.N * s.P() * s.Q()),
                                  narrow(s.C),
                                  narrow(s.K),
                                  narrow(grid.per_split),
                                  narrow(s.H),
                                  narrow(s.W),
                                  narrow(s.R),
                                  narrow(s.S),
                                  narrow(s.stride_h),
                                  narrow(s.padding_h),
                                  narrow(s.padding_w),
                                  narrow(s.dilation_h),
                                  narrow(s.dilation_w),
                                  narrow(s.C / s.groups),
                                  narrow(grid.tiles_c),
                                  narrow(choice.batches.segments),
                                  narrow(choice.batches.count()),
                                  narrow(choice.batches.per_batch),
                                  make_divider(s.P()),
                                  make_divider(s.Q()),
                                  make_divider(s.W),
                                  make_divider(s.stride_w),
                                  make_divider(s.K / s.groups),
                                  choice.ring,
                                  dy,
                                  x};
  const WgradTile& tile = *choice.tile;
  char symbol[kMaxSymbol];
  std::snprintf(symbol, sizeof(symbol), "%s_%s_%dx%dx%d", name.c_str(),
                q.dtype == DType::kBFloat16 ? "bf16" : "f16", tile.c, tile.k, tile.pixels);
  Step& step = append(plan, kSource, symbol, grid.tiles, grid.splits, tile.threads() / 32);
  step.smem = std::max<int64_t>(wgrad_stage_bytes(tile, extras) + choice.ring.bytes,
                                tile.threads() / 32 * kWgradStagingBytes);
  set_params(step, params);
}

}  // namespace

Plan plan_conv2d_wgrad(const Conv2dWgradProblem& q, int arch) {
  Plan plan{};
  const ConvShape& s = q.shape;
  if (!check_shape(plan, "conv2d_wgrad", s)) return plan;
  if (s.C % 8 != 0) return plan_conv2d_wgrad_few(q, arch);
  if (s.stride_w > 16)
    return refuse(plan, "conv2d_wgrad: strides are 1 to 16 across"), plan;  // Ring::inverse
  const int64_t M = s.N * s.P() * s.Q(),
                padded = s.N * std::max(s.H + 2 * s.padding_h, s.W + 2 * s.padding_w);
  if (!check_gemm(plan, "conv2d_wgrad", q.dtype, arch, {M, s.N * s.H * s.W, padded},
                  {s.C, s.K, s.C / s.groups, s.K / s.groups}, {q.dy, q.backward.u, q.x, q.dw})) {
    return plan;
  }
  if (M == 0) return refuse(plan, "conv2d_wgrad: no pixels to sum over"), plan;
  if (q.tile < 0 || q.tile > static_cast<int>(std::size(kWgradTiles))) {
    return refuse(plan, "tile %d does not exist, there are %d", q.tile,
                  static_cast<int>(std::size(kWgradTiles))),
           plan;
  }
  const bool backward = q.backward.coef_dz;
  const Extras extras{backward, backward};
  const Choice choice = choose(s, arch, extras, q.tile);
  if (!choice.tile) {
    return refuse(plan,
                  "conv2d_wgrad: rows of %lld pixels do not fit into the shared memory of compute capability "
                  "%d.%d",
                  static_cast<long long>(s.W), arch / 10, arch % 10),
           plan;
  }
  const WgradTile& tile = *choice.tile;
  const int64_t group_c = s.C / s.groups, group_k = s.K / s.groups;
  int64_t tiles_c = 1;
  for (int64_t k = 0; k < s.K; k += tile.k) {
    const int64_t groups = (std::min(k + tile.k, s.K) - 1) / group_k - k / group_k + 1;
    tiles_c = std::max(tiles_c, ceil_div(groups * group_c, tile.c));
  }
  const int64_t tiles = ceil_div(s.K, tile.k) * tiles_c * choice.batches.count();
  const int64_t per_split = round_up(ceil_div(M, splits_of(M, tiles)), tile.pixels),
                splits = ceil_div(M, per_split);
  const int64_t n = s.K * s.R * s.S * group_c;
  plan.workspace = splits * n;
  const Grid grid{tiles, tiles_c, splits, per_split};
  const std::string name = backward ? "conv2d_wgrad_backward" : "conv2d_wgrad";
  const Affine affine{q.scale, q.shift};
  if (backward && q.scale) {
    add_taps(plan, q, name + "_affine", choice, grid, extras, q.backward, affine);
  } else if (backward) {
    add_taps(plan, q, name, choice, grid, extras, q.backward, Nothing{});
  } else if (q.scale) {
    add_taps(plan, q, name + "_affine", choice, grid, extras, Nothing{}, affine);
  } else {
    add_taps(plan, q, name, choice, grid, extras, Nothing{}, Nothing{});
  }
  add_sum_splits(plan, q.workspace, splits, n, q.dw, q.dtype, 0, nullptr);
  return plan;
}

}  // namespace resnet_fused

RESNET_FUSED_EXPORT_PLAN(conv2d_wgrad, Conv2dWgradProblem)
