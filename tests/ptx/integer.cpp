// Integer arithmetic and logic.
#include <algorithm>
#include <type_traits>

#include "decode.h"

namespace ptx {
namespace {

template <class T>
struct WiderOf;
template <>
struct WiderOf<uint8_t> {
  using type = uint16_t;
};
template <>
struct WiderOf<int8_t> {
  using type = int16_t;
};
template <>
struct WiderOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct WiderOf<int16_t> {
  using type = int32_t;
};
template <>
struct WiderOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct WiderOf<int32_t> {
  using type = int64_t;
};
template <>
struct WiderOf<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct WiderOf<int64_t> {
  using type = __int128;
};
template <class T>
using Wider = typename WiderOf<T>::type;
template <class T>
constexpr int kBits = sizeof(T) * 8;

template <class T>
T high(T a, T b) {
  return static_cast<T>((static_cast<Wider<T>>(a) * b) >> kBits<T>);
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(uint64_t(a) * uint64_t(b));
  }
};
struct MulHi {
  template <class T>
  T operator()(T a, T b) const {
    return high(a, b);
  }
};
struct MulWide {
  template <class T>
  Wider<T> operator()(T a, T b) const {
    return static_cast<Wider<T>>(a) * b;
  }
};
struct Mad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Mul()(a, b) + c;
  }
};
struct MadHi {
  template <class T>
  T operator()(T a, T b, T c) const {
    return high(a, b) + c;
  }
};
struct MadWide {
  template <class T>
  Wider<T> operator()(T a, T b, Wider<T> c) const {
    return static_cast<Wider<T>>(a) * b + c;
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return c + (a < b ? b - a : a - b);
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {  // a GPU does not trap
    return !b                                       ? static_cast<T>(-1)
           : std::is_signed<T>::value && b == T(-1) ? static_cast<T>(-a)
                                                    : static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    return !b ? a : std::is_signed<T>::value && b == T(-1) ? T(0) : static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Shl {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return n < kBits<T> ? static_cast<T>(a << n) : T(0);
  }
};
struct Shr {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return n < kBits<T> ? static_cast<T>(a >> n) : std::is_signed<T>::value && a < 0 ? T(-1) : T(0);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(-a);
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? static_cast<T>(-a) : a;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};
struct Popc {
  template <class T>
  uint32_t operator()(T a) const {
    return __builtin_popcountll(a);
  }
};
struct Clz {
  template <class T>
  uint32_t operator()(T a) const {
    return a ? __builtin_clzll(a) - (64 - kBits<T>) : kBits<T>;
  }
};
struct Brev {
  template <class T>
  T operator()(T a) const {
    T r = 0;
    for (int i = 0; i < kBits<T>; ++i) r = static_cast<T>(r << 1) | ((a >> i) & 1);
    return r;
  }
};
template <bool kShiftAmount>
struct Bfind {
  template <class T>
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    U u = std::is_signed<T>::value && a < 0 ? static_cast<U>(~a) : static_cast<U>(a);
    if (!u) return ~0u;
    uint32_t position = 63 - __builtin_clzll(u);
    return kShiftAmount ? kBits<T> - 1 - position : position;
  }
};
struct Bfe {
  template <class T>
  T operator()(T a, uint32_t position, uint32_t length) const {
    position &= 255, length &= 255;
    using U = std::make_unsigned_t<T>;
    const uint32_t top = std::min<uint32_t>(position + length - 1, kBits<T> - 1);
    const bool sign = std::is_signed<T>::value && length && (static_cast<U>(a) >> top & 1);
    U field = position < kBits<T> ? static_cast<U>(a) >> position : 0;
    const uint32_t valid = position < kBits<T> ? std::min<uint32_t>(length, kBits<T> - position) : 0;
    const U mask = valid >= kBits<T> ? ~U(0) : (U(1) << valid) - 1;
    return static_cast<T>(sign ? (field & mask) | ~mask : field & mask);
  }
};
struct Prmt {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint64_t bytes = (uint64_t(b) << 32) | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t select = c >> (4 * i) & 15;
      uint32_t byte = bytes >> (8 * (select & 7)) & 255;
      if (select & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * i);
    }
    return r;
  }
};
template <bool kLeft, bool kWrap>
struct Funnel {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint32_t n = kWrap ? c & 31 : std::min(c, 32u);
    const uint64_t both = (uint64_t(b) << 32) | a;
    return static_cast<uint32_t>(kLeft ? both << n >> 32 : both >> n);
  }
};
struct Bmsk {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    return a > 31 || !b ? 0 : (b > 31 ? ~0u : (1u << b) - 1) << a;
  }
};
struct Dp4a {
  template <class A, class B, class C>
  static C dot(A a, B b, C c) {
    for (int i = 0; i < 4; ++i) {
      int32_t x = std::is_signed<A>::value ? int8_t(a >> (8 * i)) : uint8_t(a >> (8 * i));
      int32_t y = std::is_signed<B>::value ? int8_t(b >> (8 * i)) : uint8_t(b >> (8 * i));
      c += x * y;
    }
    return c;
  }
  template <class A, class B, class C>
  C operator()(A a, B b, C c) const {
    return dot(a, b, c);
  }
};

