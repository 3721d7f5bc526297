#include "parse.h"

#include <cstdlib>
#include <cstring>

#include "tokens.h"

namespace ptx {
namespace {

struct TypeInfo {
  const char* name;
  Type type;
  int bytes;
};
constexpr TypeInfo kTypes[] = {
    {"b8", Type::b8, 1},         {"b16", Type::b16, 2},   {"b32", Type::b32, 4},   {"b64", Type::b64, 8},
    {"b128", Type::b128, 16},    {"u8", Type::u8, 1},     {"u16", Type::u16, 2},   {"u32", Type::u32, 4},
    {"u64", Type::u64, 8},       {"s8", Type::s8, 1},     {"s16", Type::s16, 2},   {"s32", Type::s32, 4},
    {"s64", Type::s64, 8},       {"f16", Type::f16, 2},   {"bf16", Type::bf16, 2}, {"f16x2", Type::f16x2, 4},
    {"bf16x2", Type::bf16x2, 4}, {"tf32", Type::tf32, 4}, {"f32", Type::f32, 4},   {"f64", Type::f64, 8},
    {"pred", Type::pred, 4},
};

[[noreturn]] void fail(int line, const std::string& what) {
  throw SyntaxError("PTX line " + std::to_string(line) + ": " + what);
}

std::vector<std::string> split(const std::string& word) {
  std::vector<std::string> parts(1);
  for (char c : word) {
    if (c == '.')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

// The registers, labels and parameters that one pair of braces declares.
struct Scope {
  std::map<std::string, int> registers;
  std::map<std::string, Type> families;  // "%r" of .reg .b32 %r<100>
  std::map<std::string, int> labels;
};

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokenize(text)) {
    program_.lines.emplace_back();  // lines count from 1
    for (size_t i = 0, j; i <= text.size(); i = j + 1) {
      j = std::min(text.find('\n', i), text.size());
      program_.lines.push_back(text.substr(i, j - i));
    }
  }

  Program run() {
    while (peek().kind != Token::end) directive();
    return std::move(program_);
  }

 private:
  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  bool is(const char* text) const { return peek().text == text && peek().kind != Token::string; }
  Token next() { return tokens_[at_ < tokens_.size() - 1 ? at_++ : at_]; }
  bool accept(const char* text) { return is(text) && (next(), true); }
  void expect(const char* text) {
    if (!accept(text)) fail(peek().line, "expected '" + std::string(text) + "', found '" + peek().text + "'");
  }
  std::string word() {
    if (peek().kind != Token::word) fail(peek().line, "expected a name, found '" + peek().text + "'");
    return next().text;
  }

  void directive() {
    int line = peek().line;
    std::string name = word();
    if (name == ".version" || name == ".address_size")
      next();
    else if (name == ".target") {
      std::string arch = word();
      program_.target = arch.compare(0, 3, "sm_") ? 0 : std::atoi(arch.c_str() + 3);
      while (accept(",")) next();
    } else if (name == ".file")
      skip_line(line);
    else if (name == ".section")
      skip_braces();
    else if (name == ".visible" || name == ".weak" || name == ".common")
      directive();
    else if (name == ".extern") {
      external_ = true;
      directive();
      external_ = false;
    } else if (name == ".entry" || name == ".func")
      function(name == ".entry");
    else if (name == ".global" || name == ".shared" || name == ".const") {
      variables(name.substr(1), program_.variables);
      expect(";");
    } else if (name == ".pragma" || name == ".alias") {
      while (!accept(";")) next();
    } else {
      fail(line, "unknown directive '" + name + "'");
    }
  }

  void skip_line(int line) {
    while (peek().line == line && peek().kind != Token::end) next();
  }
  void skip_braces() {
    while (!is("{")) next();
    int depth = 0;
    do depth += is("{") ? 1 : is("}") ? -1 : 0, next();
    while (depth && peek().kind != Token::end);
  }

  uint64_t number() {
    bool negative = accept("-");
    Token t = next();
    if (t.kind != Token::number) fail(t.line, "expected a number, found '" + t.text + "'");
    uint64_t v = std::strtoull(t.text.c_str(), nullptr, 0);
    return negative ? ~v + 1 : v;
  }

  // .align 4 .b8 name[16] = {..}, the part after the state space; several names share a type.
  void variables(const std::string& space, std::vector<Variable>& out, bool several = true) {
    Variable v;
    v.space = space;
    v.external = external_;
    Type type = Type::none;
    int vec = 1;
    while (peek().kind == Token::word && peek().text[0] == '.') {
      Token t = next();
      std::string m = t.text.substr(1);
      if (m == "align")
        v.align = static_cast<int>(number());
      else if (m == "v2" || m == "v4")
        vec = m[1] - '0';
      else if (m == "ptr" || m == "global" || m == "shared" || m == "const" || m == "local")
        continue;
      else if ((type = type_named(m)) == Type::none)
        fail(t.line, "unknown type '." + m + "' of a variable");
    }
    do {
      Variable one = v;
      one.name = word();
      uint64_t count = vec;
      bool unsized = false;
      while (accept("[")) {
        if (is("]"))
          unsized = true;
        else
          count *= number();
        expect("]");
      }
      one.align = std::max(v.align, bytes_of(type) * vec);
      if (accept("=")) initialiser(one, bytes_of(type));
      one.size = unsized ? one.data.size() : count * bytes_of(type);
      if (!one.data.empty()) one.data.resize(one.size);
      out.push_back(one);
    } while (several && accept(","));
  }

  void initialiser(Variable& v, int bytes) {
    if (accept("{")) {
      while (!accept("}")) {
        initialiser(v, bytes);
        accept(",");
      }
      return;
    }
    Operand o = operand();
    if (o.kind == Operand::symbol) fail(peek().line, "an address in an initialiser is not supported");
    for (int i = 0; i < bytes; ++i) v.data.push_back(static_cast<uint8_t>(o.value >> (8 * i)));
  }

  void parameters(std::vector<Variable>& out) {
    expect("(");
    while (!accept(")")) {
      std::string space = word();
      if (space != ".param" && space != ".reg") fail(peek().line, "expected .param, found '" + space + "'");
      if (space == ".reg") fail(peek().line, "a register parameter is not supported");
      variables("param", out, false);
      accept(",");
    }
  }

  void function(bool entry) {
    Function f;
    f.entry = entry;
    if (is("(")) parameters(f.returns);
    f.name = word();
    if (is("(")) parameters(f.params);
    while (!is("{") && !is(";")) {
      Token t = next();
      if (t.text == ".reqntid" || t.text == ".maxntid") {
        uint32_t n = static_cast<uint32_t>(number());
        while (accept(",")) n *= static_cast<uint32_t>(number());
        (t.text == ".reqntid" ? f.required_threads : f.max_threads) = n;
      } else if (t.text == ".minnctapersm" || t.text == ".maxnreg")
        number();
      else if (t.text == ".noreturn" || t.text == ".explicitcluster")
        continue;
      else if (t.text == ".reqnctapercluster" || t.text == ".maxclusterrank") {
        uint64_t n = number();
        while (accept(",")) n *= number();
        if (n != 1) fail(t.line, "only clusters of one CTA are supported");
      } else if (t.kind != Token::string)
        fail(t.line, "unknown function directive '" + t.text + "'");
    }
    f.defined = !accept(";");
    if (f.defined) body(f);
    program_.functions[f.name] = std::move(f);
  }

  void body(Function& f) {
    f_ = &f;
    scopes_.clear();
    open_.clear();
    block();
    for (Statement& s : f.statements) resolve(s.scopes, s.operands);
    for (auto& [name, targets] : f.branch_targets) resolve({0}, targets);
  }

  void block() {
    expect("{");
    open_.push_back(static_cast<int>(scopes_.size()));
    scopes_.emplace_back();
    while (!accept("}")) {
      if (is("{"))
        block();
      else if (peek().kind == Token::word && peek().text[0] == '.')
        local_directive();
      else if (peek().kind == Token::word && peek(1).text == ":")
        label();
      else if (!accept(";"))
        statement();
    }
    open_.pop_back();
  }

  void label() {
    Token name = next();
    expect(":");
    if (is(".branchtargets")) {
      next();
      do f_->branch_targets[name.text].push_back(operand());
      while (accept(","));
      expect(";");
      return;
    }
    if (!scopes_[open_.back()].labels.emplace(name.text, f_->statements.size()).second)
      fail(name.line, "label " + name.text + " is defined twice");
  }

  void local_directive() {
    Token t = next();
    Scope& scope = scopes_[open_.back()];
    if (t.text == ".reg") {
      Type type = type_named(word().substr(1));
      if (type == Type::none) fail(t.line, "unknown register type");
      do {
        std::string name = word();
        if (accept("<")) {
          number();
          expect(">");
          scope.families[name] = type;
        } else {
          scope.registers[name] = static_cast<int>(f_->registers.size());
          f_->registers.push_back(type);
        }
      } while (accept(","));
      expect(";");
    } else if (t.text == ".local" || t.text == ".shared" || t.text == ".param") {
      variables(t.text.substr(1), f_->variables);
      expect(";");
    } else if (t.text == ".loc" || t.text == ".file")
      skip_line(t.line);
    else if (t.text == ".pragma") {
      while (!accept(";")) next();
    } else
      fail(t.line, "unknown directive '" + t.text + "'");
  }

  void statement() {
    Statement s;
    if (accept("@")) {
      s.guarded = true;
      bool negated = accept("!");
      s.guard = operand();
      s.guard.negated = negated;
    }
    s.line = peek().line;
    s.mods = split(word());
    s.opcode = s.mods[0];
    s.mods.erase(s.mods.begin());
    s.scopes = open_;
    while (!accept(";")) {
      s.operands.push_back(operand());
      if (!is(";")) expect(",");
    }
    f_->statements.push_back(std::move(s));
  }

  Operand operand() {
    Operand o = one_operand();
    if (is("|")) {  // p|q: a pair of destinations
      Operand pair;
      pair.kind = Operand::vector;
      pair.parts.push_back(o);
      while (accept("|")) pair.parts.push_back(one_operand());
      return pair;
    }
    return o;
  }

  Operand one_operand() {
    Operand o;
    const Token& t = peek();
    if (accept("!")) {
      o = one_operand();
      o.negated = !o.negated;
    } else if (accept("-")) {
      o = one_operand();
      if (o.kind == Operand::f64)
        o.value ^= uint64_t{1} << 63;
      else if (o.kind == Operand::integer)
        o.value = ~o.value + 1;
      else
        fail(t.line, "'-' before something that is no number");
    } else if (accept("{") || accept("(")) {
      o.kind = Operand::vector;
      while (!accept("}") && !accept(")")) {
        o.parts.push_back(one_operand());
        accept(",");
      }
    } else if (accept("[")) {
      o = address();
    } else if (t.kind == Token::number) {
      immediate(o, next().text);
    } else if (t.kind == Token::word) {
      std::string name = word();
      named(o, name, t.line);
      if (o.kind == Operand::symbol && accept("+")) o.value = number();
    } else {
      fail(t.line, "unexpected '" + t.text + "'");
    }
    return o;
  }

  Operand address() {
    Operand o;
    o.kind = Operand::address;
    o.parts.push_back(one_operand());
    if (o.parts[0].kind == Operand::symbol) std::swap(o.value, o.parts[0].value);
    while (!accept("]")) {
      if (accept("+"))
        o.value += number();
      else if (is("-"))
        o.value += number();
      else if (accept(","))
        o.parts.push_back(one_operand());  // the coordinates of a tensor copy
      else
        fail(peek().line, "unexpected '" + peek().text + "' in an address");
    }
    return o;
  }

  static void immediate(Operand& o, const std::string& text) {
    bool hex_float = text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]);
    if (hex_float) {
      o.kind = std::tolower(text[1]) == 'f' ? Operand::f32 : Operand::f64;
      o.value = std::strtoull(text.c_str() + 2, nullptr, 16);
    } else if (text.find_first_of(".eE") != std::string::npos && text.compare(0, 2, "0x")) {
      double v = std::strtod(text.c_str(), nullptr);
      o.kind = Operand::f64;
      std::memcpy(&o.value, &v, 8);
    } else {
      o.kind = Operand::integer;
      int base = text.size() > 1 && text[0] == '0' && std::tolower(text[1]) == 'b' ? 2 : 0;
      o.value = std::strtoull(text.c_str() + (base ? 2 : 0), nullptr, base);
    }
  }

