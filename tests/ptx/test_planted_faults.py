"""Faults planted in compiled kernels are found: by a race, a stop, or wrong results, with every seed that is tried.

An edit that changes nothing fails (`Recording.run`), so that a fault cannot go unfound because it was never there.
"""

import re
from collections.abc import Callable

import pytest
import torch
from launches import Recording, faults_of, gpu
from numerics import integers, normal, poisoned
from ops.test_decode_attention import inputs as attention_inputs
from ops.test_decode_attention import raw, still

from latentmas_kernels.ops.triton.decode_attention import SplitWorkspace, decode_attention
from latentmas_kernels.ops.triton.kv_table import KVTable
from latentmas_kernels.ops.triton.skinny_gemm import Workspace, skinny_gemm
from latentmas_kernels.ops.triton.tiles import GemmConfig

SEEDS = range(3)
GEMV = GemmConfig(1, 8, 128, 2, dot=False, num_warps=4, num_stages=1)
DOT = GemmConfig(16, 16, 64, 2, dot=True, num_warps=4, num_stages=3)
# What other warps can see, between two barriers.
VISIBLE = re.compile(r"\b(?:ld|st|atom)\.(?:global|shared)|\b(?:ld|st)matrix|cp\.async|wgmma")


class Products:
    """Two products in a row: the second reads what the first one wrote, with the same workspace."""

    def __init__(self, config: GemmConfig, rows: int) -> None:
        dtype, widths = torch.bfloat16, [768, 64, 24]
        self.x = normal(rows, widths[0], dtype=dtype)
        self.states = [poisoned(rows, n, dtype=dtype) for n in widths[1:]]
        self.workspace = Workspace(self.x)
        self.workspace.reserve(config, rows, max(widths[1:]), gated=False)
        target = gpu(90)
        with Recording(90) as self.recording:
            for x, out in zip([self.x, self.states[0]], self.states, strict=True):
                k, n = x.shape[1], out.shape[1]
                skinny_gemm(
                    x, normal(n, k, dtype=dtype, seed=n, scale=k**-0.5), out, norm_weight=1 + normal(k, dtype=dtype) / 8,
                    eps=1e-6, target=target, workspace=self.workspace, config=config,
                )  # fmt: skip
        self._reset()
        self.recording.run()
        self.right = [state.clone() for state in self.states]

    def _reset(self) -> None:
        for tensor in (*self.states, self.workspace.split_k_partials):
            tensor.fill_(float("nan"))
        self.workspace.tile_counters.zero_()

    def finds(self, edit: Callable[[str], str], seed: int) -> bool:
        """Whether a fault shows."""
        self._reset()
        faults = faults_of(lambda: self.recording.run(seed=seed, edit=lambda ptx, name: edit(ptx)))
        wrong = not all(torch.equal(a, b) for a, b in zip(self.states, self.right, strict=True))
        return bool(faults) or wrong or bool(self.workspace.tile_counters.any())


@pytest.fixture(scope="module")
def gemv() -> Products:
    return Products(GEMV, 2)


@pytest.fixture(scope="module")
def dot() -> Products:
    return Products(DOT, 5)


def without(ptx: str, spans: list[tuple[int, int]]) -> str:
    for start, stop in reversed(spans):
        ptx = ptx[:start] + ptx[stop:]
    return ptx


def barriers_of(ptx: str) -> list[list[tuple[int, int]]]:
    """The barriers, those together that have nothing in between: of these each is enough."""
    groups: list[list[tuple[int, int]]] = []
    for found in re.finditer(r"bar\.sync\s+0;", ptx):
        if groups and not VISIBLE.search(ptx[groups[-1][-1][1] : found.start()]):
            groups[-1].append(found.span())
        else:
            groups.append([found.span()])
    return groups


@pytest.mark.parametrize("products", ["gemv", "dot"])
def test_a_barrier_taken_out(products, request):
    """One of a kernel's may be needed at other sizes only: where a warp stores just those bytes that it read itself."""
    found = request.getfixturevalue(products)
    groups = barriers_of(found.recording.launches[0].ptx)
    assert len(groups) > 2
    unfound = [
        i for i in range(len(groups)) if not found.finds(lambda ptx, i=i: without(ptx, barriers_of(ptx)[i]), seed=i)
    ]
    # All of them with Triton 3.9; with 3.6 a product on tensor cores does not need the first one, far ahead of the atomic.
    assert unfound in ([], [0])


