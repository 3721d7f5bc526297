// Floating-point arithmetic in all types, the approximate functions, comparisons and selection.
#include <algorithm>

#include "decode.h"

namespace ptx {

void decode_integer_arithmetic(Decoder& d);  // integer.cpp

namespace {

// The lane functions work on double, which holds every smaller type and the products of halves exactly;
// single precision has its own overloads, so that a warp's loop stays in vectors of float.
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return -a;
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
// PTX: of a number and a NaN the number; -0 is less than +0; .NaN: a NaN if either is one.
template <bool kNan>
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    if (std::isnan(a) || std::isnan(b))
      return kNan ? std::numeric_limits<T>::quiet_NaN() : std::isnan(a) ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
  }
};
template <bool kNan>
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    if (std::isnan(a) || std::isnan(b))
      return kNan ? std::numeric_limits<T>::quiet_NaN() : std::isnan(a) ? b : a;
    return a > b || (a == b && std::signbit(b)) ? a : b;
  }
};
struct Rcp {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};
struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Rsqrt {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(1 / std::sqrt(static_cast<double>(a)));
  }
};
struct Ex2 {
  template <class T>
  T operator()(T a) const {
    return std::exp2(a);
  }
};
struct Lg2 {
  template <class T>
  T operator()(T a) const {
    return std::log2(a);
  }
};
struct Sin {
  template <class T>
  T operator()(T a) const {
    return std::sin(a);
  }
};
struct Cos {
  template <class T>
  T operator()(T a) const {
    return std::cos(a);
  }
};
struct Tanh {
  template <class T>
  T operator()(T a) const {
    return std::tanh(a);
  }
};

// What surrounds an operation: flushing of subnormals, saturation to [0, 1], relu.
enum Wrap : int { kPlain = 0, kFlush = 1, kSaturate = 2, kRelu = 4 };

template <class F, int kWrap>
struct On {
  template <class T>
  static T in(T x) {
    if constexpr (std::is_same<T, float>::value && (kWrap & kFlush)) return flush(x);
    return x;
  }
  template <class T>
  static T out(T x) {
    if constexpr (std::is_same<T, float>::value && (kWrap & kFlush)) x = flush(x);
    if constexpr (kWrap & kSaturate) x = x > 0 ? std::min<T>(x, 1) : T(0);  // a NaN becomes 0
    if constexpr (kWrap & kRelu) x = x < 0 ? T(0) : x;
    return x;
  }
  template <class... T>
  auto operator()(T... x) const {
    return apply(x...);
  }

 private:
  template <class T, class... Rest>
  static T apply(T x, Rest... rest) {
    if constexpr (std::is_floating_point<T>::value) {
      T r = out(static_cast<T>(F()(in(x), in(rest)...)));
      return std::isnan(r) ? std::numeric_limits<T>::quiet_NaN() : r;
    } else if constexpr (std::is_same<T, Pair<Half>>::value || std::is_same<T, Pair<BFloat>>::value) {
      return {apply(x.lo, rest.lo...), apply(x.hi, rest.hi...)};
    } else {
      return T::of(out(F()(x.value(), rest.value()...)));
    }
  }
};

template <class F, int kWrap, int kArity, class T>
Handler handler() {
  using O = On<F, kWrap>;
  if constexpr (kArity == 1)
    return unary<T, T, O>;
  else if constexpr (kArity == 2)
    return binary<T, T, T, O>;
  else
    return ternary<T, T, T, T, O>;
}

template <class F, int kArity, class T>
Handler handler(int wrap) {
  switch (wrap) {
    case kPlain:
      return handler<F, kPlain, kArity, T>();
    case kFlush:
      return handler<F, kFlush, kArity, T>();
    case kSaturate:
      return handler<F, kSaturate, kArity, T>();
    case kFlush | kSaturate:
      return handler<F, kFlush | kSaturate, kArity, T>();
    case kRelu:
      return handler<F, kRelu, kArity, T>();
    default:
      return nullptr;
  }
}

void directed(Warp& w, const Instr& i, Mask m) {
  RoundingMode mode(i.round);
  i.inner(w, i, m);
}

