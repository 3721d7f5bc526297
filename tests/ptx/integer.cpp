// Integer arithmetic and logic.
#include "integer.h"

#include "decode.h"

namespace ptx {
namespace {

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

// Two 16-bit numbers a register, F of each.
template <class T, class F>
struct InHalves {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    const T low = F()(static_cast<T>(a), static_cast<T>(b));
    const T high = F()(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
    return static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
  }
};

template <class F>
void decode_packable(Decoder& d) {
  const bool sign = d.take("s16x2");
  if (!sign && !d.take("u16x2")) return decode_binary<F>(d);
  d.out.d = d.destination(d.operand(0), 4);
  d.out.a = d.source(d.operand(1), Type::u32);
  d.out.b = d.source(d.operand(2), Type::u32);
  d.out.run = sign ? binary<uint32_t, uint32_t, uint32_t, InHalves<int16_t, F>>
                   : binary<uint32_t, uint32_t, uint32_t, InHalves<uint16_t, F>>;
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
      {"add", decode_packable<Add>}, {"sub", decode_binary<Sub>}, {"mul", decode_mul},
      {"mad", decode_mul},         {"div", decode_binary<Div>}, {"min", decode_packable<Min>},
      {"max", decode_packable<Max>}, {"neg", decode_unary<Neg>},  {"abs", decode_unary<Abs>}};
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
