// ldmatrix, stmatrix, movmatrix and mma.sync: what a warp does with the fragments of a matrix.
#include <algorithm>
#include <cstdio>

#include "access.h"
#include "decode.h"
#include "product.h"

namespace ptx {
namespace {

void check_whole_warp(Warp& w, Mask m) {
  if (m != kAll)
    fault(w, __builtin_ctz(~m), "divergent-warp", "a matrix instruction that not all 32 lanes execute");
}

// ---- 8x8 matrices of 16-bit elements: lane l holds row l / 4, columns 2 (l % 4) and the next ----

// Row r of matrix j is at the address of lane 8 j + r.
void matrix_rows(Warp& w, const Instr& i, Access access, uint8_t* (&rows)[4][8]) {
  uint64_t address[kLanes];
  const int count = static_cast<int>(i.list.size());
  const Mask named = count == 4 ? kAll : (1u << (8 * count)) - 1;
  addresses(w, i, named, address);
  each(named, [&](int l) { rows[l / 8][l % 8] = reach(w, l, i.space, address[l], 16, 16, access, false); });
  count_shared(w, named, address, 16);
}

template <bool kLoads>
void move_matrices(Warp& w, const Instr& i, Mask m) {
  check_whole_warp(w, m);
  uint8_t* rows[4][8];
  matrix_rows(w, i, kLoads ? Access::read : Access::write, rows);
  const bool trans = i.flags;
  for (size_t j = 0; j < i.list.size(); ++j) {
    uint16_t* halves = w.at<uint16_t>(i.list[j]);
    for (int l = 0; l < kLanes; ++l)
      for (int h = 0; h < 2; ++h) {
        const int major = l / 4, minor = l % 4 * 2 + h;
        uint8_t* element = trans ? rows[j][minor] + 2 * major : rows[j][major] + 2 * minor;
        if (kLoads)
          std::memcpy(&halves[2 * l + h], element, 2);
        else
          std::memcpy(element, &halves[2 * l + h], 2);
      }
  }
}

void transpose_matrix(Warp& w, const Instr& i, Mask m) {
  check_whole_warp(w, m);
  uint16_t from[64];
  std::copy_n(w.at<uint16_t>(i.a), 64, from);
  for (int l = 0; l < kLanes; ++l)
    for (int h = 0; h < 2; ++h) w.at<uint16_t>(i.d)[2 * l + h] = from[(l % 4 * 2 + h) * 8 + l / 4];
}

void decode_matrices(Decoder& d) {
  Instr& i = d.out;
  const bool loads = d.opcode() == "ldmatrix";
  i.category = Category::ldmatrix;
  d.take("sync"), d.take("aligned");
  if (d.opcode() == "movmatrix") {
    if (!d.take("m8n8") || !d.take("trans")) d.fail("only movmatrix.m8n8.trans exists");
    d.type();
    i.d = d.destination(d.operand(0), 4);
    i.a = d.source(d.operand(1), Type::b32);
    i.run = transpose_matrix;
    return;
  }
  if (!d.take("m8n8")) d.fail("only matrices of 8x8 elements are supported");
  const std::string count = d.take_any({"x1", "x2", "x4"});
  i.flags = d.take("trans");
  if (d.take_any({"shared", "shared::cta"}).empty())
    i.space = Space::generic;
  else
    i.space = Space::shared;
  if (bytes_of(d.type()) != 2) d.fail("only 16-bit elements are supported");
  d.address(d.operand(loads ? 1 : 0), i);
  for (const Operand& o : d.elements(d.operand(loads ? 0 : 1)))
    i.list.push_back(loads ? d.destination(o, 4) : d.source(o, Type::b32));
  if (count.empty() || i.list.size() != static_cast<size_t>(count[1] - '0'))
    d.fail("wrong number of registers");
  i.run = loads ? move_matrices<true> : move_matrices<false>;
}

// ---- mma.sync ----
// With P elements in a register, lane l = 4 g + t holds
//   of A, register r, element e: row g + 8 (r % 2), column 4 P (r / 2) + P t + e    (8-row shapes: row g, no
//   pairing) of B, register r, element e: row (k) 4 P r + P t + e, column g of C and D, element i: row g + 8
//   (i / 2), column 2 t + i % 2

struct Shape {
  int m, n, k;
};
struct Product {
  Shape shape;
  Type a, b, c, d;
  bool saturate;
};

// Instr::list: the registers of D, A, B and C, in this order; Instr::shape: a Product.

int per_register(Type t) { return t == Type::f64 ? 1 : 4 / bytes_of(t); }
int register_bytes(Type t) { return t == Type::f64 ? 8 : 4; }

template <class T>
void gather(Warp& w, const uint32_t* regs, int count, Type type, bool is_a, int rows_paired, int k, T* out) {
  const int p = per_register(type), bytes = bytes_of(type), step = is_a ? rows_paired : 1;
  const uint64_t mask = bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bytes)) - 1;
  for (int r = 0; r < count; ++r)
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t word = w.get(regs[r], register_bytes(type), l);
      for (int e = 0; e < p; ++e) {
        const int line = l / 4 + 8 * (r % step), depth = 4 * p * (r / step) + p * (l % 4) + e;
        const T value = static_cast<T>(tensor_element(type, word >> (8 * bytes * e) & mask));
        out[is_a ? line * k + depth : depth * 8 + line] = value;
      }
    }
}

