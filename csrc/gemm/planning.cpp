#include "gemm/planning.h"

#include <cstdio>
#include <iterator>

#include "bn_stats/bn_stats.h"
#include "gemm/sum_splits.h"

namespace resnet_fused {

bool check_gemm(Plan& plan, const char* op, DType dtype, int arch, std::initializer_list<int64_t> pixels,
                std::initializer_list<int64_t> channels, std::initializer_list<const void*> aligned) {
  constexpr int64_t kMaxPixels = INT32_MAX - 256;  // of which a tile may end beyond
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return refuse(plan, "%s: the kernels take bfloat16 and float16", op), false;
  }
  for (const int64_t c : channels) {
    if (c % 8 != 0) {
      return refuse(plan, "%s: %lld channels are not a multiple of 8", op, static_cast<long long>(c)), false;
    }
    if (!check_common(plan, op, dtype, 0, c, arch)) return false;
  }
  for (const int64_t m : pixels) {
    if (m > kMaxPixels) return refuse(plan, "%s: 2^31 pixels or more", op), false;
  }
  for (const void* p : aligned) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
      return refuse(plan, "%s: a tensor does not start at a multiple of 16 bytes", op), false;
    }
  }
  return true;
}

Divider make_divider(int64_t divisor) {
  if (divisor <= 1) return {1, 0, 0};
  uint32_t bits = 0;
  while ((int64_t{1} << bits) < divisor) ++bits;
  const uint64_t multiplier = ((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), bits - 1};
}

PixelMap make_map(int64_t H, int64_t W, int64_t stride) {
  stride = std::min(stride, std::max({H, W, int64_t{1}}));  // a larger one reads the same pixels
  return {static_cast<int32_t>(stride),      static_cast<int32_t>(H),           static_cast<int32_t>(W),
          make_divider(ceil_div(H, stride)), make_divider(ceil_div(W, stride)), 0};
}

int64_t strided_pixels(int64_t N, int64_t H, int64_t W, int64_t stride) {
  return N * ceil_div(H, stride) * ceil_div(W, stride);
}

Addend make_addend(const PaddedAddend& padded, int64_t C, int64_t pixels) {
  if (padded.stride == 0) return {static_cast<int32_t>(C), static_cast<int32_t>(pixels)};
  const int64_t high = ceil_div(padded.H, padded.stride), wide = ceil_div(padded.W, padded.stride);
  return {padded.C,
          padded.pixels,
          padded.offset,
          make_divider(padded.stride),
          make_divider(padded.H),
          make_divider(padded.W),
          static_cast<int32_t>(high),
          static_cast<int32_t>(wide)};
}

bool has_large_shared(int arch) { return arch == 80 || arch == 87 || (arch >= 90 && arch < 120); }

int shared_memory(int arch) { return (has_large_shared(arch) ? 164 : 100) * 1024; }

namespace {

// Blocks of 128 threads want two on a multiprocessor, those of 256 one.
bool fits(const TileShape& tile, int arch, Extras left) {
  const int blocks = tile.threads() == 128 ? 2 : 1;
  return blocks * (shared_bytes(tile, left) + 1024) <= shared_memory(arch);
}

template <size_t kCount>
const TileShape* pick_tile(Plan& plan, int arch, Extras left, const TileShape* const (&tiles)[kCount],
                           int wanted, const TileShape* chosen) {
  if (wanted < 0 || wanted > static_cast<int>(kCount)) {
    return refuse(plan, "tile %d does not exist, there are %d", wanted, static_cast<int>(kCount)), nullptr;
  }
  const TileShape* tile = wanted ? tiles[wanted - 1] : chosen;
  if (tile == &kResident) return tile;
  if (!fits(*tile, arch, left)) {
    return refuse(plan, "a tile of %dx%dx%d does not fit into the shared memory of compute capability %d.%d",
                  tile->m, tile->n, tile->k, arch / 10, arch % 10),
           nullptr;
  }
  return tile;
}

}  // namespace

