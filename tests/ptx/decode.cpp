#include "decode.h"

#include <algorithm>

namespace ptx {
namespace {

const Table& opcodes() {
  static const Table table = [] {
    Table t;
    for (auto add : {add_integer, add_floating, add_moves, add_conversions, add_memory, add_control, add_warp,
                     add_tensor, add_async, add_mbarrier, add_wgmma})
      add(t);
    return t;
  }();
  return table;
}

const std::map<std::string, Special> kSpecials = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%dynamic_smem_size", Special::dynamic_smem_size},
    {"%total_smem_size", Special::total_smem_size},
    // a cluster is one CTA
    {"%clusterid.x", Special::ctaid_x},
    {"%clusterid.y", Special::ctaid_y},
    {"%clusterid.z", Special::ctaid_z},
    {"%nclusterid.x", Special::nctaid_x},
    {"%cluster_ctaid.x", Special::zero},
    {"%cluster_ctaid.y", Special::zero},
    {"%cluster_ctaid.z", Special::zero},
    {"%cluster_ctarank", Special::zero},
    {"%cluster_nctaid.x", Special::one},
    {"%cluster_nctaid.y", Special::one},
    {"%cluster_nctaid.z", Special::one},
    {"%cluster_nctarank", Special::one},
};

uint64_t align_up(uint64_t x, uint64_t a) { return (x + a - 1) / a * a; }

}  // namespace

const char* const kCategoryNames[] = {
    "integer",      "floating",    "half",         "convert",    "move",       "predicate", "load_global",
    "store_global", "load_shared", "store_shared", "load_param", "local",      "atomic",    "branch",
    "barrier",      "warp",        "ldmatrix",     "mma",        "async_copy", "fence"};

// ---- Decoder ----

Decoder::Decoder(KernelBuilder& b, Names& n, const Statement& s, Instr& i, uint32_t first)
    : out(i), builder(b), names(n), base(first), s_(s), left_(s.mods) {}

void Decoder::fail(const std::string& what) const {
  throw SyntaxError("PTX line " + std::to_string(s_.line) + ": " + what + " in '" +
                    builder.module().program().lines.at(s_.line) + "'");
}

bool Decoder::take(const std::string& mod) {
  auto at = std::find(left_.begin(), left_.end(), mod);
  if (at == left_.end()) return false;
  left_.erase(at);
  return true;
}

std::string Decoder::take_any(std::initializer_list<const char*> mods) {
  for (const char* m : mods)
    if (take(m)) return m;
  return "";
}

std::string Decoder::take_prefix(const std::string& prefix) {
  for (const std::string& m : left_) {
    if (m.compare(0, prefix.size(), prefix)) continue;
    std::string found = m;
    take(found);
    return found;
  }
  return "";
}

Type Decoder::type() {
  for (const std::string& m : left_) {
    Type t = type_named(m);
    if (t == Type::none) continue;
    take(std::string(m));
    return t;
  }
  fail("no type");
}

Round Decoder::rounding() {
  std::string r = take_any({"rna", "rn", "rz", "rm", "rp"});
  return r == "rz"    ? Round::zero
         : r == "rm"  ? Round::down
         : r == "rp"  ? Round::up
         : r == "rna" ? Round::nearest_away
                      : Round::nearest_even;
}

void Decoder::expect_no_mods_left() const {
  if (!left_.empty()) fail("unknown modifier '." + left_.front() + "'");
}

const Operand& Decoder::operand(size_t i) const {
  if (i >= s_.operands.size()) fail("operand " + std::to_string(i + 1) + " is missing");
  return s_.operands[i];
}

int64_t Decoder::integer(const Operand& o) const {
  if (o.kind != Operand::integer) fail("expected an integer constant");
  return static_cast<int64_t>(o.value);
}

int Decoder::width_of(const Operand& o) const {
  return o.kind == Operand::reg ? bytes_of(names.function->registers[o.index]) : 0;
}

