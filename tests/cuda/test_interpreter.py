"""The PTX interpreter: exact values, and launches that it must refuse."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda import ptx, ptx_parser
from tests.cuda.ptx_values import ARITHMETIC, compare, convert

FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
WORD = st.integers(0, 2**32 - 1)


def one(name, modifiers, *values, dtype=np.float32):
    sources = [np.array([value], dtype) for value in values]
    with np.errstate(all="ignore"):
        return ARITHMETIC[name](modifiers, *sources)[0]


@given(FLOAT, FLOAT, FLOAT)
def test_fma_rounds_the_exact_value_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = one("fma", ("rn", "f32"), a, b, c)
    if not np.isfinite(got):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    neighbours = [np.nextafter(got, np.float32(s)) for s in (-np.inf, np.inf)]
    error = abs(exact - Fraction(float(got)))
    for neighbour in neighbours:
        if np.isfinite(neighbour):
            other = abs(exact - Fraction(float(neighbour)))
            assert error <= other
            if error == other:  # a tie goes to the even one
                assert got.view(np.uint32) % 2 == 0


@given(WORD, WORD, WORD, st.integers(0, 255))
def test_lop3_is_its_truth_table(a, b, c, table):
    got = one("lop3", ("b32",), a, b, c, table, dtype=np.uint32)
    for bit in range(32):
        row = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        assert int(got) >> bit & 1 == table >> row & 1


@given(WORD, WORD, st.integers(0, 0x7777))
def test_prmt_picks_bytes(a, b, selector):
    got = int(one("prmt", ("b32",), a, b, selector & 0x7777, dtype=np.uint32))
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = bytes(pool[selector >> 4 * i & 7] for i in range(4))
    assert got.to_bytes(4, "little") == picked


@given(WORD, st.integers(0, 40), st.integers(0, 32))
def test_bfe_is_a_field_of_bits(a, start, length):
    got = one("bfe", ("u32",), a, start, length, dtype=np.uint32)
    assert int(got) == (a >> start) % (1 << length)


@given(WORD, WORD, st.integers(0, 70))
def test_funnel_shift_takes_the_middle_of_a_pair(low, high, by):
    pair = high << 32 | low
    left = one("shf", ("l", "wrap", "b32"), low, high, by, dtype=np.uint32)
    assert int(left) == pair << by % 32 >> 32 & 0xFFFFFFFF
    right = one("shf", ("r", "clamp", "b32"), low, high, by, dtype=np.uint32)
    assert int(right) == pair >> min(by, 32) & 0xFFFFFFFF


def test_comparisons_with_nan():
    a, b = np.array([np.nan, 1.0], np.float32), np.array([1.0, 1.0], np.float32)
    assert compare("eq", a, b).tolist() == [False, True]
    assert compare("ne", a, b).tolist() == [False, False]
    assert compare("neu", a, b).tolist() == [True, False]
    assert compare("ltu", a, b).tolist() == [True, False]
    assert compare("nan", a, b).tolist() == [True, False]


def test_conversions_to_integers_saturate_and_nan_is_zero():
    values = np.array([np.nan, 1e20, -1e20, 2.5, 3.5, -2.5], np.float32)
    got = convert(("rni", "s32", "f32"), values).tolist()
    assert got == [0, 2**31 - 1, -(2**31), 2, 4, -2]
    assert convert(("rzi", "u8", "f32"), values).tolist() == [0, 255, 0, 2, 3, 0]


KERNEL = """
.visible .entry k(.param .u64 p)
.maxntid 64, 1, 1
{{
    .reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [p];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    {body}
    ret;
}}
"""


def run(body, size):
    entry = ptx_parser.parse(KERNEL.format(body=body))["k"]
    out = np.zeros(size, np.uint32)
    ptx.launch(entry, 1, 64, [out])
    return out


def test_a_small_kernel():
    assert run("st.global.u32 [%rd4], %r1;", 64).tolist() == list(range(64))


@pytest.mark.parametrize(
    ("body", "size", "sentence"),
    [
        ("st.global.u32 [%rd4], %r1;", 63, "out of bounds, byte 256 of 252"),
        ("st.global.u32 [%rd4+2], %r1;", 99, "misaligned 4-byte access"),
        ("st.global.u32 [%rd3], %r1;", 64, "outside every buffer"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", 64, "bar.sync not reached"),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 bar.sync 0;"
            "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;",
            64,
            "some lanes of its warp do not reach",
        ),
        ("ex2.approx.f32 %r1, %r1;", 64, "no such instruction"),
    ],
)
def test_a_launch_that_is_refused(body, size, sentence):
    with pytest.raises(ptx_parser.PtxError, match=sentence):
        run(body, size)


def test_a_shuffle_with_a_lane_that_is_elsewhere_is_refused():
    body = "setp.lt.u32 %p1, %r1, 8;@%p1 shfl.sync.bfly.b32 %r2|%p2, %r1, 16, 31, -1;"
    with pytest.raises(ptx_parser.PtxError, match="a lane that is elsewhere"):
        run(body, 64)
