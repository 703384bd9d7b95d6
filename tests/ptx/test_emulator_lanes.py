"""The emulator itself: instructions whose lanes are on their own, against numpy."""

import numpy as np
import pytest
import torch
from emulator.program import Fault
from small_kernels import Device, each_lane

DRAW = np.random.default_rng(0)
INTS = DRAW.integers(-(2**31), 2**31, (3, 32)).astype(np.int32)
INTS[0, :4], INTS[1, :4] = [0, -1, 2**31 - 1, -(2**31)], [1, 2, 3, 5]
FLOATS = DRAW.standard_normal((3, 32)).astype(np.float32)
FLOATS[0, :5] = [np.nan, np.inf, -np.inf, 0, -0.0]
UNSIGNED = INTS.view(np.uint32)
WIDE = INTS.astype(np.int64)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.s32 %r0, %r1, %r2;", INTS[0] + INTS[1]),
        ("sub.s32 %r0, %r1, 7;", INTS[0] - 7),
        ("mul.lo.s32 %r0, %r1, %r2;", INTS[0] * INTS[1]),
        ("mad.lo.s32 %r0, %r1, %r2, %r1;", INTS[0] * INTS[1] + INTS[0]),
        ("mul.hi.u32 %r0, %r1, %r2;", (UNSIGNED[0].astype(object) * UNSIGNED[1] >> 32).astype(np.uint32).view(np.int32)),
        ("mul.hi.s32 %r0, %r1, %r2;", (WIDE[0] * WIDE[1] >> 32).astype(np.int32)),
        ("min.s32 %r0, %r1, %r2;", np.minimum(INTS[0], INTS[1])),
        ("max.u32 %r0, %r1, %r2;", np.maximum(UNSIGNED[0], UNSIGNED[1]).view(np.int32)),
        ("and.b32 %r0, %r1, %r2;", INTS[0] & INTS[1]),
        ("xor.b32 %r0, %r1, -1;", ~INTS[0]),
        ("neg.s32 %r0, %r1;", -INTS[0]),
        ("not.b32 %r0, %r1;", ~INTS[0]),
        ("shl.b32 %r0, %r1, 5;", INTS[0] << 5),
        ("shl.b32 %r0, %r1, 40;", np.zeros(32, np.int32)),
        ("shr.s32 %r0, %r1, 40;", INTS[0] >> 31),
        ("shr.u32 %r0, %r1, 3;", (UNSIGNED[0] >> 3).view(np.int32)),
        ("bfe.u32 %r0, %r1, 5, 7;", (INTS[0] >> 5) & 127),
        ("bfe.s32 %r0, %r1, 5, 7;", (INTS[0] << 20) >> 25),
        ("div.s32 %r0, %r1, 7;", np.trunc(WIDE[0] / 7).astype(np.int32)),
        ("rem.s32 %r0, %r1, 7;", np.fmod(INTS[0], 7)),
        ("prmt.b32 %r0, %r1, %r2, 0x7531;", (
            (UNSIGNED[0] >> 8 & 255) | (UNSIGNED[0] >> 24) << 8 | (UNSIGNED[1] >> 8 & 255) << 16 | (UNSIGNED[1] >> 24) << 24
        ).view(np.int32)),
        ("prmt.b32 %r0, %r1, %r2, 0xbb33;", np.where(INTS[0] < 0, -65536, 0) | (UNSIGNED[0] >> 24).astype(np.int32) * 257),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r0, 1, 0, %p1;", (INTS[0] < INTS[1]).astype(np.int32)),
        ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r0, %r1, %r2, %p1;", np.minimum(UNSIGNED[0], UNSIGNED[1]).view(np.int32)),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r0, {%rs2, %rs1};", (UNSIGNED[0] >> 16 | UNSIGNED[0] << 16).view(np.int32)),
    ],
)  # fmt: skip
def test_integers(instruction, want):
    with np.errstate(all="ignore"):
        assert np.array_equal(each_lane(instruction, INTS[0], INTS[1], result=np.int32), want)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("mul.wide.s32 %rd0, %r1, %r2;", WIDE[0] * WIDE[1]),
        ("mad.wide.s32 %rd0, %r1, %r2, 9;", WIDE[0] * WIDE[1] + 9),
        ("cvt.s64.s32 %rd0, %r1;", WIDE[0]),
        ("cvt.u64.u32 %rd0, %r1;", UNSIGNED[0].astype(np.int64)),
        ("cvt.s64.s32 %rd1, %r1; shr.s64 %rd0, %rd1, 3;", WIDE[0] >> 3),
        ("mov.b64 %rd0, {%r1, %r2};", UNSIGNED[0].astype(np.int64) | WIDE[1] << 32),
    ],
)
def test_wide_integers(instruction, want):
    assert np.array_equal(each_lane(instruction, INTS[0], INTS[1], result=np.int64), want)


