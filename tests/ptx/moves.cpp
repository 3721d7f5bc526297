// Moves, packing, and conversions between all types.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

template <class T>
void move(Warp& w, const Instr& i, Mask m) {
  T* d = w.at<T>(i.d);
  const T* a = w.at<T>(i.a);
  each(m, [&](int l) { d[l] = a[l]; });
}

void move_predicate(Warp& w, const Instr& i, Mask m) { w.set_predicate(i.d, m, w.predicate(i.a)); }

// mov.b32 %r, {%lo, %hi} and its inverse; Instr::list has the parts.
void pack(Warp& w, const Instr& i, Mask m) {
  each(m, [&](int l) {
    uint64_t v = 0;
    for (size_t k = i.list.size(); k-- > 0;) v = v << (8 * i.width) | w.get(i.list[k], i.width, l);
    w.set(i.d, i.bytes, l, v);
  });
}
void unpack(Warp& w, const Instr& i, Mask m) {
  each(m, [&](int l) {
    uint64_t v = w.get(i.a, i.bytes, l);
    for (size_t k = 0; k < i.list.size(); ++k, v >>= 8 * i.width) w.set(i.list[k], i.width, l, v);
  });
}

void clock_value(Warp& w, const Instr& i, Mask m) {
  uint64_t now = 0;
  for (uint64_t n : w.cta->counters.executed) now += n;
  each(m, [&](int l) { w.set(i.d, i.bytes, l, now); });
}

void decode_move(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::move;
  if (d.take("pred")) {
    i.category = Category::predicate;
    i.run = move_predicate;
    i.d = d.predicate(d.operand(0));
    i.a = d.predicate(d.operand(1));
    return;
  }
  const Type t = d.type();
  const Operand &to = d.operand(0), &from = d.operand(1);
  i.bytes = static_cast<uint8_t>(bytes_of(t));
  if (to.kind == Operand::vector || from.kind == Operand::vector) {
    const bool packs = from.kind == Operand::vector;
    const auto& parts = packs ? from.parts : to.parts;
    i.width = static_cast<uint8_t>(i.bytes / parts.size());
    if (i.bytes > 8) d.fail("only up to 64 bits can be packed");
    for (const Operand& p : parts) i.list.push_back(packs ? d.source(p, i.width) : d.destination(p, i.width));
    if (packs)
      i.d = d.destination(to, i.bytes);
    else
      i.a = d.source(from, t);
    i.run = packs ? pack : unpack;
    return;
  }
  i.d = d.destination(to, i.bytes);
  if (from.kind == Operand::special &&
      (from.name.compare(0, 6, "%clock") == 0 || from.name == "%globaltimer")) {
    i.run = clock_value;
    return;
  }
  i.a = d.source(from, t);
  i.run = i.bytes == 2   ? move<uint16_t>
          : i.bytes == 4 ? move<uint32_t>
          : i.bytes == 8 ? move<uint64_t>
                         : nullptr;
  if (!i.run) d.fail("cannot move this type");
}

// ---- conversions: one lane at a time, from bits to bits ----

enum ConvertFlags : uint8_t { kSat = 1, kRelu = 2, kFtz = 4, kToInteger = 8 };

template <class T>
double whole(T x, Round r) {
  switch (r) {
    case Round::zero:
      return std::trunc(x);
    case Round::down:
      return std::floor(x);
    case Round::up:
      return std::ceil(x);
    case Round::nearest_away:
      return std::round(x);
    case Round::nearest_even:
      break;
  }
  return std::nearbyint(x);
}

double decode_float(Type t, uint64_t bits) {
  switch (t) {
    case Type::f16:
      return half_to_float(static_cast<uint16_t>(bits));
    case Type::bf16:
      return bfloat_to_float(static_cast<uint16_t>(bits));
    case Type::f64:
      return bits_as<double>(bits);
    default:
      return bits_as<float>(static_cast<uint32_t>(bits));
  }
}

