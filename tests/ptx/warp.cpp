// Exchange within a warp: shfl, vote, match, redux, elect, activemask.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

// The lanes that take part must be exactly the members that are still alive.
void check_members(Warp& w, Mask m, uint32_t members_register) {
  const Mask members = w.at<uint32_t>(members_register)[__builtin_ctz(m)];
  if (members & w.live & ~m)
    fault(w, __builtin_ctz(members & w.live & ~m), "divergent-warp",
          "a member of the mask that does not execute the instruction");
  if (m & ~members)
    fault(w, __builtin_ctz(m & ~members), "divergent-warp",
          "executes a warp instruction without being a member");
}

enum Shuffle : int { kUp, kDown, kButterfly, kIndex };

void shfl(Warp& w, const Instr& i, Mask m) {
  check_members(w, m, i.list[0]);
  uint32_t before[kLanes];
  std::copy_n(w.at<uint32_t>(i.a), kLanes, before);
  uint32_t distance[kLanes], control[kLanes];
  std::copy_n(w.at<uint32_t>(i.b), kLanes, distance);
  std::copy_n(w.at<uint32_t>(i.c), kLanes, control);
  Mask inside = 0;
  each(m, [&](int l) {
    const int segment = control[l] >> 8 & 31, clamp = control[l] & 31, b = distance[l] & 31;
    const int highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    int from = 0;
    bool valid = false;
    switch (i.flags) {
      case kUp:
        from = l - b, valid = from >= highest;
        break;
      case kDown:
        from = l + b, valid = from <= highest;
        break;
      case kButterfly:
        from = l ^ b, valid = from <= highest;
        break;
      default:
        from = lowest | (b & ~segment), valid = from <= highest;
    }
    if (!valid) from = l;  // out of range: its own value
    if (!(m >> from & 1))
      fault(w, l, "divergent-warp", "shfl reads lane " + std::to_string(from) + ", which is not active");
    inside |= static_cast<Mask>(valid) << l;
    w.at<uint32_t>(i.d)[l] = before[from];
  });
  if (i.e != kNone) w.set_predicate(i.e, m, inside);
}

void decode_shfl(Decoder& d) {
  if (!d.take("sync")) d.fail("only shfl.sync is supported");
  Instr& i = d.out;
  i.category = Category::warp;
  const std::string mode = d.take_any({"up", "down", "bfly", "idx"});
  i.flags = mode == "up" ? kUp : mode == "down" ? kDown : mode == "bfly" ? kButterfly : kIndex;
  d.type();
  const std::vector<Operand> out = d.elements(d.operand(0));
  i.d = d.destination(out[0], 4);
  if (out.size() > 1) i.e = d.predicate(out[1]);
  i.a = d.source(d.operand(1), Type::b32);
  i.b = d.source(d.operand(2), Type::b32);
  i.c = d.source(d.operand(3), Type::b32);
  i.list = {d.source(d.operand(4), Type::b32)};
  i.run = shfl;
}

enum Vote : int { kVoteAll, kVoteAny, kVoteUni, kBallot };

void vote(Warp& w, const Instr& i, Mask m) {
  check_members(w, m, i.b);
  const Mask p = (w.predicate(i.a) ^ (i.imm ? kAll : 0)) & m;
  if (i.flags == kBallot)
    each(m, [&](int l) { w.at<uint32_t>(i.d)[l] = p; });
  else
    w.set_predicate(i.d, m,
                    (i.flags == kVoteAll   ? p == m
                     : i.flags == kVoteAny ? p != 0
                                           : p == m || !p)
                        ? kAll
                        : 0);
}

void decode_vote(Decoder& d) {
  if (!d.take("sync")) d.fail("only vote.sync is supported");
  Instr& i = d.out;
  i.category = Category::warp;
  const std::string mode = d.take_any({"all", "any", "uni", "ballot"});
  i.flags = mode == "all" ? kVoteAll : mode == "any" ? kVoteAny : mode == "uni" ? kVoteUni : kBallot;
  d.type();
  i.d = i.flags == kBallot ? d.destination(d.operand(0), 4) : d.predicate(d.operand(0));
  i.a = d.predicate(d.operand(1));
  i.imm = d.operand(1).negated;
  i.b = d.source(d.operand(2), Type::b32);
  i.run = vote;
}

