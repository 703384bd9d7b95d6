"""The emulator itself: what it finds and what it rightly does not find. Bounds, races, barriers, order of launches."""

import numpy as np
import pytest
from emulator.program import Fault
from small_kernels import Device

ADDRESS = "mul.wide.u32 %rd1, %r92, 4; add.s64 %rd2, %rd40, %rd1;"
SEEDS = range(6)
TRIGGER, WAIT = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"


def numbers(count: int = 64) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


# ---- bounds and alignment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (f"{ADDRESS} ld.global.b32 %r0, [%rd2+256];", "byte 256 of array 0, which has 256"),
        (f"{ADDRESS} ld.global.b32 %r0, [%rd2+-4];", "outside of every buffer"),
        (f"{ADDRESS} ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%rd2+4];", "misaligned for 16 bytes"),
        ("ld.global.b8 %r0, [%rd5];", "of array 0, which has 256"),  # an address that was never computed
        ("st.shared.b32 [global_smem+64], %r90;", "byte 64 of 64 bytes of shared memory"),
        ("shl.b32 %r1, %r90, 1; st.shared.b32 [%r1], %r90;", "misaligned for 4 bytes"),
    ],
)
def test_accesses_outside_of_memory(body, words):
    (fault,) = Device(numbers()).faults(body, shared=64)
    assert words in fault


def test_lanes_that_are_masked_off_may_point_anywhere():
    device = Device(numbers())
    body = f"{ADDRESS} setp.lt.s32 %p1, %r90, 3; @!%p1 add.s64 %rd2, %rd2, 9999; @%p1 st.global.b32 [%rd2], 7;"
    assert device.faults(body) == []
    assert device.arrays[0][:4].tolist() == [7, 7, 7, 3]


def test_memory_that_no_kernel_may_write():
    (fault,) = Device(numbers(), writable=False).faults(f"{ADDRESS} st.global.b32 [%rd2], 1;")
    assert "read only" in fault


# ---- shared memory and barriers ------------------------------------------------------------------------------------

EXCHANGE = """
    shl.b32 %r1, %r90, 2; st.shared.b32 [%r1], %r90;
    {barrier}
    xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2];
    {address} st.global.b32 [%rd2], %r3;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_warps_exchange_values_over_a_barrier(seed):
    device = Device(numbers())
    body = EXCHANGE.format(barrier="bar.sync 0;", address=ADDRESS)
    assert device.run(device.launch(body, threads=64, shared=256), seed=seed) == []
    assert np.array_equal(device.arrays[0], numbers() ^ 32)


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_exchange_without_a_barrier(seed, barrier):
    device = Device(numbers())
    body = EXCHANGE.format(barrier=barrier, address=ADDRESS)
    assert "race in shared memory" in device.run(device.launch(body, threads=64, shared=256), seed=seed)[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_used_again_without_a_barrier(seed):
    body = EXCHANGE.format(barrier="bar.sync 0;", address=ADDRESS) + "st.shared.b32 [%r1], 5;"
    device = Device(numbers())
    assert "race in shared memory" in device.run(device.launch(body, threads=64, shared=256), seed=seed)[0]


def test_copies_of_one_value_are_no_race():
    assert Device(numbers()).faults("st.shared.b32 [global_smem], 5;", threads=64, shared=16) == []
    assert Device(numbers()).faults("st.shared.b32 [global_smem], %r90;", threads=64, shared=16) != []


def test_bytes_side_by_side_are_no_race():
    body = "mov.b32 {%rs1, %rs2}, %r90; shl.b32 %r1, %r90, 1; st.shared.b16 [%r1], %rs1;"
    assert (
        Device(numbers()).faults(body.replace("shl.b32 %r1, %r90, 1", "mov.b32 %r1, 0"), threads=64, shared=128) != []
    )
    assert Device(numbers()).faults(body, threads=64, shared=128) == []


NAMED = """
    shr.u32 %r5, %r90, 6; setp.eq.u32 %p1, %r5, 0;
    @!%p1 bra SECOND;
    bar.sync 1, 64;
    bra.uni DONE;
SECOND:
    {second}
