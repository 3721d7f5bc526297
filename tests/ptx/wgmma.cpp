// wgmma: the warpgroup products of sm_90, their shared-memory descriptors, and results that are not there
// before the wait.
#include <algorithm>
#include <cstdio>

#include "decode.h"
#include "product.h"

namespace ptx {
namespace {

struct GroupProduct {
  int n, k;
  Type a, b, d;
  bool saturate, a_in_registers, a_mn_major, b_mn_major, negate_a, negate_b;
};

// One operand in shared memory. The unit is the chunk of 16 bytes; eight of them, one of each of eight lines,
// make a core matrix. Swizzling XORs the chunk's place in its line with the line's number, on the final
// address.
struct Descriptor {
  uint32_t start, leading, stride, line;  // in bytes; line: 16 (no swizzle), 32, 64 or 128

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    constexpr uint32_t kLines[] = {16, 128, 64, 32};
    line = kLines[bits >> 62];
  }

  // The address of an element: `minor` runs along the row (or column) of the output, k along the sum.
  uint32_t address(bool mn_major, uint32_t minor, uint32_t k, uint32_t bytes) const {
    const uint32_t chunk = 16 / bytes;  // elements
    uint32_t at;
    if (!mn_major) {
      at =
          minor % 8 * line + minor / 8 * stride + k % chunk * bytes + k / chunk * (line == 16 ? leading : 16);
    } else if (line == 16) {
      at = minor % chunk * bytes + minor / chunk * stride + k % 8 * 16 + k / 8 * leading;
    } else {
      const uint32_t span = line / bytes;  // elements
      at = minor % span * bytes + minor / span * leading + k % 8 * line + k / 8 * stride;
    }
    at += start;
    return at ^ ((at >> 7 & (line / 16 - 1)) << 4);
  }
};

using Reads = std::vector<std::pair<uint32_t, uint32_t>>;

// A tile through its descriptor into out[row][column]; the chunks are held against writers until the wait.
void fetch(Warp& w, uint64_t bits, bool mn_major, Type type, int first, int lines, int k, bool transpose,
           Reads& reads, float* out_float, int32_t* out_int) {
  const Descriptor descriptor(bits);
  const uint32_t bytes = bytes_of(type), chunk = 16 / bytes;
  const int outer = mn_major ? k : lines, inner = mn_major ? lines : k;
  for (int o = 0; o < outer; ++o)
    for (int i = 0; i < inner; i += chunk) {
      const uint32_t line = first + (mn_major ? i : o), depth = mn_major ? o : i;
      const uint32_t at = descriptor.address(mn_major, line, depth, bytes);
      const uint8_t* p = w.cta->shared.hold(w, -1, at, 16);
      reads.emplace_back(at, 16);
      for (uint32_t e = 0; e < chunk; ++e) {
        uint64_t element = 0;
        std::memcpy(&element, p + e * bytes, bytes);
        const int r = mn_major ? i + e : o, c = mn_major ? o : i + e;
        const int index = transpose ? c * lines + r : r * k + c;
        if (out_int)
          out_int[index] = static_cast<int32_t>(tensor_element(type, element));
        else
          out_float[index] = static_cast<float>(tensor_element(type, element));
      }
    }
}

// Accumulator element i of lane 4 g + t: row g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2 of the warp's
// 16 rows.
uint8_t* accumulator(Warp& w, const Instr& i, const GroupProduct& p, int index, int lane) {
  const bool half = p.d == Type::f16;
  std::vector<uint8_t>& lanes = w.accumulators.at(i.list[half ? index / 2 : index]);
  return lanes.data() + lane * 4 + (half ? index % 2 * 2 : 0);
}

void accumulate(Warp& w, const Instr& i, const GroupProduct& p, float* c_float, int32_t* c_int, bool store) {
  for (int index = 0; index < p.n / 2; ++index)
    for (int l = 0; l < kLanes; ++l) {
      const int at = (l / 4 + 8 * (index / 2 % 2)) * p.n + 8 * (index / 4) + 2 * (l % 4) + index % 2;
      uint8_t* value = accumulator(w, i, p, index, l);
      if (p.d == Type::f16) {
        uint16_t h;
        if (store)
          h = static_cast<uint16_t>(HalfFormat::encode(c_float[at])), std::memcpy(value, &h, 2);
        else
          std::memcpy(&h, value, 2), c_float[at] = half_to_float(h);
      } else {
        void* element = p.d == Type::s32 ? static_cast<void*>(c_int + at) : c_float + at;
        if (store)
          std::memcpy(value, element, 4);
        else
          std::memcpy(element, value, 4);
      }
    }
}

void fragment(Warp& w, const uint32_t* regs, const GroupProduct& p, float* a_float, int32_t* a_int) {
  const int bytes = bytes_of(p.a), per = 4 / bytes;
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < per; ++e) {
        const int index = (l / 4 + 8 * (r % 2)) * p.k + 4 * per * (r / 2) + per * (l % 4) + e;
        const uint64_t word = w.get(regs[r], 4, l) >> (8 * bytes * e);
        const double value = tensor_element(p.a, bytes == 4 ? word : word & ((1u << (8 * bytes)) - 1));
        if (a_int)
          a_int[index] = static_cast<int32_t>(value);
        else
          a_float[index] = static_cast<float>(value);
      }
}