template <class F, int kArity>
void decode_operation(Decoder& d) {
  Instr& i = d.out;
  const int wrap =
      (d.take("ftz") ? kFlush : 0) | (d.take("sat") ? kSaturate : 0) | (d.take("relu") ? kRelu : 0);
  d.take_any({"approx", "full"});  // exact here: closer to the truth than the hardware is
  const Round round = d.rounding();
  const Type t = d.type();
  i.category =
      bytes_of(t) == 2 || t == Type::f16x2 || t == Type::bf16x2 ? Category::half : Category::floating;
  i.d = d.destination(d.operand(0), bytes_of(t));
  i.a = d.source(d.operand(1), t);
  if (kArity > 1) i.b = d.source(d.operand(2), t);
  if (kArity > 2) i.c = d.source(d.operand(3), t);
  const bool plain_half = i.category == Category::half;
  auto pick = [&](auto tag) {
    i.run = handler<F, kArity, typename decltype(tag)::type>(plain_half ? wrap & ~kFlush : wrap);
  };
  if (!with_float(t, pick) && !with_packed(t, pick)) d.fail("not a floating type");
  if (plain_half && (wrap & kFlush)) d.fail(".ftz on f16 is not supported");
  if (!i.run) d.fail("this combination of modifiers is not supported");
  if (round == Round::nearest_even) return;
  if (plain_half || round == Round::nearest_away) d.fail("this rounding is not supported");
  i.round = round;
  i.inner = i.run;
  i.run = directed;
}

// Sign operations touch the sign bit alone, of a NaN too.
template <class T>
struct Signs {
  static constexpr T mask = T(1) << (sizeof(T) * 8 - 1);
};
template <class T, bool kAbs>
struct SignOp {
  T operator()(T a) const { return kAbs ? a & ~sign() : a ^ sign(); }
  static T sign() { return Signs<T>::mask; }
};
template <bool kAbs>
struct SignPair {
  uint32_t operator()(uint32_t a) const { return kAbs ? a & 0x7fff7fff : a ^ 0x80008000; }
};

template <bool kAbs>
void decode_sign(Decoder& d) {
  const bool ftz = d.take("ftz");
  const Type t = d.type();
  d.out.category =
      bytes_of(t) == 2 || t == Type::f16x2 || t == Type::bf16x2 ? Category::half : Category::floating;
  d.out.d = d.destination(d.operand(0), bytes_of(t));
  d.out.a = d.source(d.operand(1), t);
  if (t == Type::f32)
    d.out.run = ftz ? unary<float, float, On<std::conditional_t<kAbs, Abs, Neg>, kFlush>>
                    : unary<uint32_t, uint32_t, SignOp<uint32_t, kAbs>>;
  else if (ftz)
    d.fail(".ftz is for f32 alone");
  else if (t == Type::f64)
    d.out.run = unary<uint64_t, uint64_t, SignOp<uint64_t, kAbs>>;
  else if (bytes_of(t) == 2)
    d.out.run = unary<uint16_t, uint16_t, SignOp<uint16_t, kAbs>>;
  else
    d.out.run = unary<uint32_t, uint32_t, SignPair<kAbs>>;
}

bool floating(const Decoder& d) {
  for (size_t i = 0; i < d.mods(); ++i)
    if (is_float(type_named(d.mod(i)))) return true;
  return false;
}

template <void (*kDecode)(Decoder&)>
void either(Decoder& d) {
  if (floating(d))
    kDecode(d);
  else
    decode_integer_arithmetic(d);
}

template <template <bool> class F>
void decode_extremum(Decoder& d) {
  if (d.take("NaN"))
    decode_operation<F<true>, 2>(d);
  else
    decode_operation<F<false>, 2>(d);
}
void decode_min(Decoder& d) { decode_extremum<Min>(d); }
void decode_max(Decoder& d) { decode_extremum<Max>(d); }

// ---- comparison and selection ----

enum Relation : int { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNanCheck };
template <int kRelation, bool kUnordered>
struct Compare {
  template <class T>
  static bool unordered(T a, T b) {
    if constexpr (std::is_floating_point<T>::value) return std::isnan(a) || std::isnan(b);
    return false;
  }
  template <class T>
  bool operator()(T a, T b) const {
    if constexpr (kRelation == kNum)
      return !unordered(a, b);
    else if constexpr (kRelation == kNanCheck)
      return unordered(a, b);
    else {
      if (unordered(a, b)) return kUnordered;
      return kRelation == kEq   ? a == b
             : kRelation == kNe ? a != b
             : kRelation == kLt ? a < b
             : kRelation == kLe ? a <= b
             : kRelation == kGt ? a > b
                                : a >= b;
    }
  }
};

template <class T>
auto comparable(T x) {
  if constexpr (std::is_arithmetic<T>::value)
    return x;
  else
    return x.value();
}