DONE:
"""


def test_named_barriers_count_their_own_threads():
    assert Device(numbers(128)).faults(NAMED.format(second="bar.sync 2, 64;"), threads=128) == []
    (fault,) = Device(numbers(128)).faults(NAMED.format(second="bar.sync 2, 128;"), threads=128)
    assert "deadlock" in fault
    assert "AT_BARRIER" in fault


@pytest.mark.parametrize("seed", SEEDS)
def test_a_named_barrier_orders_its_warps_only(seed):
    """Warps 0 and 1 meet, and warps 2 and 3; then 2 reads what 0 wrote."""
    meet = NAMED.format(second="bar.sync 2, 64;")
    pair = "xor.b32 %r2, %r1, {other};"
    for other, racy in ((128, False), (256, True)):
        body = EXCHANGE.format(barrier=meet, address=ADDRESS).replace(pair.format(other=128), pair.format(other=other))
        device = Device(numbers(128))
        assert bool(device.run(device.launch(body, threads=128, shared=512), seed=seed)) == racy


def test_a_barrier_where_lanes_diverge():
    (fault,) = Device(numbers()).faults(
        "setp.lt.s32 %p1, %r90, 5; @%p1 bra OTHER;\nbar.sync 0;\nOTHER:\nmov.b32 %r1, 0;"
    )
    assert "lanes diverge" in fault


def test_warps_that_have_ended_are_not_waited_for():
    body = "setp.lt.s32 %p1, %r90, 32; @%p1 ret; bar.sync 0;"
    assert Device(numbers()).faults(body, threads=64) == []


def test_a_loop_without_an_end():
    (fault,) = Device(numbers()).faults("AGAIN:\nbra.uni AGAIN;".replace("AGAIN:", "\nAGAIN:"))
    assert "no end after" in fault


# ---- asynchronous copies -------------------------------------------------------------------------------------------

COPY = """
    shl.b32 %r1, %r90, 4; mul.wide.u32 %rd1, %r90, 16; add.s64 %rd2, %rd40, %rd1; add.s64 %rd3, %rd41, %rd1;
    cp.async.cg.shared.global [%r1], [%rd2], 0x10, %r2;
    cp.async.commit_group;
    {wait}
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1];
    st.global.v4.b32 [%rd3], {{%r4, %r5, %r6, %r7}};
