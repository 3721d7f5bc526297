// cp.async: copies to shared memory that land as late as is legal, at the wait that covers their group.
#include <algorithm>

#include "access.h"
#include "decode.h"

namespace ptx {
namespace {

void cp_async(Warp& w, const Instr& i, Mask m) {
  uint64_t to[kLanes], from[kLanes];
  addresses(w, i, m, to);
  Instr source = i;
  source.a = i.b;
  source.imm = i.source_offset;
  source.width = 8;
  addresses(w, source, m, from);
  AsyncCopy copy{};
  copy.mask = m;
  copy.bytes = i.bytes;
  Mask reads = 0;
  each(m, [&](int l) {
    const uint64_t address = within(Space::shared, to[l]);
    uint32_t bytes = i.c == kNone ? i.bytes : w.at<uint32_t>(i.c)[l];
    if (i.e != kNone && ((w.predicate(i.e) >> l & 1) != i.flags)) bytes = 0;  // ignore-src
    if (bytes > i.bytes) fault(w, l, "cp.async", "the source size exceeds the copy size", from[l]);
    if (from[l] % i.bytes)
      fault(w, l, "misaligned", "the source is not a multiple of " + std::to_string(i.bytes), from[l]);
    if (bytes) {
      std::memcpy(copy.data[l],
                  reach(w, l, Space::global, from[l], static_cast<int>(bytes), 1, Access::read, false),
                  bytes);
      reads |= 1u << l;
    }
    w.cta->shared.start_copy(w, l, static_cast<uint32_t>(address), i.bytes);
    copy.to[l] = static_cast<uint32_t>(address);
    copy.group[l] = w.copy_group[l];
  });
  if (reads) count_global(w, reads, from, i.bytes, Access::read);
  count_shared(w, m, to, i.bytes);
  w.copies.push_back(copy);
}

void commit(Warp& w, const Instr&, Mask m) {
  each(m, [&](int l) { ++w.copy_group[l]; });
}

// Lands what the lanes of m started in groups of which at most `pending` younger ones may stay under way; -1:
// all.
void land(Warp& w, Mask m, int64_t pending) {
  for (AsyncCopy& copy : w.copies)
    each(copy.mask & m, [&](int l) {
      if (pending >= 0 && int64_t{copy.group[l]} + pending >= w.copy_group[l]) return;
      w.cta->shared.finish_copy(w, l, copy.to[l], static_cast<int>(copy.bytes), copy.data[l]);
      copy.mask &= ~(1u << l);
    });
  auto empty = [](const AsyncCopy& c) { return !c.mask; };
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), empty), w.copies.end());
}

void wait_group(Warp& w, const Instr& i, Mask m) { land(w, m, i.imm); }

void decode_copy(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::async_copy;
  d.take_any({"ca", "cg"});
  while (!d.take_prefix("L2::").empty()) {
  }
  if (d.take_any({"shared", "shared::cta"}).empty() || !d.take("global"))
    d.fail("only shared from global is supported");
  const int64_t bytes = d.integer(d.operand(2));
  if (bytes != 4 && bytes != 8 && bytes != 16) d.fail("a copy of 4, 8 or 16 bytes is needed");
  i.bytes = static_cast<uint8_t>(bytes);
  Instr source;
  d.address(d.operand(1), source);
  if (source.width != 8) d.fail("a 64-bit source address is needed");
  i.b = source.a;
  i.source_offset = source.imm;
  d.address(d.operand(0), i);
  if (d.operands() > 3) {
    const Operand& o = d.operand(3);
    const bool ignore = o.kind == Operand::reg && d.names.function->registers[o.index] == Type::pred;
    if (ignore)
      i.e = d.predicate(o), i.flags = o.negated;
    else if (d.width_of(o) != 8)
      i.c = d.source(o, Type::u32);  // 8 bytes: a cache policy
  }
  i.run = cp_async;
}

}  // namespace

void decode_bulk_copy(Decoder& d);  // mbarrier.cpp
void decode_copy_arrive(Decoder& d);

void land_all(Warp& w, Mask m) { land(w, m, -1); }

namespace {

void decode_cp(Decoder& d) {
  if (!d.take("async")) d.fail("only cp.async exists");
  if (d.take("bulk")) return decode_bulk_copy(d);
  if (d.take("mbarrier")) return decode_copy_arrive(d);
  d.out.category = Category::async_copy;
  if (d.take("commit_group")) {
    d.out.run = commit;
  } else if (d.take("wait_group")) {
    d.out.run = wait_group;
    d.out.imm = d.integer(d.operand(0));
  } else if (d.take("wait_all")) {
    d.out.run = wait_group;
    d.out.imm = -1;
  } else {
    decode_copy(d);
  }
}

}  // namespace

void add_async(Table& t) { t["cp"] = decode_cp; }

}  // namespace ptx