// One of a register's two halves.
template <class Pair, bool kHigh>
struct HalfOf {
  Pair pair;
  auto value() const { return (kHigh ? pair.hi : pair.lo).value(); }
};

template <class T, class F>
Mask compare(Warp& w, const Instr& i, Mask m) {
  const T *a = w.at<T>(i.a), *b = w.at<T>(i.b);
  const bool ftz = i.flags & kFlush;
  Mask r = 0;
  for (int l = 0; l < kLanes; ++l) {
    auto x = comparable(a[l]), y = comparable(b[l]);
    if constexpr (std::is_same<T, float>::value)
      if (ftz) x = flush(x), y = flush(y);
    r |= static_cast<Mask>(F()(x, y)) << l;
  }
  return r & m;
}

// Instr::imm of setp: how the result combines with the third predicate.
enum Combine : int { kAlone, kAnd, kOr, kXor };
Mask combined(Warp& w, const Instr& i, Mask r) {
  if (i.imm == kAlone) return r;
  const Mask c = w.predicate(i.c) ^ (i.flags & 128 ? kAll : 0);
  return i.imm == kAnd ? r & c : i.imm == kOr ? r | c : r ^ c;
}

void setp(Warp& w, const Instr& i, Mask m) {
  const Mask r = i.compare(w, i, m), s = i.compare_high ? i.compare_high(w, i, m) : ~r;
  const Mask p = combined(w, i, r), q = i.e == kNone ? 0 : combined(w, i, s);
  w.set_predicate(i.d, m, p);
  if (i.e != kNone) w.set_predicate(i.e, m, q);
}

template <class T>
void set_value(Warp& w, const Instr& i, Mask m) {  // set.lt.u32.f32: all ones, or 1.0
  const Mask r = combined(w, i, i.compare(w, i, m));
  const T yes = i.type == Type::f32 ? static_cast<T>(0x3f800000) : static_cast<T>(~T(0));
  each(m, [&](int l) { w.at<T>(i.d)[l] = r >> l & 1 ? yes : 0; });
}

using CompareFn = Mask (*)(Warp&, const Instr&, Mask);
template <class T>
CompareFn comparison(const std::string& op) {
  if (op == "eq") return compare<T, Compare<kEq, false>>;
  if (op == "ne") return compare<T, Compare<kNe, false>>;
  if (op == "lt" || op == "lo") return compare<T, Compare<kLt, false>>;
  if (op == "le" || op == "ls") return compare<T, Compare<kLe, false>>;
  if (op == "gt" || op == "hi") return compare<T, Compare<kGt, false>>;
  if (op == "ge" || op == "hs") return compare<T, Compare<kGe, false>>;
  if (op == "equ") return compare<T, Compare<kEq, true>>;
  if (op == "neu") return compare<T, Compare<kNe, true>>;
  if (op == "ltu") return compare<T, Compare<kLt, true>>;
  if (op == "leu") return compare<T, Compare<kLe, true>>;
  if (op == "gtu") return compare<T, Compare<kGt, true>>;
  if (op == "geu") return compare<T, Compare<kGe, true>>;
  if (op == "num") return compare<T, Compare<kNum, false>>;
  if (op == "nan") return compare<T, Compare<kNanCheck, false>>;
  return nullptr;
}

void decode_compare(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::predicate;
  const std::string op = d.take_any({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu",
                                     "ltu", "leu", "gtu", "geu", "num", "nan"});
  const std::string combine = d.take_any({"and", "or", "xor"});
  i.imm = combine.empty() ? kAlone : combine == "and" ? kAnd : combine == "or" ? kOr : kXor;
  i.flags = d.take("ftz") ? kFlush : 0;
  const bool value = d.opcode() == "set";
  if (value) i.type = d.type();
  const Type t = d.type();
  if (value) {
    i.d = d.destination(d.operand(0), bytes_of(i.type));
    if (bytes_of(i.type) != 4 || i.type == Type::f16x2 || i.type == Type::bf16x2)
      d.fail("this set is not supported");
    i.run = set_value<uint32_t>;
  } else {
    const std::vector<Operand> out = d.elements(d.operand(0));
    i.d = d.predicate(out[0]);
    if (out.size() > 1) i.e = d.predicate(out[1]);
    i.run = setp;
  }
  i.a = d.source(d.operand(1), t);
  i.b = d.source(d.operand(2), t);
  if (i.imm != kAlone) {
    i.c = d.predicate(d.operand(3));
    if (d.operand(3).negated) i.flags |= 128;
  }
  auto pick = [&](auto tag) { i.compare = comparison<typename decltype(tag)::type>(op); };
  auto pick_both = [&](auto tag) {
    using Pair = typename decltype(tag)::type;
    i.compare = comparison<HalfOf<Pair, false>>(op);
    i.compare_high = comparison<HalfOf<Pair, true>>(op);
  };
  if (!with_integer(t, pick) && !with_float(t, pick) && (value || !with_packed(t, pick_both)))
    d.fail("cannot compare this type");
  if (!i.compare) d.fail("unknown comparison");
}