"""


def copied(wait: str, taken: int = 16) -> np.ndarray:
    out = np.zeros(128, np.int32)
    device = Device(numbers(128), out)
    assert device.run(device.launch(f"mov.b32 %r2, {taken};" + COPY.format(wait=wait), shared=512)) == []
    return out


def test_copies_land_when_they_are_waited_for_and_not_before():
    assert np.array_equal(copied("cp.async.wait_group 0;"), numbers(128))
    assert np.array_equal(copied("cp.async.wait_all;"), numbers(128))
    assert (copied("cp.async.wait_group 1;") == -1).all()  # what shared memory held: NaN


def test_copies_of_fewer_bytes_are_filled_up_with_zeros():
    assert np.array_equal(
        copied("cp.async.wait_group 0;", taken=4).reshape(32, 4), numbers(128).reshape(32, 4) * [1, 0, 0, 0]
    )
    assert (copied("cp.async.wait_group 0;", taken=0) == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_to_what_another_warp_still_reads(seed):
    body = """
        xor.b32 %r8, %r90, 32; shl.b32 %r9, %r8, 4; ld.shared.b32 %r10, [%r9];
        shl.b32 %r1, %r90, 4; mul.wide.u32 %rd1, %r90, 16; add.s64 %rd2, %rd40, %rd1;
        cp.async.cg.shared.global [%r1], [%rd2], 0x10;
        cp.async.commit_group; cp.async.wait_group 0;
    """
    device = Device(numbers(256))
    assert "race in shared memory" in device.run(device.launch(body, threads=64, shared=1024), seed=seed)[0]


SOURCE = "mul.wide.u32 %rd1, %r90, 16; add.s64 %rd2, %rd40, %rd1;"
ISSUE = "shl.b32 %r1, %r90, 4; cp.async.cg.shared.global [%r1], [%rd2], 0x10; cp.async.commit_group;"
LAND = "cp.async.wait_group 0;"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_issued_ahead_of_the_wait_for_the_launch_before(seed):
    """What it reads is not there yet, although it lands behind the wait."""
    for order, racy in (((WAIT, ISSUE), False), ((ISSUE, WAIT), True)):
        device = Device(np.zeros(128, np.int32))
        store = device.launch(f"{TRIGGER} {SOURCE} st.global.b32 [%rd2], 7;", pdl=True)
        load = device.launch(f"{SOURCE} {' '.join(order)} {LAND}", shared=512, pdl=True)
        assert bool(device.run(store, load, seed=seed)) == racy


@pytest.mark.parametrize("by", ["another warp", "its own warp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_source_of_a_copy_written_before_it_lands(seed, by):
    """A barrier orders the issue in front of the store, not the landing."""
    stores = "ge" if by == "another warp" else "lt"
    body = f"""
        setp.lt.s32 %p1, %r90, 32; setp.{stores}.s32 %p2, %r90, 32;
        and.b32 %r3, %r90, 31; mul.wide.u32 %rd1, %r3, 16; add.s64 %rd2, %rd40, %rd1; shl.b32 %r1, %r3, 4;
        @%p1 cp.async.cg.shared.global [%r1], [%rd2], 0x10;
        cp.async.commit_group;
        {{early}}
        bar.sync 0;
        @%p2 st.global.b32 [%rd2], 7;
        {{late}}
    """
    for early, late in (("", LAND), (LAND, "")):
        device = Device(numbers(128))
        launch = device.launch(body.format(early=early, late=late), threads=64, shared=512)
        assert bool(device.run(launch, seed=seed)) == bool(late)


def test_the_seed_decides_when_a_copy_reads():
    """A store between issue and landing is in the copy with some seeds, and is not with others."""
    body = f"{SOURCE} {ISSUE} st.global.b32 [%rd2], 7; {LAND} ld.shared.b32 %r2, [%r1]; add.s64 %rd3, %rd41, %rd1;"
    found = set()
    for seed in range(20):
        device = Device(np.zeros(128, np.int32), np.zeros(128, np.int32))
        device.run(device.launch(f"{body} st.global.b32 [%rd3], %r2;", shared=512), seed=seed)
        found.add(int(device.arrays[1][0]))
    assert found == {0, 7}


# ---- blocks of one launch ------------------------------------------------------------------------------------------

# The last block to arrive adds up what all of them stored.
LAST_ARRIVAL = """
    mul.wide.u32 %rd1, %r91, 4; add.s64 %rd2, %rd40, %rd1;
    setp.eq.s32 %p1, %r90, 0;
    add.s32 %r1, %r91, 1;
    @%p1 st.global.b32 [%rd2], %r1;
    bar.sync 0;
    @%p1 atom.global.gpu.{order}.add.u32 %r2, [%rd41], 1;
    shfl.sync.idx.b32 %r2, %r2, 0, 31, -1;
    setp.ne.s32 %p2, %r2, 3;
    @%p2 ret;
    {load} {{%r3, %r4, %r5, %r6}}, [%rd40];
    add.s32 %r3, %r3, %r4; add.s32 %r3, %r3, %r5; add.s32 %r3, %r3, %r6;
    @%p1 st.global.b32 [%rd41], 0;
    @%p1 st.global.b32 [%rd42], %r3;
"""


@pytest.mark.parametrize("order", ["acq_rel", "relaxed", "acquire", "release"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_to_arrive(seed, order):
    device = Device(np.zeros(4, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))
    body = LAST_ARRIVAL.format(order=order, load="ld.global.cg.v4.b32")
    faults = device.run(device.launch(body, blocks=4), seed=seed)
    assert bool(faults) == (order != "acq_rel")
    assert device.arrays[2][0] == 10
    assert device.arrays[1][0] == 0


@pytest.mark.parametrize(
    ("release", "acquire"), [("release", "acquire"), ("relaxed", "acquire"), ("release", "relaxed")]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_flag_that_another_block_waits_for(seed, release, acquire):
    body = f"""
        setp.eq.s32 %p1, %r91, 0;
        @!%p1 bra READER;
        st.global.b32 [%rd40], 42;
        st.{release}.gpu.global.b32 [%rd41], 1;
        bra.uni DONE;
    READER:
        ld.{acquire}.gpu.global.b32 %r1, [%rd41];
        setp.eq.s32 %p2, %r1, 0;
        @%p2 bra READER;
        ld.global.b32 %r2, [%rd40];
        st.global.b32 [%rd42], %r2;
    DONE:
    """
    device = Device(*(np.zeros(1, np.int32) for _ in range(3)))
    faults = device.run(device.launch(body, blocks=2), seed=seed)
    assert bool(faults) == ("relaxed" in (release, acquire))


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_need_no_order_among_each_other(seed):
    device = Device(np.zeros(1, np.int32))
    assert (
        device.run(device.launch("red.global.gpu.relaxed.add.u32 [%rd40], 2;", blocks=5, threads=64), seed=seed) == []
    )
    assert device.arrays[0][0] == 2 * 5 * 64


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_read_what_others_write(seed):
    device = Device(numbers())
    body = f"{ADDRESS} ld.global.b32 %r0, [%rd40]; st.global.b32 [%rd2], 1;"
    assert "race on array 0" in device.run(device.launch(body, blocks=2), seed=seed)[0]
    own = f"{ADDRESS} ld.global.b32 %r0, [%rd2]; st.global.b32 [%rd2], 1;"
    assert device.run(device.launch(own, blocks=2), seed=seed) == []


# ---- launches in a row ---------------------------------------------------------------------------------------------

STEP = """
    {early}
    {wait}
    {address}
    xor.b32 %r1, %r92, 32; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd40, %rd3;
    ld.global.b32 %r2, [%rd2]; add.s32 %r2, %r2, 1;
    add.s64 %rd6, %rd41, %rd3; st.global.b32 [%rd6], %r2;
