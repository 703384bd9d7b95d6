"""The emulator itself: shuffles, reductions, matrices in shared memory, tensor cores."""

import numpy as np
import pytest
import torch
from small_kernels import Device, each_lane

LANE = np.arange(32)
VALUES = np.random.default_rng(1).integers(0, 2**31, 32).astype(np.int32)


@pytest.mark.parametrize(
    ("operands", "source"),
    [
        ("bfly.b32 %r0, %r1, 8, 31, -1", LANE ^ 8),
        ("idx.b32 %r0, %r1, 5, 31, -1", np.full(32, 5)),
        ("up.b32 %r0, %r1, 3, 0, -1", np.where(LANE < 3, LANE, LANE - 3)),
        ("down.b32 %r0, %r1, 3, 31, -1", np.where(LANE > 28, LANE, LANE + 3)),
        # Segments of 8: 24 in the mask of bits that stay.
        ("down.b32 %r0, %r1, 3, 6175, -1", np.where(LANE % 8 > 4, LANE, LANE + 3)),
    ],
)
def test_shuffles(operands, source):
    assert np.array_equal(each_lane(f"shfl.sync.{operands};", VALUES, result=np.int32), VALUES[source])


@pytest.mark.parametrize(
    ("name", "want"), [("add", VALUES.sum(dtype=np.int32)), ("max", VALUES.max()), ("min", VALUES.min())]
)
def test_reductions(name, want):
    assert (each_lane(f"redux.sync.{name}.s32 %r0, %r1, -1;", VALUES, result=np.int32) == want).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_to_shared_memory_and_back(transposed):
    """Four matrices, stored as they are and loaded transposed, or the other way round."""
    data = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.ascontiguousarray(data).view(np.uint32).reshape(4, 32)  # lane 4 i + j: row i, pair j
    out = np.zeros((4, 32), np.uint32)
    names = "{%r1, %r2, %r3, %r4}"
    store, load = (".trans", "") if transposed else ("", ".trans")
    body = f"""
        shl.b32 %r10, %r90, 4; mul.wide.u32 %rd1, %r90, 4; add.s64 %rd2, %rd40, %rd1; add.s64 %rd3, %rd41, %rd1;
        ld.global.b32 %r1, [%rd2]; ld.global.b32 %r2, [%rd2+128]; ld.global.b32 %r3, [%rd2+256]; ld.global.b32 %r4, [%rd2+384];
        stmatrix.sync.aligned.m8n8.x4{store}.shared.b16 [%r10], {names};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{load}.shared.b16 {names}, [%r10];
        st.global.b32 [%rd3], %r1; st.global.b32 [%rd3+128], %r2; st.global.b32 [%rd3+256], %r3; st.global.b32 [%rd3+384], %r4;
    """
    device = Device(registers, out)
    assert device.run(device.launch(body, shared=512)) == []
    want = np.ascontiguousarray(data.transpose(0, 2, 1)).view(np.uint32).reshape(4, 32)
    assert np.array_equal(out, want)