uint64_t Decoder::immediate(const Operand& o, int width, Type type) const {
  if (o.kind == Operand::integer) {
    if (is_float(type) && width == 8)
      return bits_as<uint64_t>(static_cast<double>(static_cast<int64_t>(o.value)));
    return o.value;
  }
  if (o.kind == Operand::f32 && width == 4) return o.value;
  if (o.kind == Operand::f64 && width == 8) return o.value;
  if (o.kind == Operand::f64 && width == 4)
    return bits_as<uint32_t>(static_cast<float>(bits_as<double>(o.value)));
  fail("an immediate of another width than the instruction's");
}

uint32_t Decoder::source(const Operand& o, Type type) { return source(o, bytes_of(type), type); }

uint32_t Decoder::source(const Operand& o, int width, Type type) {
  switch (o.kind) {
    case Operand::reg:
      if (o.negated) fail("a negated operand where none is allowed");
      if (width_of(o) != width)
        fail("register " + o.name + " has " + std::to_string(width_of(o)) + " bytes, the instruction takes " +
             std::to_string(width));
      out.registers.push_back(names.registers[o.index]);
      return names.registers[o.index];
    case Operand::special:
      return builder.special(o.name, width);
    case Operand::symbol: {
      auto a = names.addresses.find(o.name);
      if (a == names.addresses.end()) fail("unknown name '" + o.name + "'");
      return builder.constant(a->second + o.value, width);
    }
    case Operand::sink:
      fail("'_' as a source");
    default:
      return builder.constant(immediate(o, width, type), width);
  }
}

uint32_t Decoder::destination(const Operand& o, int width) {
  if (o.kind == Operand::sink) return builder.allocate(width);
  if (o.kind != Operand::reg) fail("the destination is no register");
  return source(o, width);
}

uint32_t Decoder::predicate(const Operand& o) {
  if (o.kind == Operand::sink) return builder.allocate(4);
  if (o.kind == Operand::integer) return builder.constant(o.value ? ~uint64_t{0} : 0, 4);
  if (o.kind != Operand::reg || names.function->registers[o.index] != Type::pred)
    fail("expected a predicate");
  out.registers.push_back(names.registers[o.index]);
  return names.registers[o.index];
}

std::vector<Operand> Decoder::elements(const Operand& o) const {
  return o.kind == Operand::vector ? o.parts : std::vector<Operand>{o};
}

void Decoder::address(const Operand& o, Instr& i) {
  if (o.kind != Operand::address) fail("expected an address");
  const Operand& at = o.parts[0];
  i.imm = static_cast<int64_t>(o.value);
  if (at.kind == Operand::symbol) {
    auto a = names.addresses.find(at.name);
    if (a == names.addresses.end()) fail("unknown name '" + at.name + "'");
    if (i.space == Space::param) i.space = names.spaces.at(at.name);
    i.a = builder.constant(a->second + at.value, 8);
    i.width = 8;
  } else if (at.kind == Operand::integer) {
    i.a = builder.constant(at.value, 8);
    i.width = 8;
  } else {
    i.width = static_cast<uint8_t>(width_of(at));
    if (i.width != 4 && i.width != 8) fail("an address register of 4 or 8 bytes is needed");
    i.a = source(at, i.width);
  }
}

// ---- KernelBuilder ----

KernelBuilder::KernelBuilder(const Module& module, const std::string& name) : module_(module) {
  auto f = module.program().functions.find(name);
  if (f == module.program().functions.end() || !f->second.entry)
    throw SyntaxError("no kernel named '" + name + "'");
  kernel_.name = name;
  kernel_.program = &module.program();
  kernel_.required_threads = f->second.required_threads;
  kernel_.max_threads = f->second.max_threads;
}

Kernel KernelBuilder::build() {
  const auto& functions = module_.program().functions;
  declare(functions.at(kernel_.name));
  for (size_t i = 0; i < order_.size(); ++i) emit(functions.at(order_[i]));  // grows as calls are met
  for (auto& [at, name] : calls_) kernel_.code[at].target = entries_.at(name);
  for (size_t i = 0; i < order_.size(); ++i)
    join_branches(entries_.at(order_[i]), i + 1 < order_.size() ? entries_.at(order_[i + 1])
                                                                : static_cast<uint32_t>(kernel_.code.size()));
  return std::move(kernel_);
}