void match(Warp& w, const Instr& i, Mask m) {
  check_members(w, m, i.b);
  const uint64_t first = w.get(i.a, i.bytes, __builtin_ctz(m));
  bool same = true;
  each(m, [&](int l) { same &= w.get(i.a, i.bytes, l) == first; });
  Mask equal[kLanes];
  each(m, [&](int l) {
    equal[l] = 0;
    for (int k = 0; k < kLanes; ++k)
      if ((m >> k & 1) && w.get(i.a, i.bytes, k) == w.get(i.a, i.bytes, l)) equal[l] |= 1u << k;
  });
  each(m, [&](int l) { w.at<uint32_t>(i.d)[l] = !i.flags ? equal[l] : same ? m : 0; });
  if (i.e != kNone) w.set_predicate(i.e, m, same ? kAll : 0);
}

void decode_match(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::warp;
  i.flags = d.take_any({"any", "all"}) == "all";
  if (!d.take("sync")) d.fail("only match.sync is supported");
  i.bytes = static_cast<uint8_t>(bytes_of(d.type()));
  const std::vector<Operand> out = d.elements(d.operand(0));
  i.d = d.destination(out[0], 4);
  if (out.size() > 1) i.e = d.predicate(out[1]);
  i.a = d.source(d.operand(1), i.bytes);
  i.b = d.source(d.operand(2), Type::b32);
  i.run = match;
}

template <class T>
T reduce(Warp& w, const Instr& i, Mask m) {
  const T* a = w.at<T>(i.a);
  T r = a[__builtin_ctz(m)];
  for (Mask rest = m & (m - 1); rest; rest &= rest - 1) {
    const T x = a[__builtin_ctz(rest)];
    switch (i.flags) {
      case 0:
        r += x;
        break;
      case 1:
        r = std::min(r, x);
        break;
      case 2:
        r = std::max(r, x);
        break;
      case 3:
        r &= x;
        break;
      case 4:
        r |= x;
        break;
      default:
        r ^= x;
    }
  }
  return r;
}

template <class T>
void redux(Warp& w, const Instr& i, Mask m) {
  check_members(w, m, i.b);
  const T r = reduce<T>(w, i, m);
  each(m, [&](int l) { w.at<T>(i.d)[l] = r; });
}

void decode_redux(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::warp;
  if (!d.take("sync")) d.fail("only redux.sync is supported");
  const char* ops[] = {"add", "min", "max", "and", "or", "xor"};
  const std::string op = d.take_any({"add", "min", "max", "and", "or", "xor"});
  i.flags = static_cast<uint8_t>(std::find(ops, ops + 6, op) - ops);
  const Type t = d.type();
  if (is_float(t) || i.flags == 6) d.fail("this redux is not supported");
  i.d = d.destination(d.operand(0), 4);
  i.a = d.source(d.operand(1), t);
  i.b = d.source(d.operand(2), Type::b32);
  i.run = is_signed(t) ? redux<int32_t> : redux<uint32_t>;
}

void elect(Warp& w, const Instr& i, Mask m) {
  check_members(w, m, i.a);
  const int leader = __builtin_ctz(m);
  each(m, [&](int l) { w.at<uint32_t>(i.d)[l] = leader; });
  w.set_predicate(i.e, m, 1u << leader);
}

void decode_elect(Decoder& d) {
  if (!d.take("sync")) d.fail("only elect.sync exists");
  const std::vector<Operand> out = d.elements(d.operand(0));
  d.out.d = d.destination(out.at(0), 4);
  d.out.e = d.predicate(out.at(1));
  d.out.a = d.source(d.operand(1), Type::b32);
  d.out.run = elect;
  d.out.category = Category::warp;
}

void activemask(Warp& w, const Instr& i, Mask m) {
  each(m, [&](int l) { w.at<uint32_t>(i.d)[l] = m; });
}

void decode_activemask(Decoder& d) {
  d.type();
  d.out.d = d.destination(d.operand(0), 4);
  d.out.run = activemask;
  d.out.category = Category::warp;
}

}  // namespace

void add_warp(Table& t) {
  t["shfl"] = decode_shfl;
  t["vote"] = decode_vote;
  t["match"] = decode_match;
  t["redux"] = decode_redux;
  t["elect"] = decode_elect;
  t["activemask"] = decode_activemask;
}

}  // namespace ptx