void wgmma(Warp& w, const Instr& i, Mask m) {
  if (m != kAll) fault(w, 0, "divergent-warp", "wgmma needs all 32 lanes");
  if (!w.product_fence) fault(w, 0, "unfenced", "a wgmma before any wgmma.fence");
  const GroupProduct& p = *static_cast<const GroupProduct*>(i.shape.get());
  const bool integer = p.d == Type::s32;
  const size_t in_d = p.n / (p.d == Type::f16 ? 4 : 2);
  PendingProduct pending{w.product_group, {i.list.begin(), i.list.begin() + in_d}, {}};
  for (uint32_t reg : pending.registers)
    if (!w.accumulators.count(reg)) w.accumulators[reg].assign(w.file + reg, w.file + reg + 4 * kLanes);

  std::vector<float> a(16 * p.k), b(p.k * p.n), c(16 * p.n);
  std::vector<int32_t> ia(integer ? 16 * p.k : 0), ib(integer ? p.k * p.n : 0), ic(integer ? 16 * p.n : 0);
  int32_t *pa = integer ? ia.data() : nullptr, *pb = integer ? ib.data() : nullptr;
  if (p.a_in_registers)
    fragment(w, &i.list[in_d], p, a.data(), pa);
  else
    fetch(w, w.at<uint64_t>(i.a)[0], p.a_mn_major, p.a, w.index % 4 * 16, 16, p.k, false, pending.reads,
          a.data(), pa);
  fetch(w, w.at<uint64_t>(i.b)[0], p.b_mn_major, p.b, 0, p.n, p.k, true, pending.reads, b.data(), pb);
  if (w.predicate(i.c) & 1) accumulate(w, i, p, c.data(), ic.data(), false);  // scale-d
  if (p.negate_a != p.negate_b)
    for (float& x : a) x = -x;
  if (integer)
    integer_product(16, p.n, p.k, p.saturate, pa, pb, ic.data());
  else
    float_product(p.a, p.d, 16, p.n, p.k, a.data(), b.data(), c.data());
  accumulate(w, i, p, c.data(), ic.data(), true);
  w.products.push_back(std::move(pending));
  w.cta->counters.flops += uint64_t{2} * 16 * p.n * p.k;
}

void commit(Warp& w, const Instr&, Mask) { ++w.product_group; }