// What two predicates or 16 to 64 bits have in common: and, or, xor, not.
template <class F>
void predicate_op(Warp& w, const Instr& i, Mask m) {
  w.set_predicate(
      i.d, m, F()(w.predicate(i.a) ^ (i.flags & 1 ? kAll : 0), w.predicate(i.b) ^ (i.flags & 2 ? kAll : 0)));
}
void predicate_not(Warp& w, const Instr& i, Mask m) { w.set_predicate(i.d, m, ~w.predicate(i.a)); }

void lop3(Warp& w, const Instr& i, Mask m) {
  uint32_t *d = w.at<uint32_t>(i.d), *a = w.at<uint32_t>(i.a), *b = w.at<uint32_t>(i.b),
           *c = w.at<uint32_t>(i.c);
  each(m, [&](int l) {
    uint32_t r = 0;
    for (int k = 0; k < 8; ++k)
      if (i.imm >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    d[l] = r;
  });
}

template <class T>
void bfi(Warp& w, const Instr& i, Mask m) {  // d = b with `length` bits at `position` taken from a
  T *d = w.at<T>(i.d), *a = w.at<T>(i.a), *b = w.at<T>(i.b);
  const uint32_t *position = w.at<uint32_t>(i.c), *length = w.at<uint32_t>(i.list[0]);
  each(m, [&](int l) {
    const uint32_t at = position[l] & 255, n = length[l] & 255;
    const T field = n >= kBits<T> ? ~T(0) : (T(1) << n) - 1;
    const T mask = at < kBits<T> ? field << at : 0;
    d[l] = (b[l] & ~mask) | ((at < kBits<T> ? a[l] << at : 0) & mask);
  });
}

// add.cc and its kin: flags 1 reads the carry, 2 writes it; a borrow is a carry too.
enum CarryFlags : uint8_t { kReadsCarry = 1, kWritesCarry = 2, kSubtracts = 4, kHigh = 8 };
template <class T>
void with_carry(Warp& w, const Instr& i, Mask m) {
  T *d = w.at<T>(i.d), *a = w.at<T>(i.a), *b = w.at<T>(i.b);
  each(m, [&](int l) {
    using W = Wider<T>;
    const W in = i.flags & kReadsCarry ? w.carry >> l & 1 : 0;
    W x = a[l], y = b[l];
    if (i.c != kNone) x = i.flags & kHigh ? T(x * y >> kBits<T>) : T(x * y), y = w.at<T>(i.c)[l];
    const W r = i.flags & kSubtracts ? x - y - in : x + y + in;
    if (i.flags & kWritesCarry)
      w.carry = (w.carry & ~(1u << l)) | (static_cast<Mask>(r >> kBits<T> & 1) << l);
    d[l] = static_cast<T>(r);
  });
}

// ---- decoding ----

template <class F>
void decode_binary(Decoder& d) {
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), t);
  if (!with_integer(t, [&](auto tag) {
        using T = typename decltype(tag)::type;
        d.out.run = binary<T, T, T, F>;
      }))
    d.fail("not an integer type");
}

