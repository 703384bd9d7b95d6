"""Capture, replay and the order of calls, on a recording that stands in for torch.cuda: no device is needed."""

import contextlib
import gc
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch

from latentmas_kernels.engines.cuda_graphs import CallOrder, CaptureError, CudaGraphs, EagerReplay
from latentmas_kernels.errors import LatentMASError

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    def __init__(self, cuda, device, name):
        self.cuda, self.device, self.name = cuda, torch.device(device), name

    def wait_stream(self, other):
        self.cuda.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.cuda.log.append((self.name, "waits for", event.of))


class Cuda:
    """The part of torch.cuda that the engines use: the current device and streams, and a log of what was issued."""

    def __init__(self):
        self.log, self.captures, self.failing = [], [], {}
        self.present, self.streams = FIRST, {d: Stream(self, d, f"default of {d.index}") for d in (FIRST, SECOND)}
        cuda = self

        class Event:
            of = None

            def record(self, stream):
                self.of = f"event {sum('records' in entry for entry in cuda.log)}"
                cuda.log.append((stream.name, "records", self.of))

        class Graph:
            def replay(self):
                cuda.log.append((cuda.current_stream().name, "replays", cuda.present))

        class Capture:
            """As `torch.cuda.graph`: its end restores the stream only where the capture could be ended."""

            def __init__(self, graph, **options):
                self.options, self.on = options, cuda.stream(options["stream"])

            def __enter__(self):
                self.on.__enter__()
                cuda.captures.append((cuda.present, cuda.current_stream(), self.options))
                cuda.fail("begin")

            def __exit__(self, *error):
                cuda.fail("end")
                self.on.__exit__(*error)

        self.Event, self.CUDAGraph, self.graph = Event, Graph, Capture
        self.pools = 0

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    def fail(self, where):
        if where in self.failing:
            raise self.failing[where]

    def Stream(self, device=None):
        return Stream(self, self.present if device is None else device, f"stream of {torch.device(device).index}")

    def current_stream(self, device=None):
        return self.streams[self.present if device is None else torch.device(device)]

    @contextlib.contextmanager
    def device(self, of):
        before, self.present = self.present, torch.device(of)
        try:
            yield
        finally:
            self.present = before

    @contextlib.contextmanager
    def stream(self, stream):
        device, before = self.present, self.streams[stream.device]
        self.present, self.streams[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self.present, self.streams[stream.device] = device, before


NAMES = ("Event", "CUDAGraph", "graph", "graph_pool_handle", "Stream", "current_stream", "device", "stream")


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    for name in NAMES:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


# ---- capture ---------------------------------------------------------------------------------------------------------


def test_a_step_is_captured_on_the_device_of_its_model_whichever_is_current(cuda):
    capture, ran = CudaGraphs(SECOND), []
    for _ in range(2):
        capture(lambda: ran.append((cuda.present, cuda.current_stream().name)))
    assert ran == [(SECOND, "stream of 1")] * 4, "each runs once before its capture"
    for device, stream, options in cuda.captures:
        assert (device, stream) == (SECOND, capture.stream)
        assert options == {"pool": "pool 1", "stream": capture.stream, "capture_error_mode": "thread_local"}
    assert (cuda.present, cuda.current_stream().name) == (FIRST, "default of 0")


def test_a_capture_is_behind_what_its_stream_was_given_before_and_ahead_of_what_comes(cuda):
    CudaGraphs(SECOND)(lambda: cuda.log.append("runs"))
    first, *_, last = cuda.log
    assert first == ("stream of 1", "waits for", "default of 1")
    assert last == ("default of 1", "waits for", "stream of 1")


@pytest.mark.parametrize("where", ["begin", "end", "body"])
def test_a_capture_that_fails_leaves_the_thread_on_its_stream(cuda, where):
    own = Stream(cuda, SECOND, "the caller's")
    cuda.failing[where] = RuntimeError(f"operation not permitted ({where})\nand more")

    def body():
        if cuda.captures:
            cuda.fail("body")

    with cuda.stream(own):
        with pytest.raises(CaptureError, match=rf"^RuntimeError: operation not permitted \({where}\)$"):
            CudaGraphs(SECOND)(body)
        assert (cuda.present, cuda.current_stream()) == (SECOND, own)
    assert (cuda.present, cuda.current_stream().name) == (FIRST, "default of 0")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("as torch says it"), RuntimeError("CUDA error: out of memory")]
)
def test_a_lack_of_memory_is_told_from_other_failures(cuda, error):
    """Also where the capture that it broke off cannot be ended either."""
    cuda.failing["end"] = RuntimeError("operation failed due to a previous error during capture")

    def body():
        if cuda.captures:
            raise error

    with pytest.raises(torch.OutOfMemoryError, match=str(error)):
        CudaGraphs(FIRST)(body)