def fragments(matrix: torch.Tensor, count: int) -> np.ndarray:
    """Registers [count, 32] of A (16 x 16, count 4) as the PTX ISA lays them out; of B^T (8 x 16) with count 2."""
    found = np.zeros((count, 32), np.uint32)
    bits = matrix.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    for lane in range(32):
        for i in range(count):
            row = lane // 4 + (8 * (i % 2) if count == 4 else 0)
            column = 2 * (lane % 4) + 8 * (i // 2 if count == 4 else i)
            found[i, lane] = bits[row, column] | bits[row, column + 1] << 16
    return found


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mma(kind, dtype):
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*shape, generator=draw) for shape in ((16, 16), (8, 16), (16, 8)))
    a, b = a.to(dtype), b.to(dtype)
    given = np.concatenate([fragments(a, 4), fragments(b, 2)])
    rows = [LANE // 4 + 8 * (i // 2) for i in range(4)]
    columns = [2 * (LANE % 4) + i % 2 for i in range(4)]
    addends = np.stack([c.numpy()[r, k] for r, k in zip(rows, columns, strict=True)])
    out = np.zeros((4, 32), np.float32)
    loads = "\n".join(f"ld.global.b32 %r{i}, [%rd2+{128 * i}];" for i in range(6))
    adds = "\n".join(f"ld.global.b32 %r{6 + i}, [%rd3+{128 * i}];" for i in range(4))
    stores = "\n".join(f"st.global.b32 [%rd4+{128 * i}], %r{20 + i};" for i in range(4))
    body = f"""
        mul.wide.u32 %rd1, %r90, 4; add.s64 %rd2, %rd40, %rd1; add.s64 %rd3, %rd41, %rd1; add.s64 %rd4, %rd42, %rd1;
        {loads} {adds}
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
            {{%r20, %r21, %r22, %r23}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%r6, %r7, %r8, %r9}};
        {stores}
    """
    device = Device(given, addends, out)
    assert device.run(device.launch(body)) == []
    want = (a.double() @ b.double().T + c.double()).float().numpy()
    got = np.zeros((16, 8), np.float32)
    for i in range(4):
        got[rows[i], columns[i]] = out[i]
    np.testing.assert_array_equal(got, want)


def wgmma(wait: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A 64 x 16 times B^T 8 x 16, four warps, B in shared memory without a swizzle: two pieces of 8 x 16 bytes."""
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((64, 16), (8, 16)))
    left = np.concatenate([fragments(a[16 * w : 16 * w + 16], 4) for w in range(4)])
    pieces = np.concatenate(
        [b[:, :8].reshape(-1).view(torch.int32).numpy(), b[:, 8:].reshape(-1).view(torch.int32).numpy()]
    )
    out = np.zeros((64, 8), np.float32)
    loads = "\n".join(f"ld.global.b32 %r{i}, [%rd2+{128 * i}];" for i in range(4))
    body = f"""
        and.b32 %r50, %r90, 31; shr.u32 %r51, %r90, 5;
        mul.wide.u32 %rd1, %r51, 512; mad.wide.u32 %rd1, %r50, 4, %rd1; add.s64 %rd2, %rd40, %rd1;
        {loads}
        setp.lt.s32 %p1, %r90, 64;
        mul.wide.u32 %rd3, %r90, 4; add.s64 %rd3, %rd3, %rd41;
        @%p1 ld.global.b32 %r52, [%rd3];
        shl.b32 %r53, %r90, 2;
        @%p1 st.shared.b32 [%r53], %r52;
        bar.sync 0;
        mov.b64 %rd5, {(128 >> 4) << 16 | (256 >> 4) << 32};
        mov.pred %p2, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {{%r20, %r21, %r22, %r23}}, {{%r0, %r1, %r2, %r3}}, %rd5, %p2, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        {wait}
        shr.u32 %r54, %r50, 2; and.b32 %r55, %r50, 3; mad.lo.s32 %r54, %r51, 16, %r54;
        shl.b32 %r56, %r54, 5; shl.b32 %r57, %r55, 3; add.s32 %r56, %r56, %r57;
        cvt.u64.u32 %rd6, %r56; add.s64 %rd6, %rd6, %rd42;
        st.global.v2.b32 [%rd6], {{%r20, %r21}};
        st.global.v2.b32 [%rd6+256], {{%r22, %r23}};
    """
    device = Device(left, pieces, out)
    faults = device.run(device.launch(body, threads=128, shared=256))
    return out, (a.double() @ b.double().T).float().numpy(), faults


def test_wgmma():
    got, want, faults = wgmma("wgmma.wait_group.sync.aligned 0;")
    assert faults == []
    np.testing.assert_array_equal(got, want)


def test_wgmma_that_nobody_waits_for_has_no_result():
    assert np.isnan(wgmma("wgmma.wait_group.sync.aligned 1;")[0]).all()


def test_lanes_must_be_together():
    body = "setp.lt.s32 %p1, %r90, 5; @%p1 bra OTHER; shfl.sync.bfly.b32 %r0, %r90, 1, 31, -1; OTHER: mov.b32 %r1, 0;"
    (fault,) = Device(VALUES).faults(body.replace("OTHER:", "\nOTHER:\n"))
    assert "lanes diverge" in fault