uint64_t encode_float(Type t, double x, Round r) {
  switch (t) {
    case Type::f16:
      return HalfFormat::encode(x, r);
    case Type::bf16:
      return BFloatFormat::encode(x, r);
    case Type::tf32:
      return std::isnan(x) ? 0x7fffffff : static_cast<uint64_t>(Format<8, 10>::encode(x, r)) << 13;
    case Type::f64:
      return bits_as<uint64_t>(x);
    default: {
      if (std::isnan(x)) return 0x7fffffff;
      RoundingMode mode(r);
      volatile double in = x;
      return bits_as<uint32_t>(static_cast<float>(in));
    }
  }
}

uint64_t mask_of(int bytes) { return bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bytes)) - 1; }

int64_t sign_extend(uint64_t v, int bytes) {
  const int shift = 64 - 8 * bytes;
  return static_cast<int64_t>(v << shift) >> shift;
}

// Float to integer saturates, and a NaN becomes 0 (the largest value of a 64-bit integer excepted: that is
// not asked for).
uint64_t to_integer(double x, Type to, Round r) {
  if (std::isnan(x)) return 0;
  x = whole(x, r);
  const int bits = 8 * bytes_of(to);
  if (is_signed(to)) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (x >= limit) return (uint64_t{1} << (bits - 1)) - 1;
    if (x < -limit) return uint64_t{1} << (bits - 1);
    return static_cast<uint64_t>(static_cast<int64_t>(x));
  }
  if (x <= 0) return 0;
  return x >= std::ldexp(1.0, bits) ? mask_of(bytes_of(to)) : static_cast<uint64_t>(x);
}

uint64_t from_integer(uint64_t v, bool negative_possible, Type to, Round r) {
  RoundingMode mode(r);
  volatile int64_t s = static_cast<int64_t>(v);
  volatile uint64_t u = v;
  if (to == Type::f32)
    return bits_as<uint32_t>(negative_possible ? static_cast<float>(s) : static_cast<float>(u));
  const double x = negative_possible ? static_cast<double>(s) : static_cast<double>(u);
  return to == Type::f64 ? bits_as<uint64_t>(x) : encode_float(to, x, r);
}

uint64_t narrow_integer(uint64_t v, Type from, Type to, bool saturate) {
  if (!saturate) return v;
  const int bits = 8 * bytes_of(to);
  const bool negative = is_signed(from) && static_cast<int64_t>(v) < 0;
  if (is_signed(to)) {
    const int64_t high = static_cast<int64_t>((uint64_t{1} << (bits - 1)) - 1), low = -high - 1;
    if (!is_signed(from)) return std::min<uint64_t>(v, high);
    return static_cast<uint64_t>(std::clamp(static_cast<int64_t>(v), low, high));
  }
  return negative ? 0 : std::min<uint64_t>(v, mask_of(bytes_of(to)));
}

uint64_t convert(const Instr& i, Type from, uint64_t bits) {
  const Type to = i.type;
  if (!is_float(from)) {
    if (is_signed(from)) bits = static_cast<uint64_t>(sign_extend(bits, bytes_of(from)));
    return is_float(to) ? from_integer(bits, is_signed(from), to, i.round)
                        : narrow_integer(bits, from, to, i.flags & kSat);
  }
  double x = decode_float(from, bits);
  if ((i.flags & kFtz) && from == Type::f32) x = flush(static_cast<float>(x));
  if (!is_float(to)) return to_integer(x, to, i.round);
  if (i.flags & kToInteger) x = whole(x, i.round);
  if (i.flags & kRelu) x = x < 0 ? 0 : x;
  if (i.flags & kSat) x = x > 0 ? std::min(x, 1.0) : 0;
  uint64_t r = encode_float(to, x, i.round);
  if ((i.flags & kFtz) && to == Type::f32)
    r = bits_as<uint32_t>(flush(bits_as<float>(static_cast<uint32_t>(r))));
  return r;
}