uint32_t KernelBuilder::allocate(int width) {
  auto& file = kernel_.registers;
  uint32_t offset = static_cast<uint32_t>(align_up(file.size(), 64));
  file.resize(offset + kLanes * std::max(width, 4), 0xff);  // poison: a NaN, or -1
  return offset;
}

uint32_t KernelBuilder::constant(uint64_t bits, int width) {
  if (width < 8) bits &= (uint64_t{1} << (8 * width)) - 1;
  auto [at, fresh] = constants_.try_emplace({bits, width}, 0);
  if (fresh) {
    at->second = allocate(width);
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(&kernel_.registers[at->second + lane * width], &bits, std::min(width, 8));
  }
  return at->second;
}

uint32_t KernelBuilder::special(const std::string& name, int width) {
  auto s = kSpecials.find(name);
  if (s == kSpecials.end()) throw SyntaxError("unknown special register '" + name + "'");
  if (width != 4)
    throw SyntaxError("special register '" + name + "' has 4 bytes, not " + std::to_string(width));
  for (auto& [special, offset] : kernel_.specials)
    if (special == s->second) return offset;
  kernel_.specials.emplace_back(s->second, allocate(4));
  return kernel_.specials.back().second;
}

const Names& KernelBuilder::callee(const std::string& name) {
  auto f = module_.program().functions.find(name);
  if (f == module_.program().functions.end() || !f->second.defined)
    throw SyntaxError("call of '" + name + "', which has no body here");
  return names_.count(name) ? names_.at(name) : declare(f->second);
}

// Gives a variable its address. Shared and local memory are laid out here, for this kernel alone.
void KernelBuilder::place(Names& names, const Variable& v, bool entry_param) {
  auto put = [&](Space space, uint64_t address) {
    names.spaces[v.name] = space;
    names.addresses[v.name] = address;
    names.sizes[v.name] = static_cast<uint32_t>(v.size);
  };
  auto extend = [&](uint32_t& top) {
    uint32_t at = static_cast<uint32_t>(align_up(top, v.align));
    top = at + static_cast<uint32_t>(v.size);
    return at;
  };
  if (entry_param) {
    kernel_.params.push_back(v);
    kernel_.param_offsets.push_back(extend(kernel_.param_bytes));
    put(Space::param, kParamWindow + kernel_.param_offsets.back());
  } else if (v.space == "local" || v.space == "param") {
    if (v.space == "param" && names.sizes.count(v.name) && names.sizes[v.name] >= v.size) return;
    put(Space::local, kLocalWindow + extend(kernel_.local_bytes));
  } else if (v.space == "shared") {
    kernel_.shared_align = std::max<uint32_t>(kernel_.shared_align, v.align);
    if (!v.external) put(Space::shared, kSharedStart + extend(kernel_.shared_static));
  } else {
    put(v.space == "const" ? Space::constant : Space::global, module_.address_of(v.name));
  }
}

Names& KernelBuilder::declare(const Function& f) {
  Names& names = names_[f.name];
  names.function = &f;
  order_.push_back(f.name);
  for (Type t : f.registers) names.registers.push_back(allocate(bytes_of(t)));
  std::set<std::string> used;
  for (const Statement& s : f.statements)
    for (const Operand& o : s.operands) {
      used.insert(o.name);
      for (const Operand& p : o.parts) used.insert(p.name);
    }
  for (const Variable& v : f.params) place(names, v, f.entry);
  for (const Variable& v : f.returns) place(names, v, false);
  for (const Variable& v : f.variables) place(names, v, false);
  if (f.entry) {  // a variable at file scope has one address in the kernel and in what it calls
    for (const Variable& v : module_.program().variables) place(names, v, false);
    kernel_.dynamic_start = static_cast<uint32_t>(align_up(kernel_.shared_static, kernel_.shared_align));
    for (const Variable& v : module_.program().variables) {
      if (v.space != "shared" || !v.external) continue;
      names.spaces[v.name] = Space::shared;
      names.addresses[v.name] = kSharedStart + kernel_.dynamic_start;
      kernel_.uses_dynamic_shared |= used.count(v.name) > 0;
    }
  } else {
    const Names& kernel = names_.at(kernel_.name);
    for (const Variable& v : module_.program().variables) {
      if (!kernel.addresses.count(v.name)) continue;
      names.spaces[v.name] = kernel.spaces.at(v.name);
      names.addresses[v.name] = kernel.addresses.at(v.name);
    }
  }
  return names;
}

