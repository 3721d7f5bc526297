#include "tokens.h"

#include <algorithm>
#include <cctype>
#include <cstring>

namespace ptx {
namespace {

bool word_start(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || (c && std::strchr("_$%.", c));
}
bool word_part(char c) { return word_start(c) || std::isdigit(static_cast<unsigned char>(c)); }

}  // namespace

std::vector<Token> tokenize(const std::string& s) {
  std::vector<Token> out;
  int line = 1;
  for (size_t i = 0; i < s.size();) {
    char c = s[i];
    if (c == '\n')
      ++line, ++i;
    else if (std::isspace(static_cast<unsigned char>(c)))
      ++i;
    else if (s.compare(i, 2, "//") == 0)
      i = std::min(s.find('\n', i), s.size());
    else if (s.compare(i, 2, "/*") == 0) {
      for (size_t stop = std::min(s.find("*/", i), s.size() - 2) + 2; i < stop; ++i) line += s[i] == '\n';
    } else if (word_start(c)) {
      size_t j = i + 1;
      while (j < s.size() && (word_part(s[j]) || (s.compare(j, 2, "::") == 0 && ++j))) ++j;
      out.push_back({Token::word, s.substr(i, j - i), line});
      i = j;
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      size_t j = i + 1;
      bool decimal = !(c == '0' && j < s.size() && std::strchr("xXfFdDbB", s[j]));
      while (j < s.size() && (std::isalnum(static_cast<unsigned char>(s[j])) || s[j] == '.' ||
                              (decimal && (s[j] == '-' || s[j] == '+') && std::strchr("eE", s[j - 1]))))
        ++j;
      out.push_back({Token::number, s.substr(i, j - i), line});
      i = j;
    } else if (c == '"') {
      size_t j = s.find('"', i + 1);
      out.push_back({Token::string, s.substr(i + 1, j - i - 1), line});
      i = j + 1;
    } else {
      out.push_back({Token::punct, std::string(1, c), line});
      ++i;
    }
  }
  out.push_back({Token::end, "", line});
  return out;
}

}  // namespace ptx