template <class F>
void decode_logic(Decoder& d) {
  if (!d.take("pred")) return decode_binary<F>(d);
  d.out.category = Category::predicate;
  d.out.run = predicate_op<F>;
  d.out.d = d.predicate(d.operand(0));
  d.out.a = d.predicate(d.operand(1));
  d.out.b = d.predicate(d.operand(2));
  d.out.flags = d.operand(1).negated | d.operand(2).negated << 1;
}

template <class F, bool kToU32 = false>
void decode_unary(Decoder& d) {
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), kToU32 ? 4 : bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  with_integer(t, [&](auto tag) {
    using T = typename decltype(tag)::type;
    d.out.run = unary<std::conditional_t<kToU32, uint32_t, T>, T, F>;
  });
  if (!d.out.run) d.fail("not an integer type");
}

void decode_not(Decoder& d) {
  if (!d.take("pred")) return decode_unary<Not>(d);
  d.out.category = Category::predicate;
  d.out.run = predicate_not;
  d.out.d = d.predicate(d.operand(0));
  d.out.a = d.predicate(d.operand(1));
}

template <class F>
void decode_shift(Decoder& d) {
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), Type::u32);
  with_integer(t, [&](auto tag) {
    using T = typename decltype(tag)::type;
    d.out.run = binary<T, T, uint32_t, F>;
  });
}

void decode_mul(Decoder& d) {
  const std::string part = d.take_any({"lo", "hi", "wide"});
  const Type t = d.type();
  const int width = bytes_of(t);
  const bool mad = d.opcode() != "mul";
  if (part.empty()) d.fail("which part of the product?");
  d.out.d = d.destination(d.operand(0), part == "wide" ? 2 * width : width);
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), t);
  if (mad) d.out.c = d.source(d.operand(3), part == "wide" ? 2 * width : width);
  with_integer(t, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wider<T>;
    if (part == "lo") d.out.run = mad ? ternary<T, T, T, T, Mad> : binary<T, T, T, Mul>;
    if (part == "hi") d.out.run = mad ? ternary<T, T, T, T, MadHi> : binary<T, T, T, MulHi>;
    if (part == "wide" && width < 8)
      d.out.run = mad ? ternary<W, T, T, W, MadWide> : binary<W, T, T, MulWide>;
  });
  if (!d.out.run) d.fail("not an integer type");
}

void decode_carry(Decoder& d) {
  const std::string& op = d.opcode();
  const bool mad = op[0] == 'm';
  d.out.flags = (op.back() == 'c' ? kReadsCarry : 0) | (d.take("cc") ? kWritesCarry : 0) |
                (op[0] == 's' ? kSubtracts : 0);
  if (mad) d.out.flags |= d.take_any({"lo", "hi"}) == "hi" ? kHigh : 0;
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), t);
  if (mad) d.out.c = d.source(d.operand(3), t);
  if (mad && d.out.flags & kHigh && is_signed(t))
    d.fail("the signed high product with carry is not supported");
  d.out.run = bytes_of(t) == 8 ? with_carry<uint64_t> : with_carry<uint32_t>;
}

void decode_bfe(Decoder& d) {
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), Type::u32);
  d.out.c = d.source(d.operand(3), Type::u32);
  with_integer(t, [&](auto tag) {
    using T = typename decltype(tag)::type;
    d.out.run = ternary<T, T, uint32_t, uint32_t, Bfe>;
  });
}

void decode_bfi(Decoder& d) {
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), t);
  d.out.c = d.source(d.operand(3), Type::u32);
  d.out.list = {d.source(d.operand(4), Type::u32)};
  d.out.run = bytes_of(t) == 8 ? bfi<uint64_t> : bfi<uint32_t>;
}

void decode_bfind(Decoder& d) {
  if (d.take("shiftamt"))
    decode_unary<Bfind<true>, true>(d);
  else
    decode_unary<Bfind<false>, true>(d);
}