const TileShape* choose_rows_tile(Plan& plan, int arch, int64_t M, int64_t N, int64_t K, Extras extras,
                                  int wanted, bool resident) {
  const bool stays = resident && K <= kResidentK && N % kResident.n == 0 &&
                     resident_bytes(static_cast<int>(K)) + 1024 <= shared_memory(arch);
  const bool exists = wanted > 0 && wanted <= static_cast<int>(std::size(kRowsTiles));
  if (exists && kRowsTiles[wanted - 1] == &kResident) {
    if (!stays) refuse(plan, "no resident kernel takes this problem");
    return stays ? &kResident : nullptr;
  }
  constexpr int64_t kBlocksWanted = 128;  // about a block for each multiprocessor of a large GPU
  const bool few = ceil_div(M, kWide.m) * ceil_div(N, kWide.n) < kBlocksWanted;
  const bool short_k = K <= 2 * kLarge.k;  // the epilogue dominates: more and smaller blocks overlap it
  const TileShape* chosen = &kSquare;
  if (stays && !few && N >= 2 * kResident.n) {
    chosen = &kResident;
  } else if (fits(kNarrow, arch, extras) && (N <= kNarrow.n || few)) {
    chosen = &kNarrow;
  } else if (!short_k || extras.second) {
    chosen = extras.second ? (fits(kWide, arch, extras) ? &kWide : &kSquare)
                           : (fits(kLarge, arch, extras) ? &kLarge : &kWide);
  }
  return pick_tile(plan, arch, extras, kRowsTiles, wanted, chosen);
}

Step& append_gemm(Plan& plan, const char* source, const char* name, DType dtype, const TileShape& tile,
                  Extras left, int64_t grid_x, int64_t grid_y) {
  char symbol[kMaxSymbol];
  std::snprintf(symbol, sizeof(symbol), "%s_%s_%dx%dx%d", name, dtype == DType::kBFloat16 ? "bf16" : "f16",
                tile.m, tile.n, tile.k);
  Step& step = append(plan, source, symbol, grid_x, grid_y, tile.threads() / 32);
  step.smem = static_cast<uint32_t>(shared_bytes(tile, left));
  return step;
}

Step& append_resident(Plan& plan, const char* source, const char* name, DType dtype, int K, int64_t tiles_m,
                      int64_t tiles_n) {
  constexpr int64_t kBlocksWanted = 256;  // fewer blocks walk over fewer tiles of n each
  char symbol[kMaxSymbol];
  std::snprintf(symbol, sizeof(symbol), "%s_%s_resident", name, dtype == DType::kBFloat16 ? "bf16" : "f16");
  const int64_t parts = std::clamp<int64_t>(ceil_div(kBlocksWanted, tiles_m), 1, tiles_n);
  Step& step = append(plan, source, symbol, tiles_m, parts, kResident.threads() / 32);
  step.smem = static_cast<uint32_t>(resident_bytes(K));
  return step;
}

void add_merge_stats(Plan& plan, const float* partial, float* mean, float* var, int64_t M, int64_t N,
                     const TileShape& tile) {
  const BnStatsFinalizeParams params{
      partial, mean, var, ceil_div(M, tile.m), {M, tile.m, static_cast<int32_t>(N), 1}};
  add_step(plan, "bn_stats/bn_stats.cu", "bn_stats_finalize", ceil_div(N, kPanel), 1, kFinalizeWarps, params);
}

PixelsGrid pixels_grid(Plan& plan, int arch, int64_t M, int64_t I, int64_t J, Extras left, bool triangle,
                       int wanted) {
  // Partial sums are written and read once each: as many blocks as fill a GPU, but traffic that the operands
  // dwarf.
  constexpr int64_t kBlocksWanted = 512, kFewest = 128;
  constexpr int64_t kShortest = 256;  // pixels of a split
  constexpr int64_t kTraffic = 40;
  const bool wide = fits(kPixels128, arch, left) && std::min(I, J) > kPixels64.m;
  const TileShape* tile = pick_tile(plan, arch, left, kPixelsTiles, wanted, wide ? &kPixels128 : &kPixels64);
  if (!tile) return {};
  const int64_t down = ceil_div(I, tile->m), across = ceil_div(J, tile->n);
  const int64_t tiles = triangle ? down * (down + 1) / 2 : down * across;
  int64_t splits =
      std::min(kBlocksWanted / tiles, std::max(M * (I + J) / (kTraffic * I * J), kFewest / tiles));
  splits = std::clamp<int64_t>(splits, 1, std::max<int64_t>(M / kShortest, 1));
  const int64_t per_split = ceil_div(ceil_div(M, splits), tile->k) * tile->k;
  return {tile, tiles, ceil_div(M, per_split), per_split};
}

void add_sum_splits(Plan& plan, const float* partial, int64_t splits, int64_t n, void* out, DType dtype,
                    int64_t n2, float* out2) {
  const SumSplitsParams params{partial, out, out2, splits, n, n2};
  const char* symbol = dtype == DType::kFloat32    ? "sum_splits_f32"
                       : dtype == DType::kBFloat16 ? "sum_splits_bf16"
                                                   : "sum_splits_f16";
  add_step(plan, "gemm/sum_splits.cu", symbol, ceil_div(n, kSumSplitsBlock), out2 ? 2 : 1, kWarps, params);
}

}  // namespace resnet_fused