void KernelBuilder::emit(const Function& f) {
  Names& names = names_.at(f.name);
  const uint32_t base = static_cast<uint32_t>(kernel_.code.size());
  entries_[f.name] = base;
  for (const Statement& s : f.statements) {
    Instr i;
    i.line = s.line;
    Decoder d(*this, names, s, i, base);
    auto decode = opcodes().find(s.opcode);
    if (decode == opcodes().end()) d.fail("unknown instruction");
    if (s.guarded) {
      i.guard = d.predicate(s.guard);
      i.guard_negated = s.guard.negated;
    }
    try {
      decode->second(d);
    } catch (const SyntaxError& e) {
      if (std::string(e.what()).compare(0, 8, "PTX line") == 0) throw;
      d.fail(e.what());
    }
    d.expect_no_mods_left();
    kernel_.code.push_back(std::move(i));
  }
  Instr end;  // what falls off the end returns
  Statement ret;
  ret.opcode = "ret";
  ret.line = end.line = f.statements.empty() ? 0 : f.statements.back().line;
  Decoder d(*this, names, ret, end, base);
  opcodes().at("ret")(d);
  kernel_.code.push_back(std::move(end));
}

// Branches meet again at the immediate post-dominator: computed on the instructions themselves, backwards,
// with the scheme of Cooper, Harvey and Kennedy. A path that only returns has none: its lanes do not come
// back.
void KernelBuilder::join_branches(uint32_t first, uint32_t last) {
  const int n = static_cast<int>(last - first), exit = n;
  auto& code = kernel_.code;
  std::vector<std::vector<int>> next(n + 1), previous(n + 1);
  for (int i = 0; i < n; ++i) {
    const Instr& in = code[first + i];
    const bool flows = in.category == Category::branch && in.flags != kCalls;
    if (flows && in.flags == kLeaves) next[i].push_back(exit);
    if (flows && in.flags == kJumps) next[i].push_back(static_cast<int>(in.target - first));
    if (flows && in.flags == kIndexed)
      for (uint32_t t : in.list) next[i].push_back(static_cast<int>(t - first));
    if (!flows || in.guard != kNone) next[i].push_back(std::min(i + 1, exit));
    for (int to : next[i]) previous[to].push_back(i);
  }
  std::vector<int> order, number(n + 1, -1),
      join(n + 1, -1);  // postorder of the reversed graph, from the exit
  std::vector<std::pair<int, size_t>> work{{exit, 0}};
  number[exit] = -2;
  while (!work.empty()) {
    auto& [node, child] = work.back();
    if (child < previous[node].size()) {
      int to = previous[node][child++];
      if (number[to] == -1) number[to] = -2, work.emplace_back(to, 0);
    } else {
      number[node] = static_cast<int>(order.size());
      order.push_back(node);
      work.pop_back();
    }
  }
  join[exit] = exit;
  auto meet = [&](int a, int b) {
    while (a != b) {
      while (number[a] < number[b]) a = join[a];
      while (number[b] < number[a]) b = join[b];
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = order.size() - 1; k-- > 0;) {
      int node = order[k], best = -1;
      for (int to : next[node])
        if (join[to] != -1) best = best == -1 ? to : meet(best, to);
      if (best != join[node]) join[node] = best, changed = true;
    }
  }
  for (int i = 0; i < n; ++i) {
    if (code[first + i].category != Category::branch || join[i] == -1 || join[i] == exit) continue;
    if (!code[first + join[i]].ends_thread())
      code[first + i].join = first + join[i];  // nobody waits to exit together
  }
}

}  // namespace ptx