template <class T>
T decode_accumulator(Type t, uint64_t bits) {
  return t == Type::f64   ? static_cast<T>(bits_as<double>(bits))
         : t == Type::s32 ? static_cast<T>(static_cast<int32_t>(bits))
         : t == Type::f16 ? static_cast<T>(half_to_float(static_cast<uint16_t>(bits)))
                          : static_cast<T>(bits_as<float>(static_cast<uint32_t>(bits)));
}
template <class T>
uint64_t encode_accumulator(Type t, T x) {
  return t == Type::f64   ? bits_as<uint64_t>(static_cast<double>(x))
         : t == Type::s32 ? static_cast<uint32_t>(static_cast<int32_t>(x))
         : t == Type::f16 ? HalfFormat::encode(static_cast<double>(x))
                          : bits_as<uint32_t>(static_cast<float>(x));
}

template <class T>
void accumulators(Warp& w, const uint32_t* regs, int rows, Type type, T* tile, bool store) {
  const int p = type == Type::f16 ? 2 : 1, bytes = bytes_of(type), width = std::max(bytes, 4);
  for (int index = 0; index < rows / 4; ++index)
    for (int l = 0; l < kLanes; ++l) {
      T& element = tile[(l / 4 + 8 * (index / 2)) * 8 + l % 4 * 2 + index % 2];
      uint8_t* at = w.file + regs[index / p] + l * width + index % p * bytes;
      uint64_t bits = store ? encode_accumulator<T>(type, element) : 0;
      if (store)
        std::memcpy(at, &bits, bytes);
      else
        std::memcpy(&bits, at, bytes), element = decode_accumulator<T>(type, bits);
    }
}

template <class T>
void multiply(const Product& p, const T* a, const T* b, T* c) {
  if constexpr (std::is_same<T, int32_t>::value)
    integer_product(p.shape.m, 8, p.shape.k, p.saturate, a, b, c);
  else if constexpr (std::is_same<T, double>::value)
    double_product(p.shape.m, 8, p.shape.k, a, b, c);
  else
    float_product(p.a, p.d, p.shape.m, 8, p.shape.k, a, b, c);
}

template <class T>
void mma(Warp& w, const Instr& i, Mask m) {
  check_whole_warp(w, m);
  const Product& p = *static_cast<const Product*>(i.shape.get());
  const int k = p.shape.k, rows = p.shape.m;
  const int in_d = rows / 4 / (p.d == Type::f16 ? 2 : 1), in_a = rows * k / kLanes / per_register(p.a),
            in_b = 8 * k / kLanes / per_register(p.b);
  const uint32_t *d = i.list.data(), *a = d + in_d, *b = a + in_a, *c = b + in_b;
  T tile_a[16 * 64], tile_b[64 * 8], tile_c[16 * 8];
  gather(w, a, in_a, p.a, true, rows / 8, k, tile_a);
  gather(w, b, in_b, p.b, false, 1, k, tile_b);
  accumulators(w, c, rows, p.c, tile_c, false);
  multiply(p, tile_a, tile_b, tile_c);
  accumulators(w, d, rows, p.d, tile_c, true);
  w.cta->counters.flops += uint64_t{2} * rows * 8 * k;
}

void decode_mma(Decoder& d) {
  Instr& i = d.out;
  i.category = Category::mma;
  d.take("sync"), d.take("aligned");
  auto p = std::make_shared<Product>();
  const std::string shape = d.take_prefix("m");
  if (std::sscanf(shape.c_str(), "m%dn%dk%d", &p->shape.m, &p->shape.n, &p->shape.k) != 3) d.fail("no shape");
  if (!d.take("row") || !d.take("col")) d.fail("only .row.col is supported");
  p->saturate = d.take("satfinite");
  p->d = d.type(), p->a = d.type(), p->b = d.type(), p->c = d.type();
  const bool integer = p->a == Type::s8 || p->a == Type::u8, is_double = p->a == Type::f64;
  const int k = p->shape.k, bytes = bytes_of(p->a);
  const bool known = p->shape.n == 8 &&
                     (is_double ? p->shape.m == 8 && k == 4
                      : integer ? (p->shape.m == 16 && (k == 16 || k == 32)) || (p->shape.m == 8 && k == 16)
                                : p->shape.m == 16 && (k * bytes == 16 || k * bytes == 32) && bytes > 1);
  if (!known) d.fail("this mma shape is not supported");
  auto add = [&](const Operand& o, int count, int width, bool destination) {
    const std::vector<Operand> parts = d.elements(o);
    if (static_cast<int>(parts.size()) != count) d.fail("wrong number of registers");
    for (const Operand& r : parts)
      i.list.push_back(destination ? d.destination(r, width) : d.source(r, width, p->c));
  };
  const int rows = p->shape.m;
  add(d.operand(0), rows / 4 / (p->d == Type::f16 ? 2 : 1),
      register_bytes(p->d == Type::f16 ? Type::f32 : p->d), true);
  add(d.operand(1), rows * k / kLanes / per_register(p->a), register_bytes(p->a), false);
  add(d.operand(2), 8 * k / kLanes / per_register(p->b), register_bytes(p->b), false);
  add(d.operand(3), rows / 4 / (p->c == Type::f16 ? 2 : 1),
      register_bytes(p->c == Type::f16 ? Type::f32 : p->c), false);
  i.shape = p;
  i.run = integer ? mma<int32_t> : is_double ? mma<double> : mma<float>;
}

}  // namespace

void add_tensor(Table& t) {
  t["ldmatrix"] = t["stmatrix"] = t["movmatrix"] = decode_matrices;
  t["mma"] = decode_mma;
}

}  // namespace ptx