def test_captures_behind_one_that_failed_have_a_pool_of_their_own(cuda):
    capture, fails = CudaGraphs(FIRST), [RuntimeError("operation not permitted")]

    def body():
        if cuda.captures and fails:
            raise fails.pop()

    with pytest.raises(CaptureError):
        capture(body)
    capture(body)
    capture(body)
    assert [options["pool"] for _, _, options in cuda.captures] == ["pool 1", "pool 2", "pool 2"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("as torch says it"), RuntimeError("operation not permitted")])
def test_a_capture_that_failed_keeps_nothing_that_it_read(cuda, error):
    read = Read(torch.ones(3), 0.5)
    alive = weakref.ref(read)

    def body(read):
        if cuda.captures:
            raise error

    with contextlib.suppress(torch.OutOfMemoryError, CaptureError):
        CudaGraphs(FIRST)(body, read)
    error.__traceback__ = None  # this test's own
    del read
    assert alive() is None


# ---- the stand-in for capture ---------------------------------------------------------------------------------------


@dataclass
class Read:
    table: torch.Tensor
    number: float


def add(out, read, *, times=1):
    out += times * read.number * read.table


def test_the_stand_in_replays_what_is_still_owned_elsewhere():
    out, table = torch.zeros(3), torch.arange(8.0)
    replay = EagerReplay()(add, out, Read(table[2:8:2], 0.5), times=2)
    table += 1
    replay()
    assert out.tolist() == [2.0 + 3.0, 4.0 + 5.0, 6.0 + 7.0]


def test_the_stand_in_keeps_nothing_alive_that_a_graph_would_not():
    out = torch.zeros(3)
    replay = EagerReplay()(add, out, Read(torch.ones(3), 1.0))
    gc.collect()
    with pytest.raises(AssertionError, match="a graph would read memory that was freed"):
        replay()


def test_the_stand_in_keeps_no_body_alive_either():
    """Through which a step would hold what it reads."""
    table = torch.ones(3)
    replay = EagerReplay()(lambda: table.add_(1))
    gc.collect()
    with pytest.raises(AssertionError, match="a graph would read memory that was freed"):
        replay()


# ---- the order of calls ----------------------------------------------------------------------------------------------


def test_a_call_on_another_stream_waits_for_the_call_before(cuda):
    order, other = CallOrder(), Stream(cuda, SECOND, "another")
    with order.call(SECOND):
        cuda.log.append(("first", cuda.present))
    with cuda.stream(other), order.call(SECOND):
        cuda.log.append(("second", cuda.present))
    with order.call(SECOND):
        pass
    assert cuda.log == [
        ("first", SECOND),
        ("default of 1", "records", "event 0"),
        ("another", "waits for", "event 0"),
        ("second", SECOND),
        ("another", "records", "event 1"),
        ("default of 1", "waits for", "event 1"),
        ("default of 1", "records", "event 2"),
    ]
    assert cuda.present == FIRST


def test_a_call_that_raises_is_waited_for_as_well(cuda):
    order, other = CallOrder(), Stream(cuda, FIRST, "another")
    with pytest.raises(KeyboardInterrupt), order.call(FIRST):
        raise KeyboardInterrupt
    with cuda.stream(other), order.call(FIRST):
        pass
    assert ("another", "waits for", "event 0") in cuda.log


def test_calls_of_two_threads_take_turns():
    order, inside, most = CallOrder(), [], []

    def work():
        for _ in range(20):
            with order.call(torch.device("cpu")):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 60


def test_a_call_within_a_call_is_refused():
    """It would bind the tensors of the outer one to another cache."""
    order, cpu = CallOrder(), torch.device("cpu")
    with order.call(cpu), pytest.raises(LatentMASError, match="supported is one call at a time"), order.call(cpu):
        pass
    with order.call(cpu):
        pass