template <class T>
void select(Warp& w, const Instr& i, Mask m) {
  T *d = w.at<T>(i.d), *a = w.at<T>(i.a), *b = w.at<T>(i.b);
  const Mask p = w.predicate(i.c);
  each(m, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
}

void decode_select(Decoder& d) {
  const Type t = d.type();
  Instr& i = d.out;
  i.category = Category::move;
  i.d = d.destination(d.operand(0), bytes_of(t));
  i.a = d.source(d.operand(1), t);
  i.b = d.source(d.operand(2), t);
  i.c = d.predicate(d.operand(3));
  i.run = bytes_of(t) == 2 ? select<uint16_t> : bytes_of(t) == 4 ? select<uint32_t> : select<uint64_t>;
}

void copysign_bits(Warp& w, const Instr& i, Mask m) {
  each(m, [&](int l) {
    if (i.type == Type::f64)
      w.at<double>(i.d)[l] = std::copysign(w.at<double>(i.b)[l], w.at<double>(i.a)[l]);
    else
      w.at<float>(i.d)[l] = std::copysign(w.at<float>(i.b)[l], w.at<float>(i.a)[l]);
  });
}

void decode_copysign(Decoder& d) {
  Instr& i = d.out;
  i.type = d.type();
  i.category = Category::floating;
  i.d = d.destination(d.operand(0), bytes_of(i.type));
  i.a = d.source(d.operand(1), i.type);
  i.b = d.source(d.operand(2), i.type);
  i.run = copysign_bits;
}

template <class T>
void testp(Warp& w, const Instr& i, Mask m) {
  Mask r = 0;
  each(m, [&](int l) {
    const int c = std::fpclassify(w.at<T>(i.a)[l]);
    const bool yes[] = {c != FP_NAN && c != FP_INFINITE,
                        c == FP_INFINITE,
                        c != FP_NAN,
                        c == FP_NAN,
                        c == FP_NORMAL,
                        c == FP_SUBNORMAL};
    r |= static_cast<Mask>(yes[i.imm]) << l;
  });
  w.set_predicate(i.d, m, r);
}

void decode_testp(Decoder& d) {
  const char* names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  const std::string op = d.take_any({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  d.out.imm = std::find(names, names + 6, op) - names;
  if (d.out.imm == 6) d.fail("unknown test");
  const Type t = d.type();
  d.out.d = d.predicate(d.operand(0));
  d.out.a = d.source(d.operand(1), t);
  d.out.run = t == Type::f64 ? testp<double> : testp<float>;
  d.out.category = Category::predicate;
}

}  // namespace

void add_floating(Table& t) {
  t["add"] = either<decode_operation<Add, 2>>;
  t["sub"] = either<decode_operation<Sub, 2>>;
  t["mul"] = either<decode_operation<Mul, 2>>;
  t["div"] = either<decode_operation<Div, 2>>;
  t["mad"] = either<decode_operation<Fma, 3>>;
  t["fma"] = decode_operation<Fma, 3>;
  t["min"] = either<decode_min>;
  t["max"] = either<decode_max>;
  t["neg"] = either<decode_sign<false>>;
  t["abs"] = either<decode_sign<true>>;
  t["rcp"] = decode_operation<Rcp, 1>;
  t["sqrt"] = decode_operation<Sqrt, 1>;
  t["rsqrt"] = decode_operation<Rsqrt, 1>;
  t["ex2"] = decode_operation<Ex2, 1>;
  t["lg2"] = decode_operation<Lg2, 1>;
  t["sin"] = decode_operation<Sin, 1>;
  t["cos"] = decode_operation<Cos, 1>;
  t["tanh"] = decode_operation<Tanh, 1>;
  t["setp"] = t["set"] = decode_compare;
  t["selp"] = decode_select;
  t["copysign"] = decode_copysign;
  t["testp"] = decode_testp;
}

}  // namespace ptx
