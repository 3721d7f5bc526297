// ld, st, atom, red, and address conversion.
#include "access.h"

#include <algorithm>

#include "decode.h"

namespace ptx {

void addresses(Warp& w, const Instr& i, Mask m, uint64_t (&out)[kLanes]) {
  if (i.width == 8)
    each(m, [&](int l) { out[l] = w.at<uint64_t>(i.a)[l] + i.imm; });
  else
    each(m, [&](int l) {
      out[l] = static_cast<uint32_t>(w.at<uint32_t>(i.a)[l] + static_cast<uint32_t>(i.imm));
    });
}

Space space_of(uint64_t a) {
  auto in = [&](uint64_t window) { return a >= window && a < window + kWindow; };
  return in(kSharedWindow)  ? Space::shared
         : in(kLocalWindow) ? Space::local
         : in(kParamWindow) ? Space::param
                            : Space::global;
}

uint64_t within(Space space, uint64_t a) {
  return space == Space::shared && a >= kSharedWindow ? a - kSharedWindow : a;
}

namespace {

uint8_t* reach_global(Warp& w, int lane, uint64_t address, int bytes, Access access, bool strong) {
  GlobalMemory& memory = w.cta->grid.memory;
  Buffer* b = memory.find(address, bytes, w.cached_buffer);
  if (!b)
    fault(w, lane, "out-of-bounds",
          std::to_string(bytes) + " bytes of global memory, " + memory.describe(address), address);
  if (b->read_only && access != Access::read)
    fault(w, lane, "read-only", "writes " + memory.describe(address), address);
  if (!memory.touch(*b, address, bytes, strong && access == Access::write ? Access::atomic : access,
                    w.cta->id) &&
      !strong)
    fault(w, lane, "race", "another CTA of this launch accesses the same bytes, " + memory.describe(address),
          address);
  return reinterpret_cast<uint8_t*>(address);
}

}  // namespace

uint8_t* reach(Warp& w, int lane, Space space, uint64_t address, int bytes, int align, Access access,
               bool strong) {
  if (space == Space::generic) space = space_of(address);
  address = within(space, address);
  if (space == Space::shared)
    return w.cta->shared.access(w, lane, static_cast<uint32_t>(std::min<uint64_t>(address, ~0u)), bytes,
                                align, strong && access == Access::write ? Access::atomic : access);
  if (address % align)
    fault(w, lane, "misaligned", "the address is not a multiple of " + std::to_string(align), address);
  if (space == Space::global || space == Space::constant)
    return reach_global(w, lane, address, bytes, access, strong);
  const bool local = space == Space::local;
  const uint64_t offset = address - (local ? kLocalWindow : kParamWindow);
  const uint64_t size = local ? w.cta->grid.kernel.local_bytes : w.cta->grid.params.size();
  if (offset > size || offset + bytes > size)
    fault(w, lane, "out-of-bounds",
          std::string(local ? "local" : "parameter") + " memory has " + std::to_string(size) + " bytes",
          address);
  if (!local && access != Access::read) fault(w, lane, "read-only", "writes a kernel parameter", address);
  return local ? &w.local[size * lane + offset] : &w.cta->grid.params[offset];
}

void count_global(Warp& w, Mask m, const uint64_t (&address)[kLanes], int bytes, Access access) {
  uint64_t sectors[kLanes * 2];
  int n = 0;
  each(m, [&](int l) {
    for (uint64_t s = address[l] / kSector; s <= (address[l] + bytes - 1) / kSector; ++s)
      if (!n || sectors[n - 1] != s) sectors[n++] = s;
  });
  std::sort(sectors, sectors + n);
  const uint64_t unique = std::unique(sectors, sectors + n) - sectors;
  Counters& c = w.cta->counters;
  (access == Access::read ? c.global_load_requests : c.global_store_requests) += 1;
  (access == Access::read ? c.global_load_sectors : c.global_store_sectors) += unique;
}

// 32 banks of 4 bytes. A request of 8 (16) bytes a lane goes in halves (quarters) of the warp; in each of
// them the bank with the most distinct words says how many wavefronts it takes. One per part is ideal, the
// rest are conflicts.
void count_shared(Warp& w, Mask m, const uint64_t (&address)[kLanes], int bytes) {
  const int lanes = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8, words = (bytes + 3) / 4;
  uint64_t ideal = 0, wavefronts = 0;
  for (int first = 0; first < kLanes; first += lanes) {
    Mask part = m & ((lanes == 32 ? kAll : (1u << lanes) - 1) << first);
    if (!part) continue;
    uint32_t seen[32][32];
    int count[32] = {};
    int worst = 1;
    for (; part; part &= part - 1) {
      const uint32_t word = static_cast<uint32_t>(address[__builtin_ctz(part)]) / 4;
      for (uint32_t k = word; k < word + words; ++k) {
        uint32_t* bank = seen[k % 32];
        int& n = count[k % 32];
        if (std::find(bank, bank + n, k) == bank + n) bank[n++] = k, worst = std::max(worst, n);
      }
    }
    ++ideal;
    wavefronts += worst;
  }
  Counters& c = w.cta->counters;
  ++c.shared_requests;
  c.shared_wavefronts += wavefronts;
  c.shared_conflicts += wavefronts - ideal;
}

namespace {

constexpr int kMostBytes = 32;  // of one lane's store

void count(Warp& w, const Instr& i, Mask m, const uint64_t (&address)[kLanes], int bytes, Access access) {
  const Space s = i.space != Space::generic ? i.space : space_of(address[__builtin_ctz(m)]);
  if (s == Space::global) count_global(w, m, address, bytes, access);
  if (s == Space::shared) count_shared(w, m, address, bytes);
}

uint64_t extend(uint64_t v, int bytes, bool sign) {
  const int shift = 64 - 8 * bytes;
  return sign ? static_cast<uint64_t>(static_cast<int64_t>(v << shift) >> shift) : v;
}

// Instr::list has the registers, i.imm2 their width; i.bytes is one element's size in memory.
void load(Warp& w, const Instr& i, Mask m) {
  uint64_t address[kLanes];
  addresses(w, i, m, address);
  const int bytes = i.bytes * static_cast<int>(i.list.size());
  const bool sign = is_signed(i.type);
  each(m, [&](int l) {
    const uint8_t* p = reach(w, l, i.space, address[l], bytes, bytes, Access::read, i.strong);
    for (uint32_t reg : i.list) {
      uint64_t v = 0;
      std::memcpy(&v, p, i.bytes);
      p += i.bytes;
      w.set(reg, i.element_width, l, extend(v, i.bytes, sign));
    }
  });
  count(w, i, m, address, bytes, Access::read);
}

void store(Warp& w, const Instr& i, Mask m) {
  uint64_t address[kLanes];
  addresses(w, i, m, address);
  const int bytes = i.bytes * static_cast<int>(i.list.size());
  each(m, [&](int l) {
    uint8_t data[kMostBytes];
    uint8_t* end = data;
    for (uint32_t reg : i.list) {
      const uint64_t v = w.get(reg, i.element_width, l);
      std::memcpy(end, &v, i.bytes);
      end += i.bytes;
    }
    const Space space = i.space == Space::generic ? space_of(address[l]) : i.space;
    const bool repeats =
        space == Space::shared && w.cta->shared.holds(within(space, address[l]), bytes, data);
    const Access access = repeats ? Access::rewrite : Access::write;
    std::memcpy(reach(w, l, i.space, address[l], bytes, bytes, access, i.strong), data, bytes);
  });
  count(w, i, m, address, bytes, Access::write);
}

void load_param(Warp& w, const Instr& i,
                Mask m) {  // a kernel parameter at a constant address: the same for all lanes
  uint64_t at = w.at<uint64_t>(i.a)[0] + i.imm;
  for (uint32_t reg : i.list) {
    uint64_t v = 0;
    std::memcpy(&v, reach(w, 0, Space::param, at, i.bytes, i.bytes, Access::read, false), i.bytes);
    at += i.bytes;
    v = extend(v, i.bytes, is_signed(i.type));
    each(m, [&](int l) { w.set(reg, i.element_width, l, v); });
  }
}

void take_memory_hints(Decoder& d) {
  d.out.strong = !d.take_any({"volatile", "relaxed", "acquire", "release", "acq_rel"}).empty();
  d.take("weak"), d.take("sys"), d.take("gpu"), d.take("cta"), d.take("cluster");
  d.take("nc"), d.take("ca"), d.take("cg"), d.take("cs"), d.take("cv"), d.take("lu"), d.take("wb"),
      d.take("wt");
  d.take("unified"), d.take("noftz");
  while (!d.take_prefix("L1::").empty() || !d.take_prefix("L2::").empty()) {
  }
}

Space take_space(Decoder& d) {
  const std::string s = d.take_any({"global", "shared", "shared::cta", "shared::cluster", "local", "const",
                                    "param", "param::entry", "param::func"});
  return s.empty()       ? Space::generic
         : s == "global" ? Space::global
         : s[0] == 's'   ? Space::shared
         : s == "local"  ? Space::local
         : s == "const"  ? Space::constant
                         : Space::param;
}

void decode_access(Decoder& d) {
  Instr& i = d.out;
  const bool loads = d.opcode() == "ld" || d.opcode() == "ldu";
  i.space = take_space(d);
  take_memory_hints(d);
  const std::string vec = d.take_any({"v2", "v4", "v8"});
  i.type = d.type();
  i.bytes = static_cast<uint8_t>(bytes_of(i.type));
  d.address(d.operand(loads ? 1 : 0), i);
  const std::vector<Operand> elements = d.elements(d.operand(loads ? 0 : 1));
  if (elements.size() != (vec.empty() ? 1u : static_cast<unsigned>(vec[1] - '0')))
    d.fail("wrong number of elements");
  i.element_width = i.bytes;
  for (const Operand& o : elements)
    if (o.kind == Operand::reg) i.element_width = static_cast<uint8_t>(d.width_of(o));
  if (i.element_width < i.bytes || i.element_width > 8)
    d.fail("a register of another width than the element");
  for (const Operand& o : elements) {
    if (loads)
      i.list.push_back(d.destination(o, i.element_width));
    else
      i.list.push_back(d.source(o, i.element_width, i.type));
  }
  const bool shared = i.space == Space::shared, local = i.space == Space::local;
  i.run = loads ? load : store;
  i.category = local    ? Category::local
               : shared ? (loads ? Category::load_shared : Category::store_shared)
               : loads  ? Category::load_global
                        : Category::store_global;
  if (i.space == Space::param || i.space == Space::constant) i.category = Category::load_param;
  if (i.space == Space::param && loads && d.operand(1).parts[0].kind == Operand::symbol) i.run = load_param;
}

// ---- atomics ----

template <class T>
T combine(const std::string& op, T old, T b, T c) {
  if (op == "exch") return b;
  if (op == "cas") return old == b ? c : old;
  if (op == "add") return old + b;
  if (op == "min") return std::min(old, b);
  if (op == "max") return std::max(old, b);
  if constexpr (std::is_integral<T>::value) {
    if (op == "and") return old & b;
    if (op == "or") return old | b;
    if (op == "xor") return old ^ b;
    if (op == "inc") return old >= b ? 0 : old + 1;
    if (op == "dec") return old == 0 || old > b ? b : old - 1;
  }
  return old;
}

template <class H>
uint16_t combine_half(const std::string& op, uint16_t old, uint16_t b) {
  return H::of(combine<double>(op, H{old}.value(), H{b}.value(), 0)).bits;
}

uint64_t update(const Instr& i, uint64_t old, uint64_t b, uint64_t c) {
  static const char* const kOps[] = {"exch", "cas", "add", "min", "max", "and", "or", "xor", "inc", "dec"};
  const std::string op = kOps[i.flags];
  auto pair = [&](auto half) {
    using H = decltype(half);
    return combine_half<H>(op, old & 0xffff, b & 0xffff) |
           uint64_t{combine_half<H>(op, old >> 16 & 0xffff, b >> 16 & 0xffff)} << 16;
  };
  switch (i.type) {
    case Type::f16:
      return combine_half<Half>(op, static_cast<uint16_t>(old), static_cast<uint16_t>(b));
    case Type::bf16:
      return combine_half<BFloat>(op, static_cast<uint16_t>(old), static_cast<uint16_t>(b));
    case Type::f16x2:
      return pair(Half());
    case Type::bf16x2:
      return pair(BFloat());
    case Type::f32: {
      auto f = [](uint64_t v) { return bits_as<float>(static_cast<uint32_t>(v)); };
      return bits_as<uint32_t>(combine<float>(op, f(old), f(b), f(c)));
    }
    case Type::f64:
      return bits_as<uint64_t>(
          combine<double>(op, bits_as<double>(old), bits_as<double>(b), bits_as<double>(c)));
    case Type::s32:
      return static_cast<uint32_t>(
          combine<int32_t>(op, static_cast<int32_t>(old), static_cast<int32_t>(b), static_cast<int32_t>(c)));
    case Type::s64:
      return static_cast<uint64_t>(
          combine<int64_t>(op, static_cast<int64_t>(old), static_cast<int64_t>(b), static_cast<int64_t>(c)));
    case Type::b16:
      return combine<uint16_t>(op, static_cast<uint16_t>(old), static_cast<uint16_t>(b),
                               static_cast<uint16_t>(c));
    case Type::u64:
    case Type::b64:
      return combine<uint64_t>(op, old, b, c);
    default:
      return combine<uint32_t>(op, static_cast<uint32_t>(old), static_cast<uint32_t>(b),
                               static_cast<uint32_t>(c));
  }
}

// Lane by lane, as the hardware orders lanes that hit one address in some order too. Lists: the operands of a
// vector.
void atomic(Warp& w, const Instr& i, Mask m) {
  uint64_t address[kLanes];
  addresses(w, i, m, address);
  const int bytes = i.bytes * static_cast<int>(i.list.size());
  std::unique_lock<std::mutex> lock(w.cta->grid.atomics, std::defer_lock);
  if (i.space != Space::shared) lock.lock();
  each(m, [&](int l) {
    uint8_t* p = reach(w, l, i.space, address[l], bytes, bytes, Access::atomic, true);
    for (size_t k = 0; k < i.list.size(); ++k, p += i.bytes) {
      uint64_t old = 0;
      std::memcpy(&old, p, i.bytes);
      const uint64_t fresh =
          update(i, old, w.get(i.list[k], i.bytes, l), i.c == kNone ? 0 : w.get(i.c, i.bytes, l));
      std::memcpy(p, &fresh, i.bytes);
      if (i.d != kNone) w.set(i.d, i.bytes, l, old);
    }
  });
  count(w, i, m, address, bytes, Access::atomic);
}

void decode_atomic(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::atomic;
  i.space = take_space(d);
  take_memory_hints(d);
  const char* ops[] = {"exch", "cas", "add", "min", "max", "and", "or", "xor", "inc", "dec"};
  const std::string op = d.take_any({"exch", "cas", "add", "min", "max", "and", "or", "xor", "inc", "dec"});
  i.flags = static_cast<uint8_t>(std::find(ops, ops + 10, op) - ops);
  if (i.flags == 10) d.fail("unknown atomic operation");
  const std::string vec = d.take_any({"v2", "v4", "v8"});
  i.type = d.type();
  i.bytes = static_cast<uint8_t>(bytes_of(i.type));
  if (i.bytes < 2 || i.bytes > 8) d.fail("this atomic type is not supported");
  size_t at = 0;
  if (d.opcode() == "atom") {
    if (!vec.empty()) d.fail("a vector atom is not supported; a vector red is");
    i.d = d.destination(d.operand(at++), i.bytes);
  }
  d.address(d.operand(at++), i);
  for (const Operand& o : d.elements(d.operand(at++))) i.list.push_back(d.source(o, i.bytes, i.type));
  if (op == "cas") i.c = d.source(d.operand(at++), i.bytes, i.type);
  i.run = atomic;
}

// ---- address conversion ----

void shift_window(Warp& w, const Instr& i, Mask m) {
  each(m, [&](int l) { w.set(i.d, i.bytes, l, w.get(i.a, i.bytes, l) + static_cast<uint64_t>(i.imm)); });
}

void decode_cvta(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::move;
  const bool to = d.take("to");
  const Space space = take_space(d);
  const Type t = d.type();
  i.bytes = static_cast<uint8_t>(bytes_of(t));
  i.d = d.destination(d.operand(0), i.bytes);
  i.a = d.source(d.operand(1), t);
  const uint64_t window =
      space == Space::shared ? kSharedWindow : 0;  // the other spaces use generic addresses
  i.imm = static_cast<int64_t>(to ? ~window + 1 : window);
  i.run = shift_window;
}

void is_space(Warp& w, const Instr& i, Mask m) {
  Mask r = 0;
  each(m, [&](int l) { r |= static_cast<Mask>(space_of(w.get(i.a, 8, l)) == i.space) << l; });
  w.set_predicate(i.d, m, r);
}

void decode_isspacep(Decoder& d) {
  d.out.space = take_space(d);
  d.out.d = d.predicate(d.operand(0));
  d.out.a = d.source(d.operand(1), 8);
  d.out.run = is_space;
  d.out.category = Category::predicate;
}

void nothing(Warp&, const Instr&, Mask) {}

void decode_prefetch(Decoder& d) {  // a hint, but its operands are decoded
  take_space(d);
  d.take("tensormap");
  d.take_any({"L1", "L2"}), d.take_prefix("L2::"), d.take_prefix("level::");
  Instr scratch;
  d.address(d.operand(0), scratch);
  d.out.run = nothing;
  d.out.category = Category::fence;
}

void proxy_fence(Warp& w, const Instr&, Mask) { w.proxy_fence(); }

void decode_fence(Decoder& d) {
  d.out.run = nothing;
  d.out.category = Category::fence;
  if (d.take("proxy")) {
    if (d.take("async"))
      d.out.run = proxy_fence;
    else if (!d.take("alias"))
      d.fail("this proxy fence is not supported");
    d.take_any({"global", "shared::cta", "shared::cluster"});
    return;
  }
  d.take("mbarrier_init");
  d.take_any({"sc", "acq_rel", "acquire", "release"});
  d.take_any({"cta", "cluster", "gpu", "gl", "sys"});
}

void decode_mapa(Decoder& d) {  // the cluster has one CTA: every address is its own
  take_space(d);
  const Type t = d.type();
  d.out.bytes = static_cast<uint8_t>(bytes_of(t));
  d.out.d = d.destination(d.operand(0), d.out.bytes);
  d.out.a = d.source(d.operand(1), t);
  d.out.run = shift_window;
  d.out.category = Category::move;
}

}  // namespace

void add_memory(Table& t) {
  t["ld"] = t["ldu"] = t["st"] = decode_access;
  t["atom"] = t["red"] = decode_atomic;
  t["cvta"] = decode_cvta;
  t["isspacep"] = decode_isspacep;
  t["prefetch"] = t["prefetchu"] = decode_prefetch;
  t["membar"] = t["fence"] = decode_fence;
  t["mapa"] = decode_mapa;
}

}  // namespace ptx
