// Prologues: what happens to an activation between global memory and the tensor cores.
//
// A prologue works in shared memory, on the 16-byte chunks (eight channels of a pixel) that the same thread
// has copied there: its own wait for the copies suffices, each element is transformed once however many warps
// multiply it, and a prologue need not know how fragments lie in registers. Chunks outside of the matrix stay
// zero: relu(shift) is not 0. Scale and shift are fp32; the result is rounded once.
#pragma once

#include "gemm/tile.cuh"

namespace resnet_fused {

// x as it is.
template <typename T>
struct Plain {
  using Params = Nothing;
  static constexpr bool kTransforms = false, kSecond = false, kMask = false;
};

// relu(scale*x + shift)
template <typename T>
struct AffineRelu : Plain<T> {
  using Params = Affine;
  static constexpr bool kTransforms = true;

  float scale[8], shift[8];
  __device__ AffineRelu(const Params& p, int channel) {
    load_vector(p.scale, channel, scale);
    load_vector(p.shift, channel, shift);
  }
  __device__ uint4 operator()(uint4 x, uint4, uint32_t) const {
    float v[8];
    unpack<T>(x, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf(scale[i], v[i], shift[i]);
    return pack_relu<T>(v);
  }
};

// dy * mask, or dy where there is no mask
template <typename T>
struct Masked : Plain<T> {
  using Params = Mask;
  static constexpr bool kTransforms = true, kMask = true;
  static __device__ const uint32_t* mask(const Params& p) { return p.mask; }

  bool masked;
  __device__ Masked(const Params& p, int) : masked(p.mask) {}
  __device__ uint4 operator()(uint4 dy, uint4, uint32_t bits) const {
    return masked ? keep_where(dy, bits) : dy;
  }
};

// The batch norm's backward, see BnBackward.
template <typename T>
struct Backward : Plain<T> {
  using Params = BnBackward;
  static constexpr bool kTransforms = true, kSecond = true, kMask = true;
  static __device__ const void* second(const Params& p) { return p.u; }
  static __device__ const uint32_t* mask(const Params& p) { return p.gate.mask; }

  const ReluGate& gate;
  bool masked;
  float coef_dz[8], coef_x[8], coef_1[8], scale[8], shift[8];
  __device__ Backward(const Params& p, int channel) : gate(p.gate), masked(p.gate.mask) {
    float mean[8];
    load_vector(p.coef_dz, channel, coef_dz);
    load_vector(p.coef_x, channel, coef_x);
    load_vector(p.coef_1, channel, coef_1);
    load_vector(p.mean, channel, mean);
#pragma unroll
    for (int i = 0; i < 8; ++i) coef_1[i] = fmaf(-coef_x[i], mean[i], coef_1[i]);
    if (!gate.scale) return;
    load_vector(gate.scale, channel, scale);
    load_vector(gate.shift, channel, shift);
  }
  __device__ uint4 operator()(uint4 dy, uint4 raw, uint32_t bits) const {
    if (masked) dy = keep_where(dy, bits);
    float d[8], u[8];
    unpack<T>(dy, d);
    unpack<T>(raw, u);
    if (gate.scale) {
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] = relu_gate(fmaf(scale[i], u[i], shift[i])) ? d[i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = fmaf(coef_dz[i], d[i], fmaf(coef_x[i], u[i], coef_1[i]));
    return pack<T>(u);
  }
};

// The operand of a Gram matrix: act(scale*x + shift), rounded as `expand` rounds what it multiplies, then
// minus a constant near its mean, rounded again: however large mean/std is, the products cancel nothing.
template <typename T>
struct Centered : Plain<T> {
  using Params = Center;
  static constexpr bool kTransforms = true;

  bool activates;
  float scale[8], shift[8];
  uint4 minus_center;
  __device__ Centered(const Params& p, int channel) : activates(p.affine.scale) {
    float center[8];
    load_vector(p.center, channel, center);
#pragma unroll
    for (int i = 0; i < 8; ++i) center[i] = -center[i];
    minus_center = pack<T>(center);
    if (!activates) return;
    load_vector(p.affine.scale, channel, scale);
    load_vector(p.affine.shift, channel, shift);
  }
  __device__ uint4 operator()(uint4 x, uint4, uint32_t) const {
    if (activates) {
      float v[8];
      unpack<T>(x, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = fmaf(scale[i], v[i], shift[i]);
      x = pack_relu<T>(v);
    }
    return make_uint4(Half<T>::add(x.x, minus_center.x), Half<T>::add(x.y, minus_center.y),
                      Half<T>::add(x.z, minus_center.z), Half<T>::add(x.w, minus_center.w));
  }
};

// A stage's share of an operand with one prologue or either of two: the tile, then the second tensor's, then
// the mask's words.
template <class Tile, class... Prologues>
struct OperandBytes {
  static constexpr bool kHasSecond = (Prologues::kSecond || ...), kHasMask = (Prologues::kMask || ...);
  static constexpr int kSecond = Tile::kBytes;
  static constexpr int kMask = kSecond + (kHasSecond ? Tile::kBytes : 0);
  static constexpr int kBytes = kMask + (kHasMask ? mask_bytes(Tile::kRows, Tile::kCols) : 0);
  // Words from a panel to the next: as many apart as a warp reads rows at once, so that its panels take
  // different banks.
  static constexpr int kPanelWords = Tile::kRows + 32 / Tile::kAcross;
  static_assert(!kHasMask || kPanelWords * 4 * (Tile::kCols / kPanel) <= mask_bytes(Tile::kRows, Tile::kCols),
                "room");
};

}  // namespace resnet_fused