template <class F>
void decode_three(Decoder& d) {
  d.type();
  d.out.d = d.destination(d.operand(0), 4);
  d.out.a = d.source(d.operand(1), Type::u32);
  d.out.b = d.source(d.operand(2), Type::u32);
  d.out.c = d.source(d.operand(3), Type::u32);
  d.out.run = ternary<uint32_t, uint32_t, uint32_t, uint32_t, F>;
}

void decode_lop3(Decoder& d) {
  decode_three<Prmt>(d);
  d.out.run = lop3;
  d.out.imm = d.integer(d.operand(4));
}

void decode_funnel(Decoder& d) {
  const bool left = d.take_any({"l", "r"}) == "l", wrap = d.take_any({"wrap", "clamp"}) == "wrap";
  if (left)
    wrap ? decode_three<Funnel<true, true>>(d) : decode_three<Funnel<true, false>>(d);
  else
    wrap ? decode_three<Funnel<false, true>>(d) : decode_three<Funnel<false, false>>(d);
}

void decode_sad(Decoder& d) {
  const Type t = d.type();
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  d.out.b = d.source(d.operand(2), t);
  d.out.c = d.source(d.operand(3), t);
  with_integer(t, [&](auto tag) {
    using T = typename decltype(tag)::type;
    d.out.run = ternary<T, T, T, T, Sad>;
  });
}

void decode_dp4a(Decoder& d) {
  const bool a = is_signed(d.type()), b = is_signed(d.type());
  d.out.d = d.destination(d.operand(0), 4);
  d.out.a = d.source(d.operand(1), Type::u32);
  d.out.b = d.source(d.operand(2), Type::u32);
  d.out.c = d.source(d.operand(3), Type::u32);
  using S = int32_t;
  using U = uint32_t;
  d.out.run = a ? (b ? ternary<S, S, S, S, Dp4a> : ternary<S, S, U, S, Dp4a>)
                : (b ? ternary<S, U, S, S, Dp4a> : ternary<U, U, U, U, Dp4a>);
}

void decode_bmsk(Decoder& d) {
  if (!d.take("clamp")) d.fail("only bmsk.clamp is supported");
  decode_binary<Bmsk>(d);
}

}  // namespace

// add, sub, mul, div, min, max, neg, abs and mad are in both tables: the floating one asks for these by type.
void decode_integer_arithmetic(Decoder& d) {
  static const Table table = {
      {"add", decode_binary<Add>}, {"sub", decode_binary<Sub>}, {"mul", decode_mul},
      {"mad", decode_mul},         {"div", decode_binary<Div>}, {"min", decode_binary<Min>},
      {"max", decode_binary<Max>}, {"neg", decode_unary<Neg>},  {"abs", decode_unary<Abs>}};
  for (size_t i = 0; i < d.mods(); ++i)
    if (d.mod(i) == "cc") return decode_carry(d);
  table.at(d.opcode())(d);
}

void add_integer(Table& t) {
  t["rem"] = decode_binary<Rem>;
  t["and"] = decode_logic<And>;
  t["or"] = decode_logic<Or>;
  t["xor"] = decode_logic<Xor>;
  t["not"] = decode_not;
  t["cnot"] = decode_unary<Cnot>;
  t["shl"] = decode_shift<Shl>;
  t["shr"] = decode_shift<Shr>;
  t["popc"] = decode_unary<Popc, true>;
  t["clz"] = decode_unary<Clz, true>;
  t["brev"] = decode_unary<Brev>;
  t["bfind"] = decode_bfind;
  t["bfe"] = decode_bfe;
  t["bfi"] = decode_bfi;
  t["lop3"] = decode_lop3;
  t["prmt"] = decode_three<Prmt>;
  t["shf"] = decode_funnel;
  t["sad"] = decode_sad;
  t["dp4a"] = decode_dp4a;
  t["bmsk"] = decode_bmsk;
  t["addc"] = t["subc"] = t["madc"] = decode_carry;
}

}  // namespace ptx
