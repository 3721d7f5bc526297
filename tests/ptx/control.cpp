// Control flow and barriers: branches with reconvergence, calls, exits, bar and barrier.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

// The lanes of the top frame go on in several places and wait for each other at `join`.
void diverge(Warp& w, std::vector<std::pair<uint32_t, Mask>> parts, uint32_t join) {
  const uint32_t outer = w.stack.back().join;
  if (join == outer)
    w.stack.pop_back();  // the frame below already waits there (or nobody comes back)
  else
    w.stack.back().pc = join;
  std::shuffle(parts.begin(), parts.end(), w.cta->random);
  const std::vector<Instr>& code =
      w.cta->grid.kernel.code;  // who only exits goes first: barriers no longer count on it
  std::stable_partition(parts.begin(), parts.end(),
                        [&](auto& part) { return !code[part.first].ends_thread(); });
  for (auto& [pc, lanes] : parts)
    if (lanes && pc != join) w.stack.push_back({pc, join, lanes});
}

void branch(Warp& w, const Instr& i, Mask m) {
  Frame& f = w.stack.back();
  if (m == f.mask)
    f.pc = i.target;
  else
    diverge(w, {{i.target, m}, {f.pc, f.mask & ~m}}, i.join);
}

void indexed_branch(Warp& w, const Instr& i, Mask m) {
  std::map<uint32_t, Mask> targets;
  Frame& f = w.stack.back();
  if (f.mask & ~m) targets[f.pc] = f.mask & ~m;
  each(m, [&](int l) {
    uint32_t index = w.at<uint32_t>(i.a)[l];
    if (index >= i.list.size())
      fault(w, l, "branch", "index " + std::to_string(index) + " is past the branch targets");
    targets[i.list[index]] |= Mask{1} << l;
  });
  if (targets.size() == 1)
    f.pc = targets.begin()->first;
  else
    diverge(w, {targets.begin(), targets.end()}, i.join);
}

// Instr::list of a call: how many parameters, then (from, to, bytes) of each in local memory; the same for
// results.
size_t copy_parameters(Warp& w, const Instr& i, size_t at, Mask m) {
  const uint32_t per_lane = static_cast<uint32_t>(w.local.size() / kLanes);
  for (uint32_t n = i.list[at++]; n > 0; --n, at += 3)
    each(m, [&](int l) {
      uint8_t* frame = &w.local[size_t{per_lane} * l];
      std::memcpy(frame + i.list[at + 1], frame + i.list[at], i.list[at + 2]);
    });
  return at;
}

void call(Warp& w, const Instr& i, Mask m) {
  for (const Frame& f : w.stack)
    if (f.call && f.call->target == i.target) fault(w, -1, "recursion", "a function that calls itself");
  copy_parameters(w, i, 0, m);
  w.stack.push_back({kNone, kNone, m, &i});  // marks where its lanes return to
  w.stack.push_back({i.target, kNone, m});
}

void finish_call(Warp& w) {
  const Frame f = w.stack.back();
  w.stack.pop_back();
  copy_parameters(w, *f.call, 1 + 3 * f.call->list[0], f.mask);
}

void leave(Warp& w, Mask m) {
  for (Frame& f : w.stack) f.mask &= ~m;
  w.live &= ~m;
}

void ret(Warp& w, const Instr&, Mask m) {
  auto marker = std::find_if(w.stack.rbegin(), w.stack.rend(), [](const Frame& f) { return f.call; });
  if (marker == w.stack.rend()) return leave(w, m);
  for (auto f = w.stack.rbegin(); f != marker; ++f) f->mask &= ~m;
}

void exit_thread(Warp& w, const Instr&, Mask m) { leave(w, m); }

void trap(Warp& w, const Instr& i, Mask m) {
  fault(w, __builtin_ctz(m), "trap",
        i.flags == kCalls ? "a device assertion failed" : "the kernel executed a trap");
}

void nothing(Warp&, const Instr&, Mask) {}

// ---- barriers ----

enum BarrierFlags : uint8_t { kWaits = 1, kAnd = 2, kOr = 4, kPopc = 8 };

