// Bit panels [ceil(C/32), M]: bit c % 32 of word [c / 32][m] is relu' of channel c at pixel m.
#pragma once

#include "cpu.h"

namespace resnet_fused {

// relu' as PyTorch's threshold_backward has it: 0 where z <= 0, so a NaN passes its gradient on.
template <class Acc>
RF_INLINE uint32_t pack_word(const Acc* z) {
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= z[i] <= 0 ? 0u : 1u << i;
  return word;
}

RF_INLINE uint32_t low_bits(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

// The words of one tile (see Tiling::for_each_tile) from its pre-activations z[kTileBuffer].
template <class Acc>
RF_INLINE void pack_tile(const Acc* z, const Tiling& t, int64_t m, int64_t c0, int64_t n, uint32_t* mask) {
  t.for_each_pixel(m, n, [&](int64_t pixel, int64_t i, int64_t width) RF_LAMBDA {
    for (int64_t c = 0; c < width; c += 32) {
      mask[(c0 + c) / 32 * t.pixels + pixel] = pack_word(z + i + c) & low_bits(width - c);
    }
  });
}

// The inverse: gate[i] is all ones where the bit is set, else 0.
template <class Gate>
RF_INLINE void unpack_tile(const uint32_t* mask, const Tiling& t, int64_t m, int64_t c0, int64_t n,
                           Gate* gate) {
  t.for_each_pixel(m, n, [&](int64_t pixel, int64_t i, int64_t width) RF_LAMBDA {
    for (int64_t c = 0; c < width; c += 32) {
      const uint32_t word = mask[(c0 + c) / 32 * t.pixels + pixel];
      for (int b = 0; b < 32; ++b) gate[i + c + b] = (word & (1u << b)) != 0 ? ~Gate{0} : Gate{0};
    }
  });
}

}  // namespace resnet_fused
