// The PTX text as data: what the grammar says, nothing about what an instruction does.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

enum class Type : uint8_t {
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f16x2,
  bf16x2,
  tf32,
  f32,
  f64,
  pred,
  none
};
Type type_named(const std::string& name);  // Type::none if it is no type
int bytes_of(Type type);                   // a predicate takes 4 bytes: one bit a lane
bool is_signed(Type type);
bool is_float(Type type);

struct SyntaxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Operand {
  enum Kind : uint8_t { reg, special, integer, f32, f64, symbol, address, vector, sink, label } kind = sink;
  bool negated = false;        // !%p or -%r
  int index = 0;               // reg: into Function::registers; label: into Function::statements
  uint64_t value = 0;          // the bits of an immediate, or the offset of an address or symbol
  std::string name;            // of a symbol, special register or label
  std::vector<Operand> parts;  // {a, b}, p|q, (x, y), or the base of an address
};

struct Statement {
  int line = 0;
  std::string opcode;             // "ld"
  std::vector<std::string> mods;  // "global", "v4", "u32"
  bool guarded = false;
  Operand guard;
  std::vector<Operand> operands;
  std::vector<int> scopes;  // the open scopes, outermost first: where its labels are looked up
};

struct Variable {
  std::string name, space;
  int align = 1;
  uint64_t size = 0;
  bool external = false;
  std::vector<uint8_t> data;  // the initialiser, zero-extended to size; empty without one
};

struct Function {
  std::string name;
  bool entry = false, defined = false;
  std::vector<Variable> params, returns, variables;
  std::vector<Type> registers;
  std::vector<Statement> statements;
  std::map<std::string, std::vector<Operand>> branch_targets;  // .branchtargets of a brx.idx
  uint32_t required_threads = 0, max_threads = 0;              // .reqntid, .maxntid; 0: unset
};

struct Program {
  int target = 0;  // 80 for sm_80, 90 for sm_90a
  std::vector<std::string> lines;
  std::vector<Variable> variables;
  std::map<std::string, Function> functions;
};

Program parse(const std::string& text);

}  // namespace ptx