void wait(Warp& w, const Instr& i, Mask) {
  std::vector<PendingProduct> finished, rest;
  for (PendingProduct& p : w.products)
    (int64_t{p.group} + i.imm < w.product_group ? finished : rest).push_back(std::move(p));
  w.products = std::move(rest);
  auto pending = [&](uint32_t reg) {
    return std::any_of(w.products.begin(), w.products.end(), [&](const PendingProduct& p) {
      return std::find(p.registers.begin(), p.registers.end(), reg) != p.registers.end();
    });
  };
  for (const PendingProduct& p : finished) {
    for (auto& [address, bytes] : p.reads) w.cta->shared.unhold(address, static_cast<int>(bytes));
    for (uint32_t reg : p.registers) {
      auto value = w.accumulators.find(reg);
      if (value == w.accumulators.end() || pending(reg)) continue;
      std::copy(value->second.begin(), value->second.end(), w.file + reg);
      w.accumulators.erase(value);
    }
  }
}

void fence(Warp& w, const Instr&, Mask) { w.product_fence = true; }

void nothing(Warp&, const Instr&, Mask) {}

void decode_product(Decoder& d) {
  Instr& i = d.out;
  auto p = std::make_shared<GroupProduct>();
  int m = 0;
  const std::string shape = d.take_prefix("m");
  if (std::sscanf(shape.c_str(), "m%dn%dk%d", &m, &p->n, &p->k) != 3 || m != 64) d.fail("no shape m64nNkK");
  p->saturate = d.take("satfinite");
  p->d = d.type(), p->a = d.type(), p->b = d.type();
  if (p->k * bytes_of(p->a) != 32 || p->n % 8 || p->n > 256) d.fail("this wgmma shape is not supported");
  for (const Operand& o : d.elements(d.operand(0))) i.list.push_back(d.destination(o, 4));
  if (i.list.size() != static_cast<size_t>(p->n / (p->d == Type::f16 ? 4 : 2)))
    d.fail("wrong number of accumulators");
  i.registers.clear();  // those below must not be in flight; the accumulators may
  p->a_in_registers = d.operand(1).kind == Operand::vector;
  if (p->a_in_registers)
    for (const Operand& o : d.operand(1).parts) i.list.push_back(d.source(o, Type::b32));
  else
    i.a = d.source(d.operand(1), Type::b64);
  i.b = d.source(d.operand(2), Type::b64);
  i.c = d.predicate(d.operand(3));
  auto flag = [&](size_t at) { return at < d.operands() ? d.integer(d.operand(at)) : 0; };
  if (p->d != Type::s32) p->negate_a = flag(4) == -1, p->negate_b = flag(5) == -1;
  if (!p->a_in_registers) p->a_mn_major = flag(6) == 1;
  p->b_mn_major = flag(p->a_in_registers ? 6 : 7) == 1;
  if (bytes_of(p->a) != 2 && (p->a_mn_major || p->b_mn_major))
    d.fail("only 16-bit operands can be transposed");
  i.shape = p;
  i.run = wgmma;
}

void decode_wgmma(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::mma;
  d.take("sync"), d.take("aligned");
  if (d.take("mma_async")) return decode_product(d);
  i.category = Category::fence;
  if (d.take("fence")) {
    i.run = fence;
  } else if (d.take("commit_group")) {
    i.run = commit;
  } else if (d.take("wait_group")) {
    i.run = wait;
    i.imm = d.integer(d.operand(0));
  } else {
    d.fail("unknown wgmma instruction");
  }
}

void decode_setmaxnreg(Decoder& d) {
  d.take_all();
  d.out.run = nothing;
  d.out.category = Category::fence;
}

}  // namespace

void check_pending_registers(Warp& w, const Instr& i) {
  for (uint32_t reg : i.registers)
    for (const PendingProduct& p : w.products)
      if (std::find(p.registers.begin(), p.registers.end(), reg) != p.registers.end())
        fault(w, -1, "pending", "uses a register that a wgmma not yet waited for will write");
}

void add_wgmma(Table& t) {
  t["wgmma"] = decode_wgmma;
  t["setmaxnreg"] = decode_setmaxnreg;
}

}  // namespace ptx
