#include "gemm/taps_planning.h"

#include <cstdlib>
#include <iterator>
#include <numeric>

namespace resnet_fused {
namespace {

bool refused(Plan& plan, const char* op, const char* why) { return refuse(plan, "%s: %s", op, why), false; }

bool check_taps(Plan& plan, const char* op, const ConvShape& q) {
  if (q.stride_h != q.stride_w || q.stride_h > 2)
    return refused(plan, op, "strides are not 1 or 2 both ways");
  if (q.R > kMaxTapRows || q.S > kMaxTapRows) return refused(plan, op, "more than 16 kernel rows or columns");
  if (q.C / q.groups % 8 || q.K / q.groups % 8) {
    return refused(plan, op, "a group's channels are not a multiple of 8");
  }
  // What an offset within the image and its padding may be.
  const int64_t reach = (q.H + 2 * q.padding_h) * (q.W + 2 * q.padding_w);
  if (reach > INT32_MAX / kPixelBytes) return refused(plan, op, "an image of too many pixels");
  // Pixels are 31-bit numbers, those before the first image and behind the last one too.
  if (std::max(q.N * q.H * q.W, q.N * q.P() * q.Q()) > INT32_MAX - 2 * reach) {
    return refused(plan, op, "2^31 pixels or more");
  }
  if (q.R * q.S * std::max(q.C, q.K) > INT32_MAX / 128) return refused(plan, op, "too many weights");
  return true;
}

// How far the source's pixel moves from a row's last output to the next row's first, and from an image's to
// the next one's: beyond the stride, or back.
struct Jumps {
  int64_t row, image;
  Jumps(const TapsSource& s, const TapsPhase& p) {
    row = s.stride * (s.W - static_cast<int64_t>(p.Q.divisor));
    image = row + s.W * (s.H - static_cast<int64_t>(p.P.divisor) * s.stride);
  }
};

// A bound of the halo of `rows` outputs, in pixels.
int64_t halo_pixels(const Taps& t, const TapsPhase& p, int rows) {
  const TapsSource& s = t.source;
  const int64_t steps = std::min<int64_t>(rows, p.M) - 1;
  const int64_t Q = p.Q.divisor, PQ = Q * p.P.divisor;
  const int64_t ends = std::min(ceil_div(steps, Q), p.M / Q),
                images = std::min(ceil_div(steps, PQ), p.M / PQ);
  const Jumps jump(s, p);
  const auto sum = [&](int64_t row, int64_t image) {  // of jumps one way
    return ends * std::max<int64_t>(row, 0) + images * std::max<int64_t>(image, 0);
  };
  const int64_t run = std::max(steps * s.stride + sum(jump.row, jump.image), sum(-jump.row, -jump.image));
  return run + std::abs((p.rows - 1) * s.step_row) * static_cast<int64_t>(s.W) +
         std::abs((p.cols - 1) * s.step_col) + 1;
}

// Shared memory for a tile; false if it is more than a block may have.
bool place_halo(Taps& t, const TileShape& tile, bool two, int arch) {
  const int64_t channels = ceil_div(tile.n + t.weight.group_n - 1, t.weight.group_n) * t.weight.group_c;
  const int64_t slices = ceil_div(std::min<int64_t>(channels, t.source.C), kSliceChannels);
  int64_t halo = 0;
  bool one_tap = false;  // whole halos then come two slices ahead
  for (int i = 0; i < t.phases; ++i) {
    halo = std::max(halo, halo_pixels(t, t.phase[i], tile.m));
    one_tap |= t.phase[i].rows * t.phase[i].cols == 1;
  }
  halo = ceil_div(halo, 8) * 8;
  if (halo > shared_memory(arch) / kPixelBytes) return false;
  const int64_t buffers = std::min<int64_t>(slices, one_tap ? 3 : 2);
  t.shared = {static_cast<int32_t>(halo), static_cast<int32_t>(buffers),
              two ? static_cast<int32_t>(std::min<int64_t>(slices, one_tap ? 2 : 1)) : 0};
  return std::max(taps_bytes(tile, t.shared), taps_epilogue_bytes(tile)) + 1024 <= shared_memory(arch);
}

// Fills in what follows from the rest of a problem, and chooses its tile.
void choose_tile(Plan& plan, const char* op, Taps& t, bool two, int arch, int wanted) {
  constexpr int kCount = static_cast<int>(std::size(kTapsTiles));
  if (wanted < 0 || wanted > kCount) {
    refuse(plan, "%s: tile %d does not exist, there are %d", op, wanted, kCount);
    return;
  }
  for (int i = 0; i < t.phases; ++i) {
    const Jumps jump(t.source, t.phase[i]);
    t.phase[i].folds = std::min(jump.row, jump.image) < -t.source.stride;
  }
  constexpr int64_t kBlocksWanted = 128;  // about a block for each multiprocessor of a large GPU
  int64_t rows = 0;
  for (int i = 0; i < t.phases; ++i) rows += ceil_div(t.phase[i].M, kTapsWide.m);
  // Groups smaller than a tile's columns are multiplied by zeros: the narrower, the fewer.
  const bool thin = t.N <= kTapsTall.n || t.weight.group_n < kTapsWide.n;
  const bool few = rows * ceil_div(t.N, thin ? kTapsTall.n : kTapsWide.n) < kBlocksWanted;
  const TileShape* first = few ? &kTapsNarrow : thin ? &kTapsTall : &kTapsWide;
  for (const TileShape* tile : {wanted ? kTapsTiles[wanted - 1] : first, wanted ? nullptr : &kTapsTall,
                                wanted ? nullptr : &kTapsNarrow}) {
    if (!tile || !place_halo(t, *tile, two, arch)) continue;
    t.tile = tile;
    t.row_tiles = 0;
    for (int i = 0; i < t.phases; ++i) {
      t.phase[i].tile = static_cast<int32_t>(t.row_tiles);
      t.row_tiles += ceil_div(t.phase[i].M, tile->m);
    }
    return;
  }
  refuse(plan, "%s: rows of %d pixels are too long for the shared memory of compute capability %d.%d", op,
         t.source.W, arch / 10, arch % 10);
}

// A dgrad's taps along one dimension, for outputs of one residue modulo the stride.
struct Lattice {
  int64_t first, step, count;  // of the kernel's taps
  int64_t source, shift;       // the source of output 0's first tap, and from one tap to the next
};
Lattice lattice(int64_t residue, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  // out*stride + residue + padding - tap*dilation is a multiple of the stride for every step-th tap, or none.
  const int64_t step = stride / std::gcd(stride, dilation);
  for (int64_t tap = 0; tap < std::min(step, taps); ++tap) {
    const int64_t at = residue + padding - tap * dilation;
    if (at % stride == 0)
      return {tap, step, ceil_div(taps - tap, step), at / stride, -step * dilation / stride};
  }
  return {0, step, 0, 0, 0};
}

}  // namespace

Taps fprop_taps(Plan& plan, const char* op, const ConvShape& q, int arch, const void* x, const void* weight,
                bool transforms, int wanted) {
  Taps t{};
  if (!check_taps(plan, op, q)) return t;
  const auto i32 = [](int64_t v) { return static_cast<int32_t>(v); };
  const int64_t c = q.C / q.groups;
  t.source = {x,         i32(q.N * q.H * q.W), i32(q.H),          i32(q.W),
              i32(q.C),  i32(q.stride_h),      i32(q.dilation_h), i32(q.dilation_w),
              transforms};
  t.weight = {weight, i32(q.R * q.S * c), i32(q.S * c), i32(c), i32(c), i32(q.K / q.groups)};
  t.N = i32(q.K);
  t.out_stride = 1;
  t.phases = 1;
  t.phase[0] = {make_divider(q.P()),
                make_divider(q.Q()),
                i32(q.N * q.P() * q.Q()),
                0,
                i32(-q.padding_h),
                i32(-q.padding_w),
                i32(q.R),
                i32(q.S),
                0,
                0,
                0};
  choose_tile(plan, op, t, false, arch, wanted);
  return t;
}

Taps dgrad_taps(Plan& plan, const char* op, const ConvShape& q, int arch, const void* dy, const void* weight,
                bool transforms, int wanted) {
  Taps t{};
  if (!check_taps(plan, op, q)) return t;
  const auto i32 = [](int64_t v) { return static_cast<int32_t>(v); };
  const int64_t c = q.C / q.groups, stride = q.stride_h;
  t.weight = {weight, i32(q.R * q.S * c), 0, 0, i32(q.K / q.groups), i32(c)};
  t.N = i32(q.C);
  t.out_stride = i32(stride), t.out_H = i32(q.H), t.out_W = i32(q.W);
  Lattice down{}, across{};
  for (int64_t phase = stride * stride - 1; phase >= 0; --phase) {
    const int64_t i = phase / stride, j = phase % stride;
    const int64_t P = ceil_div(q.H - i, stride), Q = ceil_div(q.W - j, stride);
    if (P <= 0 || Q <= 0) continue;
    down = lattice(i, q.R, stride, q.padding_h, q.dilation_h);
    across = lattice(j, q.S, stride, q.padding_w, q.dilation_w);
    const bool any = down.count && across.count;
    t.phase[t.phases++] = {make_divider(P),
                           make_divider(Q),
                           i32(q.N * P * Q),
                           0,
                           i32(down.source),
                           i32(across.source),
                           any ? i32(down.count) : 0,
                           any ? i32(across.count) : 0,
                           i32((down.first * q.S + across.first) * c),
                           i32(i * q.W + j),
                           0};
  }
  // The same for every phase that has taps.
  const int64_t row_step = stride / std::gcd(stride, q.dilation_h),
                col_step = stride / std::gcd(stride, q.dilation_w);
  t.weight.row = i32(row_step * q.S * c), t.weight.col = i32(col_step * c);
  t.source = {dy,
              i32(q.N * q.P() * q.Q()),
              i32(q.P()),
              i32(q.Q()),
              i32(q.K),
              1,
              i32(-row_step * q.dilation_h / stride),
              i32(-col_step * q.dilation_w / stride),
              transforms};
  choose_tile(plan, op, t, transforms, arch, wanted);
  return t;
}

}  // namespace resnet_fused
