"""Single instructions of the emulator against Python's integers and torch's floats."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import ptx
import pytest
import torch

STORAGE = {"b16": torch.int16, "b32": torch.int32, "b64": torch.int64, "f32": torch.float32, "f64": torch.float64}


def evaluate(line: str, *sources: tuple[str, torch.Tensor], result: str) -> torch.Tensor:
    """Runs one instruction (%d, %a, %b, %c are its registers) for each element of the sources."""
    n = len(sources[0][1])
    out = ptx.poison_(torch.empty(n, dtype=STORAGE[result]))
    size = {"b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}
    loads = "".join(
        f".reg .{kind} %{name}; ld.param.u64 %p, [{name}]; "
        f"mad.wide.u32 %p, %i, {size[kind]}, %p; ld.global.{kind} %{name}, [%p];\n"
        for name, (kind, _) in zip("abc", sources, strict=False)
    )
    params = ", ".join(f".param .u64 {name}" for name in ["out", *"abc"[: len(sources)]])
    text = f""".version 8.0
.target sm_90
.address_size 64
.visible .entry k({params}) {{
.reg .u32 %i; .reg .u64 %p; .reg .{result} %d; .reg .pred %q, %r;
mov.u32 %i, %tid.x;
{loads}{line}
ld.param.u64 %p, [out]; mad.wide.u32 %p, %i, {size[result]}, %p; st.global.{result} [%p], %d;
ret;
}}
"""
    ptx.Module(text).launch("k", 1, n, [out, *(x for _, x in sources)], outputs=[out])
    return out


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def integers(bits: int, seed: int, count: int = 96) -> list[int]:
    """Raw bit patterns: the awkward ones and random ones."""
    draw = random.Random(seed)
    edges = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 5, 31]
    values = edges + [draw.getrandbits(bits) >> draw.randrange(bits) for _ in range(count - len(edges))]
    draw.shuffle(values)
    return values


def tensor(values: list[int], bits: int) -> torch.Tensor:
    return torch.tensor([signed(v, bits) for v in values], dtype=STORAGE[f"b{bits}"])


def bfe(a: int, position: int, length: int, bits: int, sign: bool) -> int:
    position, length = position & 255, length & 255
    top = a >> min(position + length - 1, bits - 1) & 1 if sign and length else 0
    padded = a | (-1 << bits if top else 0)
    field = padded >> position & ((1 << length) - 1)
    return field | (-1 << length if top else 0)


def prmt(a: int, b: int, selector: int) -> int:
    data, out = (b << 32) | a, 0
    for i in range(4):
        s = selector >> (4 * i) & 15
        byte = data >> (8 * (s & 7)) & 255
        out |= (byte if s < 8 else 255 if byte & 128 else 0) << (8 * i)
    return out


def divide(a: int, b: int) -> int:  # toward zero
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def halves(a: int, b: int, f: Callable[[int, int], int]) -> int:
    return (f(a >> 16, b >> 16) & 0xFFFF) << 16 | f(a & 0xFFFF, b & 0xFFFF) & 0xFFFF


S, U = signed, lambda x, bits: x & ((1 << bits) - 1)
INTEGER = {
    # instruction: bits of the sources, bits of the result, reference on raw bit patterns
    "add.s32 %d, %a, %b": (32, 32, lambda a, b: a + b),
    "sub.s64 %d, %a, %b": (64, 64, lambda a, b: a - b),
    "add.s16 %d, %a, %b": (16, 16, lambda a, b: a + b),
    "mul.lo.s32 %d, %a, %b": (32, 32, lambda a, b: a * b),
    "mul.lo.u64 %d, %a, %b": (64, 64, lambda a, b: a * b),
    "mul.hi.s32 %d, %a, %b": (32, 32, lambda a, b: S(a, 32) * S(b, 32) >> 32),
    "mul.hi.u32 %d, %a, %b": (32, 32, lambda a, b: a * b >> 32),
    "mul.hi.u64 %d, %a, %b": (64, 64, lambda a, b: a * b >> 64),
    "mul.hi.s64 %d, %a, %b": (64, 64, lambda a, b: S(a, 64) * S(b, 64) >> 64),
    "mul.wide.s32 %d, %a, %b": (32, 64, lambda a, b: S(a, 32) * S(b, 32)),
    "mul.wide.u32 %d, %a, %b": (32, 64, lambda a, b: a * b),
    "mul.wide.s16 %d, %a, %b": (16, 32, lambda a, b: S(a, 16) * S(b, 16)),
    "mul.wide.u16 %d, %a, %b": (16, 32, lambda a, b: a * b),
    "mad.lo.s32 %d, %a, %b, 7": (32, 32, lambda a, b: a * b + 7),
    "mad.wide.s32 %d, %a, %b, -3": (32, 64, lambda a, b: S(a, 32) * S(b, 32) - 3),
    "mad.hi.u32 %d, %a, %b, %a": (32, 32, lambda a, b: (a * b >> 32) + a),
    "div.s32 %d, %a, %b": (32, 32, lambda a, b: divide(S(a, 32), S(b, 32)) if b else None),
    "div.u64 %d, %a, %b": (64, 64, lambda a, b: a // b if b else None),
    "rem.s64 %d, %a, %b": (64, 64, lambda a, b: S(a, 64) - S(b, 64) * divide(S(a, 64), S(b, 64)) if b else None),
    "rem.u32 %d, %a, %b": (32, 32, lambda a, b: a % b if b else None),
    "min.s32 %d, %a, %b": (32, 32, lambda a, b: min(S(a, 32), S(b, 32))),
    "max.u32 %d, %a, %b": (32, 32, max),
    "min.u16 %d, %a, %b": (16, 16, min),
    "max.s64 %d, %a, %b": (64, 64, lambda a, b: max(S(a, 64), S(b, 64))),
    "add.s16x2 %d, %a, %b": (32, 32, lambda a, b: halves(a, b, lambda x, y: x + y)),
    "min.s16x2 %d, %a, %b": (32, 32, lambda a, b: halves(a, b, lambda x, y: min(S(x, 16), S(y, 16)))),
    "max.u16x2 %d, %a, %b": (32, 32, lambda a, b: halves(a, b, max)),
    "abs.s32 %d, %a": (32, 32, lambda a, b: abs(S(a, 32))),
    "neg.s64 %d, %a": (64, 64, lambda a, b: -a),
    "and.b32 %d, %a, %b": (32, 32, lambda a, b: a & b),
    "or.b64 %d, %a, %b": (64, 64, lambda a, b: a | b),
    "xor.b16 %d, %a, %b": (16, 16, lambda a, b: a ^ b),
    "not.b32 %d, %a": (32, 32, lambda a, b: ~a),
    "cnot.b32 %d, %a": (32, 32, lambda a, b: int(a == 0)),
    "shl.b32 %d, %a, %b": (32, 32, lambda a, b: a << b if b < 32 else 0),
    "shr.u32 %d, %a, %b": (32, 32, lambda a, b: a >> min(b, 32)),
    "shr.s32 %d, %a, %b": (32, 32, lambda a, b: S(a, 32) >> min(b, 32)),
    "shl.b64 %d, %a, 37": (64, 64, lambda a, b: a << 37),
    "shr.s64 %d, %a, 63": (64, 64, lambda a, b: S(a, 64) >> 63),
    "shf.l.wrap.b32 %d, %a, %b, 5": (32, 32, lambda a, b: ((b << 32 | a) << 5) >> 32),
    "shf.r.wrap.b32 %d, %a, %b, 37": (32, 32, lambda a, b: (b << 32 | a) >> 5),
    "shf.r.clamp.b32 %d, %a, %b, 37": (32, 32, lambda a, b: b),
    "shf.l.clamp.b32 %d, %a, %b, 32": (32, 32, lambda a, b: a),
    "popc.b32 %d, %a": (32, 32, lambda a, b: bin(a).count("1")),
    "popc.b64 %d, %a": (64, 32, lambda a, b: bin(a).count("1")),
    "clz.b32 %d, %a": (32, 32, lambda a, b: 32 - a.bit_length()),
    "clz.b64 %d, %a": (64, 32, lambda a, b: 64 - a.bit_length()),
    "brev.b32 %d, %a": (32, 32, lambda a, b: int(f"{a:032b}"[::-1], 2)),
    "bfind.u32 %d, %a": (32, 32, lambda a, b: a.bit_length() - 1),
    "bfind.s32 %d, %a": (32, 32, lambda a, b: U(~a if a >> 31 else a, 32).bit_length() - 1),
    "bfind.shiftamt.u32 %d, %a": (32, 32, lambda a, b: 32 - a.bit_length() if a else -1),
    "bfe.u32 %d, %a, 5, 9": (32, 32, lambda a, b: bfe(a, 5, 9, 32, False)),
    "bfe.s32 %d, %a, 20, 30": (32, 32, lambda a, b: bfe(a, 20, 30, 32, True)),
    "bfe.s32 %d, %a, %b, 4": (32, 32, lambda a, b: bfe(a, b, 4, 32, True)),
    "bfe.u64 %d, %a, 33, 20": (64, 64, lambda a, b: bfe(a, 33, 20, 64, False)),
    "bfi.b32 %d, %a, %b, 8, 12": (32, 32, lambda a, b: (b & ~(0xFFF << 8)) | (a & 0xFFF) << 8),
    "bfi.b64 %d, %a, %b, 40, 24": (64, 64, lambda a, b: (b & ~(0xFFFFFF << 40)) | (a & 0xFFFFFF) << 40),
    "prmt.b32 %d, %a, %b, 0x5410": (32, 32, lambda a, b: prmt(a, b, 0x5410)),
    "prmt.b32 %d, %a, %b, 0x8F3C": (32, 32, lambda a, b: prmt(a, b, 0x8F3C)),
    "prmt.b32 %d, %a, 0, %b": (32, 32, lambda a, b: prmt(a, 0, b)),
    "lop3.b32 %d, %a, %b, 0x0F0F00FF, 0x96": (32, 32, lambda a, b: a ^ b ^ 0x0F0F00FF),
    "lop3.b32 %d, %a, %b, %a, 0xCA": (32, 32, lambda a, b: (a & b) | (~a & a)),
    "sad.u32 %d, %a, %b, 3": (32, 32, lambda a, b: abs(a - b) + 3),
    "dp4a.s32.u32 %d, %a, %b, 9": (32, 32, lambda a, b: 9 + sum(S(a >> s, 8) * U(b >> s, 8) for s in (0, 8, 16, 24))),
    "selp.b32 %d, %a, %b, 1": (32, 32, lambda a, b: a),
    "cvt.s64.s32 %d, %a": (32, 64, lambda a, b: S(a, 32)),
    "cvt.u64.u32 %d, %a": (32, 64, lambda a, b: a),
    "cvt.u16.u32 %d, %a": (32, 16, lambda a, b: a),
    "cvt.s8.s32 %d, %a": (32, 32, lambda a, b: S(a, 8)),
    "cvt.sat.s8.s32 %d, %a": (32, 32, lambda a, b: max(-128, min(127, S(a, 32)))),
    "cvt.sat.u8.s32 %d, %a": (32, 32, lambda a, b: max(0, min(255, S(a, 32)))),
    "mov.b32 {_, %d}, %a": (32, 16, lambda a, b: a >> 16),
    "add.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0": (32, 32, lambda a, b: a + b >> 32),
    "sub.cc.u32 %d, %a, %b; subc.u32 %d, 0, 0": (32, 32, lambda a, b: -(a < b)),
    "mad.lo.cc.u32 %d, %a, %b, %a; madc.hi.u32 %d, %a, %b, 0": (32, 32, lambda a, b: a * b + a >> 32),
}


@pytest.mark.parametrize("line", INTEGER)
def test_integer(line):
    bits, out_bits, reference = INTEGER[line]
    a, b = integers(bits, 1), integers(bits, 2)
    if line.startswith(("shl.b32", "shr.u32", "shr.s32", "bfe.s32 %d, %a, %b")):
        b = [x % 40 for x in b]
    got = evaluate(line + ";", (f"b{bits}", tensor(a, bits)), (f"b{bits}", tensor(b, bits)), result=f"b{out_bits}")
    for x, y, z in zip(a, b, got.tolist(), strict=True):
        expected = reference(x, y)
        assert expected is None or z == signed(expected, out_bits), (hex(x), hex(y))


FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-40,
    -1e-40,
    3e38,
    -3e38,
    math.inf,
    -math.inf,
    math.nan,
    2.5,
    3.5,
    -2.5,
    65504.0,
    65520.0,
    1e-8,
    1 / 3,
]


def floats(seed: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(77, generator=generator) * 4)
    return torch.cat([torch.tensor(FLOATS), torch.randn(77, generator=generator) * scale])[
        torch.randperm(96, generator=generator)
    ].to(dtype)


def flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, x * 0, x)


def fmin(a, b):  # PTX orders the zeros
    return torch.where((a == 0) & (b == 0), torch.where(torch.signbit(a), a, b), torch.fmin(a, b))


FLOAT = {
    "add.f32 %d, %a, %b;": lambda a, b: a + b,
    "sub.rn.f32 %d, %a, %b;": lambda a, b: a - b,
    "mul.f32 %d, %a, %b;": lambda a, b: a * b,
    "mul.ftz.f32 %d, %a, %b;": lambda a, b: flushed(flushed(a) * flushed(b)),
    "add.sat.f32 %d, %a, %b;": lambda a, b: (a + b).nan_to_num(0.0).clamp(0, 1) + 0.0,
    "fma.rn.f32 %d, %a, %b, %a;": lambda a, b: (
        a.double() * b.double() + a.double()
    ).float(),  # exact: 48 bits and one rounding
    "div.rn.f32 %d, %a, %b;": lambda a, b: a / b,
    "rcp.rn.f32 %d, %a;": lambda a, b: 1 / a,
    "sqrt.rn.f32 %d, %a;": lambda a, b: a.double().sqrt().float(),
    "min.f32 %d, %a, %b;": fmin,
    "max.f32 %d, %a, %b;": lambda a, b: -fmin(-a, -b),
    "max.NaN.f32 %d, %a, %b;": lambda a, b: torch.maximum(a, b),
    "neg.f32 %d, %a;": lambda a, b: -a,
    "abs.f32 %d, %a;": lambda a, b: a.abs(),
    "copysign.f32 %d, %a, %b;": lambda a, b: torch.copysign(b, a),
    "ex2.approx.f32 %d, %a;": lambda a, b: torch.exp2(a),
    "lg2.approx.f32 %d, %a;": lambda a, b: torch.log2(a),
    "rsqrt.approx.f32 %d, %a;": lambda a, b: torch.rsqrt(a),
    "tanh.approx.f32 %d, %a;": lambda a, b: torch.tanh(a),
    "sin.approx.f32 %d, %a;": lambda a, b: torch.sin(a),
    "cvt.rni.f32.f32 %d, %a;": lambda a, b: torch.round(a),
    "cvt.rzi.f32.f32 %d, %a;": lambda a, b: torch.trunc(a),
    "cvt.rmi.f32.f32 %d, %a;": lambda a, b: torch.floor(a),
    "cvt.sat.f32.f32 %d, %a;": lambda a, b: a.nan_to_num(0.0).clamp(0, 1) + 0.0,
    "setp.lt.f32 %q, %a, %b; selp.f32 %d, %a, %b, %q;": lambda a, b: torch.where(a < b, a, b),
    "setp.geu.f32 %q, %a, %b; selp.f32 %d, %a, %b, %q;": lambda a, b: torch.where(a < b, b, a),
    "setp.ne.and.f32 %q, %a, %b, 0; selp.f32 %d, %a, %b, %q;": lambda a, b: b,
    "setp.nan.f32 %q, %a, %b; @%q mov.f32 %d, %a; @!%q mov.f32 %d, %b;": lambda a, b: torch.where(
        a.isnan() | b.isnan(), a, b
    ),
}


def same(got: torch.Tensor, expected: torch.Tensor, ulps: int = 0) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf)
    if ulps:
        torch.testing.assert_close(got, expected, rtol=ulps * 2.0**-23, atol=1e-37)
    else:
        assert torch.equal(got, expected)
        assert torch.equal(torch.signbit(got), torch.signbit(expected))


@pytest.mark.parametrize("line", FLOAT)
def test_float(line):
    a, b = floats(1), floats(2)
    got = evaluate(line, ("f32", a), ("f32", b), result="f32")
    same(got, FLOAT[line](a, b), ulps=2 if "approx" in line or "fma" in line else 0)


@pytest.mark.parametrize(("mode", "toward"), [("rz", "zero"), ("rm", -math.inf), ("rp", math.inf)])
@pytest.mark.parametrize("operation", ["add", "mul", "div"])
def test_directed_rounding(operation, mode, toward):
    a, b = torch.randn(96), torch.randn(96)
    exact = {"add": a.double() + b, "mul": a.double() * b, "div": a.double() / b}[operation]
    got = evaluate(f"{operation}.{mode}.f32 %d, %a, %b;", ("f32", a), ("f32", b), result="f32")
    nearest = exact.float()
    error = nearest.double() - exact
    wrong = {"rz": error * exact.sign() > 0, "rm": error > 0, "rp": error < 0}[mode]
    target = {"rz": torch.zeros(96), "rm": torch.full((96,), -math.inf), "rp": torch.full((96,), math.inf)}[mode]
    assert torch.equal(got, torch.where(wrong, torch.nextafter(nearest, target), nearest))


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_conversions_and_arithmetic(name, dtype):
    x = floats(3)
    narrowed = evaluate(f"cvt.rn.{name}.f32 %d, %a;", ("f32", x), result="b16").view(dtype)
    same(narrowed.float(), x.to(dtype).float())
    every = torch.arange(-512, 512, dtype=torch.int32).mul(64).to(torch.int16)
    for half in every.split(512):
        same(evaluate(f"cvt.f32.{name} %d, %a;", ("b16", half), result="f32"), half.view(dtype).float())
    a, b = floats(4).to(dtype), floats(5).to(dtype)
    bits = [("b16", a.view(torch.int16)), ("b16", b.view(torch.int16))]
    for operation, reference in (
        ("add", a + b),
        ("mul", a * b),
        ("fma.rn", (a.double() * b.double() + a.double()).to(dtype)),
    ):
        mods = "" if "." in operation else ".rn"
        tail = ", %a" if operation.startswith("fma") else ""
        got = evaluate(f"{operation}{mods}.{name} %d, %a, %b{tail};", *bits, result="b16").view(dtype)
        same(got.float(), reference.float())


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("relation", ["gt", "leu"])
def test_packed_comparison(relation, name, dtype):
    """One predicate for each half, a NaN in either being unordered."""
    a, b = floats(8).to(dtype), floats(9).to(dtype)
    pair = [("b32", torch.stack([t, t.flip(0)], 1).contiguous().view(torch.int32).flatten()) for t in (a, b)]
    line = f"setp.{relation}.{name}x2 %q|%r, %a, %b; selp.b32 %d, 1, 0, %q; @%r add.s32 %d, %d, 2;"
    passed = (a > b) if relation == "gt" else ~(a > b)
    assert torch.equal(evaluate(line, *pair, result="b32"), passed.int() + 2 * passed.flip(0))


def test_packed_halves():
    a, b = floats(6).bfloat16(), floats(7).bfloat16()
    pair = [("b32", torch.stack([t, t.flip(0)], 1).contiguous().view(torch.int32).flatten()) for t in (a, b)]
    got = evaluate("fma.rn.relu.bf16x2 %d, %a, %b, %a;", *pair, result="b32").view(torch.bfloat16).view(-1, 2)
    expected = (a.double() * b.double() + a.double()).bfloat16().relu()
    same(got[:, 0].float().abs(), expected.float().abs())
    same(got[:, 1].float().abs(), expected.flip(0).float().abs())
    x, y = floats(8), floats(9)
    for relu in ("", ".relu"):
        packed = (
            evaluate(f"cvt.rn{relu}.bf16x2.f32 %d, %a, %b;", ("f32", x), ("f32", y), result="b32")
            .view(torch.bfloat16)
            .view(-1, 2)
        )
        for half, source in ((packed[:, 1], x), (packed[:, 0], y)):
            same(half.float().abs(), (source.relu() if relu else source).bfloat16().float().abs())


def test_other_conversions():
    x = floats(10)
    tf32 = evaluate("cvt.rna.tf32.f32 %d, %a;", ("f32", x), result="b32").view(torch.float32)
    finite = x.isfinite() & (x.abs() < 1e38) & (x.abs() > 1e-30)
    assert ((tf32 - x).abs() <= x.abs() * 2.0**-11)[finite].all()
    assert not (tf32.view(torch.int32) & 0xFFF)[finite].any()
    for name, dtype in (("s32", torch.int32), ("s64", torch.int64)):
        got = evaluate(f"cvt.rzi.{name}.f32 %d, %a;", ("f32", x), result="b32" if name == "s32" else "b64")
        limits = torch.iinfo(dtype)
        expected = [
            0 if math.isnan(v) else limits.max if v >= limits.max else limits.min if v <= limits.min else int(v)
            for v in x.tolist()
        ]
        assert got.tolist() == expected
    n = tensor(integers(32, 3), 32)
    same(evaluate("cvt.rn.f32.s32 %d, %a;", ("b32", n), result="f32"), n.float())
    same(evaluate("cvt.rn.f32.u32 %d, %a;", ("b32", n), result="f32"), (n.long() & 0xFFFFFFFF).float())
    same(evaluate("cvt.rn.f32.f64 %d, %a;", ("f64", x.double() * 1.1), result="f32"), (x.double() * 1.1).float())
    assert torch.equal(
        evaluate("cvt.f64.f32 %d, %a;", ("f32", x), result="f64").nan_to_num(7), x.double().nan_to_num(7)
    )
