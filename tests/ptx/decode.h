// From a parsed statement to an instruction: the table of opcodes and what their decoders work with.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptx {

class Decoder;
using Table = std::unordered_map<std::string, void (*)(Decoder&)>;

// Each concern adds its opcodes.
void add_integer(Table& table);
void add_floating(Table& table);
void add_moves(Table& table);
void add_conversions(Table& table);
void add_memory(Table& table);
void add_control(Table& table);
void add_warp(Table& table);
void add_tensor(Table& table);
void add_async(Table& table);
void add_mbarrier(Table& table);
void add_wgmma(Table& table);

// Where the names of one function live; shared by its statements.
struct Names {
  const Function* function = nullptr;
  std::vector<uint32_t> registers;            // register index -> offset in the register file
  std::map<std::string, uint64_t> addresses;  // variable -> address in its own space
  std::map<std::string, Space> spaces;        // and that space; Space::local for a device function's .param
  std::map<std::string, uint32_t> sizes;      // of .param variables
};

// Builds one kernel and the device functions that it calls.
class KernelBuilder {
 public:
  KernelBuilder(const Module& module, const std::string& name);
  Kernel build();

  // For decoders.
  uint32_t constant(uint64_t bits, int width);
  uint32_t special(const std::string& name, int width);
  uint32_t allocate(int width);
  const Names& callee(const std::string& name);
  void call_here(const std::string& name) { calls_.emplace_back(kernel_.code.size(), name); }
  const Module& module() const { return module_; }
  Kernel& kernel() { return kernel_; }

 private:
  Names& declare(const Function& f);
  void place(Names& names, const Variable& v, bool entry_param);
  void emit(const Function& f);
  void join_branches(uint32_t first, uint32_t last);

  const Module& module_;
  Kernel kernel_;
  std::map<std::string, Names> names_;
  std::map<std::string, uint32_t> entries_;
  std::vector<std::string> order_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  std::vector<std::pair<uint32_t, std::string>> calls_;  // instructions that need the entry of a function
};

// One statement on its way to an instruction. A decoder takes the modifiers that it knows; one that is left
// is an error.
class Decoder {
 public:
  Decoder(KernelBuilder& builder, Names& names, const Statement& statement, Instr& out, uint32_t base);

  const std::string& opcode() const { return s_.opcode; }
  bool take(const std::string& mod);
  // The first of these that is present, taken; "" if none is.
  std::string take_any(std::initializer_list<const char*> mods);
  std::string take_prefix(const std::string& prefix);  // "L2::128B" for "L2::"
  Type type();                                         // the next type among the modifiers
  Round rounding();                                    // .rn .rz .rm .rp .rna; nearest even if there is none
  const std::string& mod(size_t i) const { return s_.mods.at(i); }
  size_t mods() const { return s_.mods.size(); }
  void take_all() { left_.clear(); }
  void expect_no_mods_left() const;

  size_t operands() const { return s_.operands.size(); }
  const Operand& operand(size_t i) const;
  uint32_t source(const Operand& o, Type type);  // a register of exactly this width, or a constant
  uint32_t source(const Operand& o, int width, Type type = Type::none);
  uint32_t destination(const Operand& o, int width);  // `_` gets a register that nobody reads
  uint32_t predicate(const Operand& o);
  int width_of(const Operand& o) const;                   // of the register; 0 for anything else
  void address(const Operand& o, Instr& i);               // i.a, i.imm and, if the name settles it, i.space
  std::vector<Operand> elements(const Operand& o) const;  // of {a, b, ...}; of a single operand, itself
  int64_t integer(const Operand& o) const;

  Instr& out;
  KernelBuilder& builder;
  Names& names;
  uint32_t base;  // of the function's first instruction

  [[noreturn]] void fail(const std::string& what) const;

 private:
  uint64_t immediate(const Operand& o, int width, Type type) const;
  const Statement& s_;
  std::vector<std::string> left_;
};

// Calls f with a value of the C++ type that stands for the PTX type, if it is one of Ts.
template <class T>
struct Tag {
  using type = T;
};
template <class F>
bool with_integer(Type t, F f) {
  switch (t) {
    case Type::u8:
    case Type::b8:
      f(Tag<uint8_t>());
      return true;
    case Type::s8:
      f(Tag<int8_t>());
      return true;
    case Type::u16:
    case Type::b16:
      f(Tag<uint16_t>());
      return true;
    case Type::u32:
    case Type::b32:
      f(Tag<uint32_t>());
      return true;
    case Type::u64:
    case Type::b64:
      f(Tag<uint64_t>());
      return true;
    case Type::s16:
      f(Tag<int16_t>());
      return true;
    case Type::s32:
      f(Tag<int32_t>());
      return true;
    case Type::s64:
      f(Tag<int64_t>());
      return true;
    default:
      return false;
  }
}
template <class F>
bool with_float(Type t, F f) {
  switch (t) {
    case Type::f32:
      f(Tag<float>());
      return true;
    case Type::f64:
      f(Tag<double>());
      return true;
    case Type::f16:
      f(Tag<Half>());
      return true;
    case Type::bf16:
      f(Tag<BFloat>());
      return true;
    default:
      return false;
  }
}
template <class F>
bool with_packed(Type t, F f) {
  switch (t) {
    case Type::f16x2:
      f(Tag<Pair<Half>>());
      return true;
    case Type::bf16x2:
      f(Tag<Pair<BFloat>>());
      return true;
    default:
      return false;
  }
}

// Warp-wide loops over a lane function.
template <class D, class A, class F>
void unary(Warp& w, const Instr& i, Mask m) {
  D* d = w.at<D>(i.d);
  const A* a = w.at<A>(i.a);
  each(m, [&](int l) { d[l] = F()(a[l]); });
}
template <class D, class A, class B, class F>
void binary(Warp& w, const Instr& i, Mask m) {
  D* d = w.at<D>(i.d);
  const A* a = w.at<A>(i.a);
  const B* b = w.at<B>(i.b);
  each(m, [&](int l) { d[l] = F()(a[l], b[l]); });
}
template <class D, class A, class B, class C, class F>
void ternary(Warp& w, const Instr& i, Mask m) {
  D* d = w.at<D>(i.d);
  const A* a = w.at<A>(i.a);
  const B* b = w.at<B>(i.b);
  const C* c = w.at<C>(i.c);
  each(m, [&](int l) { d[l] = F()(a[l], b[l], c[l]); });
}

}  // namespace ptx