void complete_if_due(Cta& cta, Barrier& b) {
  if (!b.arrived) return;
  uint32_t due = b.expected;
  if (!due)
    due = kLanes * std::count_if(cta.warps.begin(), cta.warps.end(),
                                 [](const Warp& w) { return w.state != Warp::done; });
  if (b.arrived < due) return;
  Barrier finished;
  std::swap(finished, b);
  for (int index : finished.waiting) {
    Warp& w = cta.warps[index];
    w.state = Warp::ready;
    w.barrier = -1;
    w.clocks.join(finished.clocks);
    const Instr& i = *w.current;
    if (i.flags & kPopc) each(w.live, [&](int l) { w.at<uint32_t>(i.d)[l] = finished.votes; });
    if (i.flags & kAnd) w.set_predicate(i.d, w.live, finished.votes == finished.voters ? kAll : 0);
    if (i.flags & kOr) w.set_predicate(i.d, w.live, finished.votes ? kAll : 0);
  }
}

void arrive(Warp& w, const Instr& i, Mask m) {
  if (m != w.live)
    fault(w, __builtin_ctz(m), "divergent-barrier", "a barrier that only part of the warp has reached");
  const int lane = __builtin_ctz(m);
  const uint32_t id = w.at<uint32_t>(i.a)[lane], count = i.b == kNone ? 0 : w.at<uint32_t>(i.b)[lane];
  if (id >= w.cta->barriers.size()) fault(w, lane, "barrier", "no barrier " + std::to_string(id));
  Barrier& b = w.cta->barriers[id];
  if (count % kLanes) fault(w, lane, "barrier", "a thread count that is no multiple of 32");
  if (b.arrived && b.expected != count)
    fault(w, lane, "barrier", "barrier " + std::to_string(id) + " is in use with another thread count");
  b.expected = count;
  b.arrived += kLanes;
  b.clocks.join(w.release());
  if (i.c != kNone) {
    b.voters += __builtin_popcount(m);
    b.votes += __builtin_popcount((w.predicate(i.c) ^ (i.imm ? kAll : 0)) & m);
  }
  if (i.flags & kWaits) {
    b.waiting.push_back(w.index);
    w.barrier = static_cast<int>(id);
    w.state = Warp::waiting;
  }
  complete_if_due(*w.cta, b);
}

void warp_barrier(Warp& w, const Instr& i, Mask m) {
  const Mask members = w.at<uint32_t>(i.a)[__builtin_ctz(m)];
  if ((members & w.live & ~m) || (m & ~members))
    fault(w, __builtin_ctz(m), "divergent-barrier", "bar.warp.sync without all of its members");
}

// ---- decoding ----

void decode_branch(Decoder& d) {
  d.take("uni");
  d.out.run = branch;
  d.out.category = Category::branch;
  if (d.operand(0).kind != Operand::label) d.fail("unknown label");
  d.out.target = d.base + d.operand(0).index;
}

void decode_indexed_branch(Decoder& d) {
  if (!d.take("idx")) d.fail("only brx.idx is supported");
  d.take("uni");
  d.out.run = indexed_branch;
  d.out.category = Category::branch;
  d.out.flags = kIndexed;
  d.out.a = d.source(d.operand(0), Type::u32);
  auto targets = d.names.function->branch_targets.find(d.operand(1).name);
  if (targets == d.names.function->branch_targets.end()) d.fail("unknown branch targets");
  for (const Operand& t : targets->second) {
    if (t.kind != Operand::label) d.fail("unknown label '" + t.name + "'");
    d.out.list.push_back(d.base + t.index);
  }
}

