// The words of a PTX text.
#pragma once

#include <string>
#include <vector>

#include "parse.h"

namespace ptx {

struct Token {
  enum Kind : uint8_t { word, number, punct, string, end } kind;
  std::string text;
  int line;
};

// A word keeps its dots and double colons ("ld.shared::cta.v4.b32", "%tid.x") and starts with the dot of a
// directive.
std::vector<Token> tokenize(const std::string& text);

}  // namespace ptx