@pytest.mark.parametrize("weaker", ["relaxed", "release", "acquire"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_atomic_that_orders_too_little(gemv, weaker, seed):
    assert gemv.finds(lambda ptx: ptx.replace("atom.global.gpu.acq_rel", f"atom.global.gpu.{weaker}"), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_for_the_launch_before_left_out(gemv, seed):
    assert gemv.finds(lambda ptx: ptx.replace("griddepcontrol.wait", "griddepcontrol.launch_dependents"), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_asynchronous_copy_ahead_of_the_wait_for_the_launch_before(dot, seed):
    """The first copy is of the activations, and lands behind the wait in any case."""

    def late(ptx: str) -> str:
        return re.sub(
            r"griddepcontrol\.wait\s*;(.*?cp\.async\.cg[^;]*;)", r"\1 griddepcontrol.wait;", ptx, count=1, flags=re.S
        )

    assert dot.finds(late, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_for_asynchronous_copies_left_out(dot, seed):
    assert dot.finds(lambda ptx: re.sub(r"cp\.async\.wait_group\s+\d+;", "", ptx), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_that_leaves_one_copy_too_many(dot, seed):
    def later(ptx: str) -> str:
        return re.sub(r"cp\.async\.wait_group\s+(\d+);", lambda w: f"cp.async.wait_group {int(w[1]) + 1};", ptx)

    assert dot.finds(later, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_counter_not_put_back(gemv, seed):
    """The store to the address of the atomic."""

    def kept(ptx: str) -> str:
        counter = re.search(r"atom\.global\S+\s+%r\d+,\s*\[\s*(%rd\d+)", ptx)[1]
        return re.sub(rf"@%p\d+ st\.global\.b32 \[\s*{counter} \+ 0\s*\][^;]*;", "", ptx)

    assert gemv.finds(kept, seed)


def one_more(ptx: str, kernel: str, parameter: int) -> str:
    """A parameter, larger by 1."""
    loaded = rf"(ld\.param\.b32\s+(%r\d+), \[{kernel}_param_{parameter}\];)"
    return re.sub(loaded, r"\1 add.s32 \2, \2, 1;", ptx)


@pytest.mark.parametrize("products", ["gemv", "dot"])
def test_one_term_too_many(products, request):
    found = request.getfixturevalue(products)
    terms = [i for i, value in enumerate(found.recording.launches[0].arguments) if value == found.x.shape[1]]
    assert found.finds(lambda ptx: one_more(ptx, "skinny_gemm_kernel", terms[-1]), seed=0)


class Attention:
    """A launch of ragged rows over two KV splits: the last program of a row and KV head to finish combines them."""

    def __init__(self) -> None:
        dtype = torch.bfloat16
        heads = 8, 1, 128  # so many that every warp stores a part of a split's output
        qkv, slots = raw(*attention_inputs(heads, [130, 37, 64], 140, dtype=dtype))
        self.keys, self.values, lengths = attention_inputs(heads, [129, 36, 63], 140, dtype=dtype)[1:]
        self.out = poisoned(3, 1024, dtype=dtype)
        self.workspace = SplitWorkspace(3, *heads, 2, self.out.device)
        kv_table = KVTable.of_layer(self.keys, self.values).tensor()
        with Recording(90) as self.recording:
            decode_attention(
                qkv, kv_table, 0, slots, lengths + 1, integers(0, 0, 0), still(128), 1.0, None, None, 0.0, 0.125, None,
                self.workspace, self.out, target=gpu(90),
            )  # fmt: skip
        self.recording.know("keys", self.keys)
        self.recording.know("values", self.values)
        self.recording.run()
        self.right = self.out.clone()
        assert self.right.isfinite().all()

    def finds(self, edit: Callable[[str], str], seed: int) -> bool:
        """Whether a fault shows."""
        for tensor in (self.out, self.workspace.out, self.workspace.lse):
            tensor.fill_(float("nan"))
        self.workspace.split_counters.zero_()
        faults = faults_of(lambda: self.recording.run(seed=seed, edit=lambda ptx, name: edit(ptx)))
        return bool(faults) or not torch.equal(self.out, self.right) or bool(self.workspace.split_counters.any())


@pytest.fixture(scope="module")
def attention() -> Attention:
    return Attention()


@pytest.mark.parametrize("weaker", ["relaxed", "release", "acquire"])
@pytest.mark.parametrize("seed", SEEDS)
def test_splits_whose_count_orders_too_little(attention, weaker, seed):
    assert attention.finds(lambda ptx: ptx.replace("atom.global.gpu.acq_rel", f"atom.global.gpu.{weaker}"), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_counted_before_every_thread_has_stored(attention, seed):
    """The last barrier before the atomic."""

    def early(ptx: str) -> str:
        counted = ptx.index("atom.global")
        return without(ptx, [group for group in barriers_of(ptx) if group[-1][1] < counted][-1])

    assert attention.finds(early, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_slot_too_many(attention, seed):
    """The first number that is loaded behind the wait is the new slot, and so the number of those before it."""

    def longer(ptx: str) -> str:
        head, wait, rest = ptx.partition("griddepcontrol.wait")
        return head + wait + re.sub(r"(ld\.global\.b32 \{ (%r\d+) \}[^;]*;)", r"\1 add.s32 \2, \2, 1;", rest, count=1)

    assert attention.finds(longer, seed)