void decode_call(Decoder& d) {
  d.take("uni");
  d.out.category = Category::branch;
  d.out.flags = kCalls;
  size_t at = 0;
  std::vector<Operand> results, params;
  if (d.operand(0).kind == Operand::vector) results = d.operand(at++).parts;
  const std::string name = d.operand(at++).name;
  if (at < d.operands()) params = d.elements(d.operand(at));
  if (name == "__assertfail") {
    d.out.run = trap;
    return;
  }
  const Names callee = d.builder.callee(name);
  d.builder.call_here(name);
  d.out.run = call;
  auto copies = [&](const std::vector<Operand>& here, const std::vector<Variable>& there, bool into) {
    if (here.size() != there.size()) d.fail("wrong number of parameters");
    d.out.list.push_back(static_cast<uint32_t>(here.size()));
    for (size_t i = 0; i < here.size(); ++i) {
      if (!d.names.addresses.count(here[i].name)) d.fail("a parameter that is no .param variable");
      uint32_t mine = static_cast<uint32_t>(d.names.addresses.at(here[i].name) - kLocalWindow);
      uint32_t theirs = static_cast<uint32_t>(callee.addresses.at(there[i].name) - kLocalWindow);
      for (uint32_t v : {into ? mine : theirs, into ? theirs : mine, static_cast<uint32_t>(there[i].size)})
        d.out.list.push_back(v);
    }
  };
  copies(params, callee.function->params, true);
  copies(results, callee.function->returns, false);
}

void decode_leave(Decoder& d) {
  d.take("uni");
  d.out.run = d.opcode() == "ret" ? ret : d.opcode() == "exit" ? exit_thread : trap;
  d.out.category = Category::branch;
  d.out.flags = kLeaves;
}

void decode_barrier(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::barrier;
  d.take("aligned"), d.take("cta");
  if (d.take("warp")) {
    if (!d.take("sync")) d.fail("unknown bar.warp");
    i.run = warp_barrier;
    i.a = d.source(d.operand(0), Type::u32);
    return;
  }
  i.run = arrive;
  if (d.take("cluster")) {  // a cluster of one CTA: its wait is a barrier of the CTA
    d.take_any({"acquire", "release", "relaxed"});
    if (d.take("arrive"))
      i.run = nothing;
    else if (!d.take("wait"))
      d.fail("unknown barrier.cluster");
    i.flags = kWaits;
    i.a = d.builder.constant(16, 4);
    return;
  }
  size_t at = 0;
  if (d.take("red")) {
    i.flags = d.take("popc") ? kPopc : d.take("and") ? kAnd : d.take("or") ? kOr : 0;
    if (!i.flags) d.fail("unknown reduction");
    d.type();
    i.d = i.flags & kPopc ? d.destination(d.operand(at++), 4) : d.predicate(d.operand(at++));
    i.flags |= kWaits;
    const Operand& vote = d.operand(d.operands() - 1);
    i.c = d.predicate(vote);
    i.imm = vote.negated;
  } else if (d.take("sync")) {
    i.flags = kWaits;
  } else if (!d.take("arrive")) {
    d.fail("unknown barrier");
  }
  i.a = d.source(d.operand(at), Type::u32);
  if (at + 1 < d.operands() - (i.c != kNone)) i.b = d.source(d.operand(at + 1), Type::u32);
}

void decode_hint(Decoder& d) {  // without effect on results
  d.take_all();
  d.out.run = nothing;
  d.out.category = Category::branch;
  d.out.flags = kCalls;
}

}  // namespace

void leave_barriers(Cta& cta) {
  for (Barrier& b : cta.barriers) complete_if_due(cta, b);
}

void step(Warp& w, int quantum) {
  Cta& cta = *w.cta;
  const std::vector<Instr>& code = cta.grid.kernel.code;
  w.yielded = false;
  while (quantum-- > 0 && w.state == Warp::ready && !w.yielded) {
    if (w.stack.empty()) {
      w.state = Warp::done;
      leave_barriers(cta);
      return;
    }
    Frame& f = w.stack.back();
    if (!f.mask || (f.pc == f.join && !f.call)) {
      w.stack.pop_back();
      continue;
    }
    if (f.call) {
      finish_call(w);
      continue;
    }
    ++cta.counters.executed[f.pc];
    const Instr& i = code[f.pc++];
    w.current = &i;
    Mask m = f.mask;
    if (i.guard != kNone) m &= i.guard_negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
    if (!w.products.empty()) check_pending_registers(w, i);
    if (m) i.run(w, i, m);
  }
}

void add_control(Table& t) {
  t["bra"] = decode_branch;
  t["brx"] = decode_indexed_branch;
  t["call"] = decode_call;
  t["ret"] = t["exit"] = t["trap"] = decode_leave;
  t["bar"] = t["barrier"] = decode_barrier;
  t["nanosleep"] = t["pmevent"] = decode_hint;
}

}  // namespace ptx