"""
COPY_BACK = """
    {early}
    {wait}
    {address}
    add.s64 %rd6, %rd41, %rd1; ld.global.b32 %r2, [%rd6]; st.global.b32 [%rd2], %r2;
"""


def chain(seed: int, *, pdl: bool, early: tuple[str, ...] = (TRIGGER,) * 4, wait: tuple[str, ...] = (WAIT,) * 4):
    """Four launches: each reads what the one before wrote; the third writes what the second reads."""
    device = Device(numbers(), np.zeros(64, np.int32))
    launches = [
        device.launch(body.format(early=e, wait=w, address=ADDRESS), blocks=2, pdl=pdl)
        for body, e, w in zip((STEP, COPY_BACK) * 2, early, wait, strict=True)
    ]
    return device.run(*launches, seed=seed), device.arrays[0]


@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("early", ["", TRIGGER])
@pytest.mark.parametrize("seed", SEEDS)
def test_launches_that_wait(seed, early, pdl):
    """A kernel that never lets the next one start is fine: its end does."""
    faults, result = chain(seed, pdl=pdl, early=(early,) * 4)
    assert faults == []
    assert np.array_equal(result, numbers() + 2)


@pytest.mark.parametrize("launch", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_launch_that_does_not_wait(seed, launch):
    faults, _ = chain(seed, pdl=True, wait=tuple("" if i == launch else WAIT for i in range(4)))
    assert "race on array" in faults[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_without_early_starts_nobody_need_wait(seed):
    faults, result = chain(seed, pdl=False, wait=("",) * 4)
    assert faults == []
    assert np.array_equal(result, numbers() + 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_launch_whose_blocks_end_without_a_wait_hides_the_one_before(seed):
    """The third waits for the second. That one ends without having waited for the first, whose results the third reads."""
    device = Device(numbers(), np.zeros(64, np.int32))
    write = device.launch(f"{TRIGGER} {WAIT} {ADDRESS} st.global.b32 [%rd2], 5;", blocks=2, pdl=True)
    read = f"{TRIGGER} {WAIT} {ADDRESS} ld.global.b32 %r1, [%rd2];"
    idle = device.launch("mov.b32 %r1, 0;", pdl=True)
    assert "race on array 0" in device.run(write, idle, device.launch(read, blocks=2, pdl=True), seed=seed)[0]
    waits = device.launch(f"{TRIGGER} {WAIT}", pdl=True)
    assert device.run(*(device.launch(f"{TRIGGER} {WAIT} {ADDRESS} st.global.b32 [%rd2], 5;", blocks=2, pdl=True), waits),
                      device.launch(read, blocks=2, pdl=True), seed=seed) == []  # fmt: skip


def test_an_early_launch_starts_before_the_end_of_the_one_ahead():
    """What it does in front of its wait happens while the other still runs: a race only an early start can make."""
    body = f"{TRIGGER} {ADDRESS} st.global.b32 [%rd2], 1; {WAIT}"
    for pdl in (True, False):
        device = Device(numbers())
        launches = [device.launch(body, blocks=2, pdl=pdl) for _ in range(2)]
        assert bool(device.run(*launches)) == pdl


def test_faults_of_a_kind_are_told_once():
    device = Device(numbers(640))
    body = f"{ADDRESS} ld.global.b32 %r0, [%rd40]; st.global.b32 [%rd2], 1;"
    assert len(device.run(device.launch(body, blocks=20))) <= 2


def test_a_kernel_needs_its_arguments():
    device = Device(numbers(), numbers(), numbers(), numbers(), numbers())
    launch = device.launch("mov.b32 %r1, 0;")
    launch.arguments = launch.arguments[:1]
    with pytest.raises(Fault, match="has 5 parameters; got 1 arguments"):
        device.run(launch)
