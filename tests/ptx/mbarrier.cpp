// mbarrier objects, and the copies that report to them. Everything asynchronous happens as late as it may:
// when somebody polls the barrier that it completes.
#include <algorithm>

#include "access.h"
#include "decode.h"

namespace ptx {
namespace {

MBarrier& find(Warp& w, int lane, uint64_t address) {
  const uint32_t at = static_cast<uint32_t>(within(Space::shared, address));
  auto b = w.cta->mbarriers.find(at);
  if (b == w.cta->mbarriers.end())
    fault(w, lane, "mbarrier", "there is no initialised mbarrier here", address);
  return b->second;
}

void complete_if_due(MBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  b.completed = b.clocks;
}

void arrive_at(Warp& w, int lane, MBarrier& b, uint32_t count, uint64_t address) {
  if (count > b.pending)
    fault(w, lane, "mbarrier", "more arrivals than the mbarrier expects in this phase", address);
  b.pending -= count;
  complete_if_due(b);
}

// What waits for this barrier's pollers: cp.async arrivals and bulk copies.
void deliver(Cta& cta, uint32_t barrier) {
  std::vector<BulkCopy> later;
  std::vector<BulkCopy> now;
  for (BulkCopy& c : cta.bulk_copies) (c.barrier == barrier ? now : later).push_back(std::move(c));
  cta.bulk_copies = std::move(later);
  for (BulkCopy& c : now) {
    Warp& w = cta.warps[c.warp];
    MBarrier& b = cta.mbarriers.at(barrier);
    if (c.lanes) {
      land_all(w, c.lanes);
      b.clocks.join(w.release());
      b.pending -= __builtin_popcount(c.lanes);
    } else {
      for (size_t at = 0; at < c.data.size(); at += 16)
        cta.shared.finish_copy(w, -1, c.to + static_cast<uint32_t>(at), 16, &c.data[at], Proxy::async);
      b.clocks.join(w.release());
      b.bytes -= static_cast<int64_t>(c.data.size());
    }
    complete_if_due(b);
  }
}

enum Action : uint8_t { kInit, kInval, kArrive, kDrop, kExpect, kArriveExpect, kComplete };

void act(Warp& w, const Instr& i, Mask m) {
  uint64_t address[kLanes];
  addresses(w, i, m, address);
  each(m, [&](int l) {
    const uint32_t at = static_cast<uint32_t>(within(Space::shared, address[l]));
    const uint32_t count = i.c == kNone ? 1 : w.at<uint32_t>(i.c)[l];
    if (i.flags == kInit) {
      w.cta->shared.access(w, l, at, 8, 8, Access::write);
      if (!count || count >= 1u << 20)
        fault(w, l, "mbarrier", "an mbarrier needs a count from 1 to 2^20 - 1", at);
      MBarrier& fresh = w.cta->mbarriers[at] = MBarrier();
      fresh.expected = fresh.pending = count;
      return;
    }
    w.cta->shared.access(w, l, at, 8, 8, Access::atomic);
    MBarrier& b = find(w, l, at);
    if (i.d != kNone) w.at<uint64_t>(i.d)[l] = b.phase;
    if (i.flags != kExpect) b.clocks.join(w.release());
    switch (i.flags) {
      case kInval:
        w.cta->mbarriers.erase(at);
        break;
      case kDrop:
        --b.expected, arrive_at(w, l, b, 1, at);
        break;
      case kExpect:
        b.bytes += count;
        break;
      case kArriveExpect:
        b.bytes += count, arrive_at(w, l, b, 1, at);
        break;
      case kComplete:
        b.bytes -= count, complete_if_due(b);
        break;
      default:
        arrive_at(w, l, b, count, at);
    }
  });
}

bool passed(const Instr& i, const MBarrier& b, Warp& w, int lane) {
  if (i.flags) return (b.phase & 1) != (w.at<uint32_t>(i.c)[lane] & 1);  // .parity
  return b.phase > w.at<uint64_t>(i.c)[lane];
}

void poll(Warp& w, const Instr& i, Mask m) {
  uint64_t address[kLanes];
  addresses(w, i, m, address);
  Mask done = 0;
  each(m, [&](int l) {
    const uint32_t at = static_cast<uint32_t>(within(Space::shared, address[l]));
    w.cta->shared.access(w, l, at, 8, 8, Access::atomic);
    find(w, l, at);
    if (!passed(i, find(w, l, at), w, l) && w.cta->random() % 4 == 0) deliver(*w.cta, at);
    MBarrier& b = find(w, l, at);
    if (!passed(i, b, w, l)) return;
    w.clocks.join(b.completed);
    done |= 1u << l;
  });
  w.set_predicate(i.d, m, done);
  w.polling = w.yielded = done != m;
  w.cta->idle_polls = w.polling ? w.cta->idle_polls + 1 : 0;
}

void take_scope(Decoder& d) {
  d.take_any({"acquire", "release", "relaxed", "acq_rel"});
  d.take_any({"cta", "cluster"});
  d.take_any({"shared", "shared::cta", "shared::cluster"});
  d.take("noComplete");
  d.take("b64");
}

void decode_mbarrier(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::barrier;
  i.space = Space::shared;
  take_scope(d);
  size_t at = 0;
  if (!d.take_any({"test_wait", "try_wait"}).empty()) {
    i.flags = d.take("parity");
    i.d = d.predicate(d.operand(at++));
    d.address(d.operand(at++), i);
    i.c = d.source(d.operand(at++), i.flags ? 4 : 8);
    i.run = poll;
    return;
  }
  const std::string action =
      d.take_any({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx"});
  const bool expects = action == "arrive" && d.take("expect_tx");
  if (action.empty()) d.fail("this mbarrier operation is not supported");
  i.flags = action == "init"          ? kInit
            : action == "inval"       ? kInval
            : action == "arrive_drop" ? kDrop
            : action == "expect_tx"   ? kExpect
            : action == "complete_tx" ? kComplete
            : expects                 ? kArriveExpect
                                      : kArrive;
  if (d.operand(0).kind != Operand::address) i.d = d.destination(d.operand(at++), 8);
  d.address(d.operand(at++), i);
  if (at < d.operands()) i.c = d.source(d.operand(at), Type::u32);
  i.run = act;
}

// ---- copies that arrive at an mbarrier ----

void copy_arrive(Warp& w, const Instr& i, Mask m) {
  uint64_t address[kLanes];
  addresses(w, i, m, address);
  each(m, [&](int l) {
    const uint32_t at = static_cast<uint32_t>(within(Space::shared, address[l]));
    MBarrier& b = find(w, l, at);
    if (!i.flags) ++b.pending;  // without .noinc the arrival is one more than the count
    w.cta->bulk_copies.push_back({0, at, {}, w.index, 1u << l});
  });
}

void bulk_load(Warp& w, const Instr& i, Mask m) {
  uint64_t to[kLanes];
  addresses(w, i, m, to);
  each(m, [&](int l) {
    const uint64_t from = w.at<uint64_t>(i.b)[l] + i.source_offset;
    const uint32_t bytes = w.at<uint32_t>(i.c)[l];
    const uint32_t barrier = static_cast<uint32_t>(within(Space::shared, w.get(i.e, i.element_width, l)));
    if (from % 16 || to[l] % 16 || bytes % 16)
      fault(w, l, "misaligned", "a bulk copy needs multiples of 16 bytes", from);
    find(w, l, barrier);
    BulkCopy copy{static_cast<uint32_t>(within(Space::shared, to[l])), barrier, {}, w.index, 0};
    for (uint32_t at = 0; at < bytes; at += 16) {
      const uint8_t* p = reach(w, l, Space::global, from + at, 16, 16, Access::read, false);
      copy.data.insert(copy.data.end(), p, p + 16);
      w.cta->shared.start_copy(w, l, copy.to + at, 16);
    }
    w.cta->counters.global_load_requests += 1;
    w.cta->counters.global_load_sectors += (from % kSector + bytes + kSector - 1) / kSector;
    w.cta->bulk_copies.push_back(std::move(copy));
  });
}

}  // namespace

void decode_copy_arrive(Decoder& d) {
  d.out.category = Category::async_copy;
  if (!d.take("arrive")) d.fail("only cp.async.mbarrier.arrive exists");
  d.out.flags = d.take("noinc");
  take_scope(d);
  d.address(d.operand(0), d.out);
  d.out.run = copy_arrive;
}

void decode_bulk_copy(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::async_copy;
  const bool to_shared = !d.take_any({"shared::cta", "shared::cluster"}).empty() && d.mod(2)[0] == 's';
  if (!to_shared || !d.take("global") || !d.take("mbarrier::complete_tx::bytes"))
    d.fail("of the bulk copies only shared from global with an mbarrier is supported");
  d.take_prefix("L2::");
  Instr source, barrier;
  d.address(d.operand(1), source);
  d.address(d.operand(3), barrier);
  if (barrier.imm) d.fail("an offset in the address of the mbarrier is not supported");
  if (source.width != 8) d.fail("a 64-bit source address is needed");
  d.address(d.operand(0), i);
  i.b = source.a;
  i.source_offset = source.imm;
  i.c = d.source(d.operand(2), Type::u32);
  i.e = barrier.a;
  i.element_width = barrier.width;
  i.run = bulk_load;
}

void add_mbarrier(Table& t) { t["mbarrier"] = decode_mbarrier; }

}  // namespace ptx