  void named(Operand& o, const std::string& name, int line) {
    o.name = name;
    if (name == "_") return;
    for (size_t i = open_.size(); i-- > 0;) {
      Scope& scope = scopes_[open_[i]];
      auto exact = scope.registers.find(name);
      if (exact != scope.registers.end()) {
        o.kind = Operand::reg;
        o.index = exact->second;
        return;
      }
      size_t digits = name.find_last_not_of("0123456789") + 1;
      auto family = scope.families.find(name.substr(0, digits));
      if (digits < name.size() && family != scope.families.end()) {
        o.kind = Operand::reg;
        o.index = scope.registers[name] = static_cast<int>(f_->registers.size());
        f_->registers.push_back(family->second);
        return;
      }
    }
    if (name == "WARP_SZ") {
      o.kind = Operand::integer;
      o.value = 32;
    } else if (name[0] == '%') {
      o.kind = Operand::special;
    } else if (name[0] == '.') {
      fail(line, "unexpected '" + name + "'");
    } else {
      o.kind = Operand::symbol;
    }
  }

  // A symbol that names a label becomes one; the innermost scope wins.
  void resolve(const std::vector<int>& scopes, std::vector<Operand>& operands) {
    for (Operand& o : operands) {
      if (o.kind != Operand::symbol) continue;
      for (size_t i = scopes.size(); i-- > 0;) {
        auto label = scopes_[scopes[i]].labels.find(o.name);
        if (label == scopes_[scopes[i]].labels.end()) continue;
        o.kind = Operand::label;
        o.index = label->second;
        break;
      }
    }
  }

  Program program_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  bool external_ = false;
  Function* f_ = nullptr;
  std::vector<Scope> scopes_;
  std::vector<int> open_;
};

}  // namespace

Type type_named(const std::string& name) {
  for (const TypeInfo& t : kTypes)
    if (name == t.name) return t.type;
  return Type::none;
}

int bytes_of(Type type) {
  for (const TypeInfo& t : kTypes)
    if (type == t.type) return t.bytes;
  return 0;
}

bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }

bool is_float(Type t) { return t >= Type::f16 && t <= Type::f64; }

Program parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