A, B, C = FLOATS


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.f32 %r0, %r1, %r2;", A + B),
        ("sub.f32 %r0, %r1, 0f3F800000;", A - 1),
        ("mul.f32 %r0, %r1, %r2;", A * B),
        ("fma.rn.f32 %r0, %r1, %r2, %r3;", (A.astype(np.float64) * B + C).astype(np.float32)),
        ("div.full.f32 %r0, %r1, %r2;", A / B),
        ("neg.f32 %r0, %r1;", -A),
        ("max.f32 %r0, %r1, %r2;", np.fmax(A, B)),
        ("max.NaN.f32 %r0, %r1, %r2;", np.maximum(A, B)),
        ("ex2.approx.f32 %r0, %r1;", np.exp2(A)),
        ("abs.f32 %r1, %r1; sqrt.rn.f32 %r0, %r1;", np.sqrt(np.abs(A))),
        ("setp.lt.f32 %p1, %r1, %r2; selp.f32 %r0, %r1, %r2, %p1;", np.where(A < B, A, B)),
        ("setp.ltu.f32 %p1, %r1, %r2; selp.f32 %r0, %r1, %r2, %p1;", np.where(~(A >= B), A, B)),
        ("setp.ne.f32 %p1, %r1, %r1; selp.f32 %r0, %r1, %r2, %p1;", B),
        ("setp.neu.f32 %p1, %r1, %r1; selp.f32 %r0, %r1, %r2, %p1;", np.where(np.isnan(A), A, B)),
        ("setp.nan.f32 %p1, %r1, %r1; @%p1 mov.b32 %r1, 0f40000000; mov.b32 %r0, %r1;", np.where(np.isnan(A), 2, A)),
        ("cvt.f64.f32 %rd1, %r1; cvt.rmi.f64.f64 %rd2, %rd1; cvt.rn.f32.f64 %r0, %rd2;", np.floor(A)),
    ],
)
def test_floats(instruction, want):
    with np.errstate(all="ignore"):
        got = each_lane(instruction, A, B, C, result=np.float32)
        np.testing.assert_array_equal(got, want)


def test_floats_become_integers_as_near_as_they_can():
    values = np.resize(np.float32([np.nan, np.inf, -np.inf, 1.5, -1.5, 3e9, -3e9]), 32)
    want = np.resize(np.int32([0, 2**31 - 1, -(2**31), 1, -1, 2**31 - 1, -(2**31)]), 32)
    assert np.array_equal(each_lane("cvt.rzi.s32.f32 %r0, %r1;", values, result=np.int32), want)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_floats_round_as_torch_does(kind, dtype):
    a, b, c = (torch.from_numpy(x) for x in FLOATS)
    low, high = a.to(dtype).view(torch.int16).numpy(), b.to(dtype).view(torch.int16).numpy()
    got = each_lane(f"cvt.rn.{kind}x2.f32 %r0, %r2, %r1;", a.numpy(), b.numpy(), result=np.uint32)
    nan = np.isnan(FLOATS[0])
    assert np.array_equal((got & 0xFFFF).astype(np.uint16)[~nan], low.view(np.uint16)[~nan])
    assert np.array_equal((got >> 16).astype(np.uint16), high.view(np.uint16))
    widened = each_lane(f"cvt.f32.{kind} %r0, %rs1;", low, result=np.float32)
    np.testing.assert_array_equal(widened, a.to(dtype).float().numpy())
    pairs = [torch.stack([x, y], 1).to(dtype) for x, y in ((a, b), (b, c), (c, a))]
    given = [p.view(torch.int32)[:, 0].numpy() for p in pairs]
    fused = each_lane(f"fma.rn.{kind}x2 %r0, %r1, %r2, %r3;", *given, result=np.uint32)
    want = (pairs[0].double() * pairs[1].double() + pairs[2].double()).to(dtype)
    got_pairs = torch.from_numpy(fused.view(np.int32)).view(dtype).view(32, 2)
    torch.testing.assert_close(got_pairs, want, rtol=0, atol=0, equal_nan=True)


def test_what_was_never_written_is_no_number():
    got = each_lane("add.f32 %r0, %r1, %r55;", A, result=np.float32)
    assert np.isnan(got).all()


def test_a_guard_leaves_the_other_lanes_as_they_are():
    got = each_lane("mov.b32 %r0, %r1; setp.lt.s32 %p1, %r90, 10; @!%p1 mov.b32 %r0, 3;", INTS[0], result=np.int32)
    assert np.array_equal(got, np.where(np.arange(32) < 10, INTS[0], 3))


def test_lanes_diverge_and_meet_again():
    """Lane i adds 2 i times; lanes of odd numbers take another branch first."""
    body = """
        and.b32 %r5, %r90, 1; mov.b32 %r0, 0; mov.b32 %r6, %r90;
        setp.eq.b32 %p1, %r5, 1;
        @%p1 bra ODD;
        mov.b32 %r0, 1000;
    ODD:
        setp.le.s32 %p2, %r6, 0;
        @%p2 bra DONE;
        add.s32 %r0, %r0, 2; sub.s32 %r6, %r6, 1;
        bra.uni ODD;
    DONE:
        shfl.sync.bfly.b32 %r7, %r0, 1, 31, -1;
        add.s32 %r0, %r0, %r7;
    """
    lane = np.arange(32)
    alone = 2 * lane + np.where(lane % 2 == 0, 1000, 0)
    assert np.array_equal(each_lane(body, INTS[0], result=np.int32), alone + alone[lane ^ 1])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("frobnicate.b32 %r0, %r1;", "unknown instruction: frobnicate.b32"),
        ("add.s32 %r0, %r1, %q7;", "%q7 is declared nowhere"),
        ("fence.acq_rel.gpu;", "unknown instruction: fence"),
        (".shared .align 4 .b8 own[16];", "a directive that is not known"),
    ],
)
def test_what_is_not_known_is_refused(body, words):
    with pytest.raises(Fault, match=words):
        Device(INTS).launch(body)