void cvt(Warp& w, const Instr& i, Mask m) {
  const Type from = static_cast<Type>(i.imm);
  const int bytes = bytes_of(from);
  each(m, [&](int l) {
    uint64_t r = convert(i, from, w.get(i.a, i.width, l) & mask_of(bytes));
    if (is_signed(i.type))
      r = static_cast<uint64_t>(sign_extend(r, bytes_of(i.type)));  // fills a wider register
    else
      r &= mask_of(bytes_of(i.type));
    w.set(i.d, i.bytes, l, r);
  });
}

template <bool kRectify>
void to_bfloats(Warp& w, const Instr& i, Mask m) {  // the prologues' cvt.rn(.relu).bf16x2.f32
  const float *high = w.at<float>(i.a), *low = w.at<float>(i.b);
  each(m, [&](int l) {
    float h = high[l], o = low[l];
    if (kRectify) h = h < 0 ? 0 : h, o = o < 0 ? 0 : o;
    w.at<uint32_t>(i.d)[l] = static_cast<uint32_t>(float_to_bfloat(h)) << 16 | float_to_bfloat(o);
  });
}

void cvt_pair(Warp& w, const Instr& i, Mask m) {
  Instr one = i;
  one.type = i.type == Type::f16x2 ? Type::f16 : Type::bf16;
  each(m, [&](int l) {
    const uint64_t high = convert(one, Type::f32, w.at<uint32_t>(i.a)[l]),
                   low = convert(one, Type::f32, w.at<uint32_t>(i.b)[l]);
    w.at<uint32_t>(i.d)[l] = static_cast<uint32_t>(high << 16 | low);
  });
}

void decode_convert(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::convert;
  i.flags = (d.take("sat") ? kSat : 0) | (d.take("relu") ? kRelu : 0) | (d.take("ftz") ? kFtz : 0);
  const std::string integral = d.take_any({"rni", "rzi", "rmi", "rpi"});
  i.round = d.rounding();
  if (!integral.empty()) {
    i.flags |= kToInteger;
    i.round = integral == "rzi"   ? Round::zero
              : integral == "rmi" ? Round::down
              : integral == "rpi" ? Round::up
                                  : i.round;
  }
  i.type = d.type();
  const Type from = d.type();
  if (i.type == Type::f16x2 || i.type == Type::bf16x2) {
    if (from != Type::f32 || (i.flags & (kSat | kFtz))) d.fail("this packed conversion is not supported");
    i.d = d.destination(d.operand(0), 4);
    i.a = d.source(d.operand(1), from);
    i.b = d.source(d.operand(2), from);
    const bool fast = i.type == Type::bf16x2 && i.round == Round::nearest_even;
    i.run = !fast ? cvt_pair : i.flags & kRelu ? to_bfloats<true> : to_bfloats<false>;
    return;
  }
  if (from == Type::f16x2 || from == Type::bf16x2 || i.type == Type::pred || from == Type::pred)
    d.fail("this conversion is not supported");
  const int to_width = d.width_of(d.operand(0)), from_width = d.width_of(d.operand(1));
  if (to_width < bytes_of(i.type)) d.fail("the destination is too narrow");
  i.bytes = static_cast<uint8_t>(to_width);
  i.width = static_cast<uint8_t>(std::max(from_width, bytes_of(from)));
  if (d.operand(1).kind == Operand::special) i.width = 4;
  i.d = d.destination(d.operand(0), to_width);
  i.a = d.source(d.operand(1), i.width, from);
  i.imm = static_cast<int64_t>(from);
  i.run = cvt;
}

void decode_cvt(Decoder& d) {
  if (d.take("pack")) d.fail("cvt.pack is not supported");
  decode_convert(d);
}

}  // namespace

void add_moves(Table& t) { t["mov"] = decode_move; }
void add_conversions(Table& t) { t["cvt"] = decode_cvt; }

}  // namespace ptx
