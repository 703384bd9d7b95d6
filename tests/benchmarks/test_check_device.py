"""The checks of a device pass where all is well, and fail with a line that says what was wrong where it is not."""

import json
import sys
import time
from types import SimpleNamespace

import check_device
import pytest
import torch
from bandwidth import OUT_OF_TIME
from check_device import CHECKS, CannotRun, WrongOnDevice


class FakeReplays:
    """Replays whose third run has `wrong` added to its second latent state, and `counter` in a split-K counter."""

    def __init__(self, wrong=0.0, counter=0, run=3):
        self.wrong, self.counter, self.run, self.made = wrong, counter, run, 0

    def __call__(self, start, target):
        self.made += 1
        is_wrong = self.made == self.run
        latents = torch.ones(1, 2, 4)
        latents[0, 1, 3] += self.wrong if is_wrong else 0
        counters = torch.tensor([self.counter if is_wrong else 0])
        return SimpleNamespace(
            latents=latents, tokens=torch.ones(1, 2), rewind=lambda: None, latent=lambda steps: torch.ones(1, 4),
            token=lambda steps: torch.ones(1, 4), counters=lambda: {"products: tile_counters": counters},
        )  # fmt: skip


@pytest.fixture
def two_steps(monkeypatch):
    monkeypatch.setitem(check_device.PDL_STEPS, "cpu", 2)
    monkeypatch.setattr(check_device, "prepare", lambda *args: (None, None))
    start = SimpleNamespace(hidden=torch.ones(1, 4))
    monkeypatch.setattr(check_device, "Start", SimpleNamespace(random=lambda *args: start))


def test_pdl_passes_on_real_steps():
    assert check_device.pdl("tiny", "cpu").startswith("same bits in three runs")


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        (
            FakeReplays(wrong=1e-3),
            "with PDL, again, latents against the first run: other bits at 1 of 2 steps, first at step 1",
        ),
        (FakeReplays(wrong=float("nan"), run=1), "without PDL, latents against the first run: NaN or Inf"),
        (FakeReplays(counter=1, run=2), "with PDL: counters are not back at 0: products: tile_counters"),
    ],
)
def test_pdl_finds_other_bits_nan_and_counters(monkeypatch, two_steps, fake, said):
    monkeypatch.setattr(check_device, "Replays", fake)
    with pytest.raises(WrongOnDevice, match=said):
        check_device.pdl("tiny", "cpu")


def test_freed_memory_passes():
    assert check_device.freed_memory("cpu").startswith("same tokens")


def test_freed_memory_finds_other_tokens(monkeypatch):
    calls = []

    def generate(*args, **options):
        calls.append(options)
        return SimpleNamespace(sequences=torch.tensor([[1, 2, len(calls) > 1]]))

    monkeypatch.setattr(check_device, "latent_generate", lambda *args, **options: SimpleNamespace(past_key_values=None))
    monkeypatch.setattr(check_device, "generate", generate)
    with pytest.raises(WrongOnDevice, match="second call gives other tokens"):
        check_device.freed_memory("cpu")


def test_streams_passes():
    assert check_device.streams("cpu") == "2 calls of two threads and one afterwards are right"


@pytest.mark.parametrize(
    ("wrong_calls", "said"),
    [
        ((2,), "two threads on one model, wrong results: 1 of 1 calls"),
        ((4,), "right with two threads, but wrong alone"),
    ],
)
def test_streams_finds_wrong_results(monkeypatch, two_steps, wrong_calls, said):
    calls = []

    def ours(start):
        calls.append(None)
        value = float(len(calls) in wrong_calls)
        return SimpleNamespace(latent=lambda steps: torch.full((1, 4), value))

    monkeypatch.setattr(check_device, "Ours", ours)
    with pytest.raises(WrongOnDevice, match=said):
        check_device.streams("cpu")


@pytest.fixture
def fake_cuda(monkeypatch, two_steps):
    """A device without one: tensors are made on the CPU, and the current stream is `stream.current`."""
    stream = SimpleNamespace(current="the thread's")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(
        check_device, "Ours", lambda start: SimpleNamespace(latent=lambda steps: start.hidden * start.hidden.sum())
    )
    return stream


@pytest.mark.parametrize(
    ("raises", "stays", "said"),
    [(True, False, None), (False, False, "captured without an error"), (True, True, "still on the capture's stream")],
)
def test_failed_capture_finds_a_stream_that_stays(monkeypatch, fake_cuda, raises, stays, said):
    def capture(body):
        fake_cuda.current = "the capture's" if stays else fake_cuda.current
        if raises and body.__name__ == "copies_to_the_host":
            raise RuntimeError("operation not permitted when stream is capturing")
        return body

    monkeypatch.setattr(check_device, "CudaGraphs", lambda device: capture)
    if said is None:
        assert "the next capture runs" in check_device.failed_capture("cuda")
    else:
        with pytest.raises(WrongOnDevice, match=said):
            check_device.failed_capture("cuda")


def test_second_device_finds_other_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = SimpleNamespace(to=lambda name: name)
    monkeypatch.setattr(check_device, "prepare", lambda *args: (model, None))
    monkeypatch.setattr(
        check_device, "Start",
        SimpleNamespace(random=lambda name, *args: SimpleNamespace(
            name=name, hidden=torch.ones(1, 4), memory=SimpleNamespace(keys=[], values=[])
        )),
    )  # fmt: skip
    wrong = {"cuda:0": 0.0, "cuda:1": 1.0}
    monkeypatch.setattr(
        check_device, "Ours", lambda start: SimpleNamespace(latent=lambda steps: torch.full((1, 4), wrong[start.name]))
    )
    with pytest.raises(WrongOnDevice, match="16 steps on cuda:1 against cuda:0: other bits"):
        check_device.second_device("cuda")
    wrong["cuda:1"] = 0.0
    assert check_device.second_device("cuda").startswith("same bits")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotRun, match="two CUDA devices"):
        check_device.second_device("cuda")


@pytest.mark.parametrize(
    ("said", "status", "raised"),
    [
        ('{"state": "passed"}\n========= ERROR SUMMARY: 0 errors', 0, None),
        ('{"state": "passed"}\n========= Invalid __global__ read of size 2 bytes', 9, WrongOnDevice),
        ('{"state": "failed", "said": "no module"}\n========= ERROR SUMMARY: 0 errors', 0, WrongOnDevice),
        ("========= Error: Device not supported", 1, CannotRun),
    ],
)
def test_sanitizer_reads_what_compute_sanitizer_says(monkeypatch, tmp_path, said, status, raised):
    tool = tmp_path / "compute-sanitizer"
    (tmp_path / "said").write_text(said + "\n")
    tool.write_text(f"#!/bin/sh\ncat {tmp_path}/said\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(check_device, "SANITIZER_PATHS", (str(tmp_path),))
    if raised is None:
        assert check_device.sanitize("memcheck", "cuda") == "ERROR SUMMARY: 0 errors"
    else:
        with pytest.raises(raised, match="Invalid|no module|not supported"):
            check_device.sanitize("memcheck", "cuda")


def test_sanitizer_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(check_device, "SANITIZER_PATHS", (str(tmp_path),))
    with pytest.raises(CannotRun, match="not installed"):
        check_device.sanitize("memcheck", "cuda")


def test_the_steps_under_the_sanitizer_run():
    assert check_device.sanitized_steps("cpu") == "ran"


def run_main(monkeypatch, out, outcomes, *words):
    """main() with the outcomes of its processes given; what was run, and how it exited."""
    ran = []

    def outcome(name, device, stop):
        ran.append(name)
        return outcomes.get(name, {"state": "passed", "said": "fine"})

    monkeypatch.setattr(check_device, "outcome_of_process", outcome)
    monkeypatch.setattr(sys, "argv", ["check_device.py", "--device", "cpu", "--jobs", "1", "--out", str(out), *words])
    try:
        check_device.main()
    except SystemExit as end:
        return ran, end.code
    return ran, 0


def test_a_failed_check_is_said_ends_nonzero_and_runs_again(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.json"
    ran, status = run_main(monkeypatch, out, {"streams": {"state": "failed", "said": "wrong results: 3 of 50 calls"}})
    assert ran == list(CHECKS)
    assert status == "FAILED: streams"
    assert "streams: failed, wrong results: 3 of 50 calls" in capsys.readouterr().out
    kept = json.loads(out.read_text())["checks"]
    assert {name: check["state"] for name, check in kept.items()} == {
        **dict.fromkeys(CHECKS, "passed"),
        "streams": "failed",
    }
    assert run_main(monkeypatch, out, {}) == (["streams"], 0)
    assert run_main(monkeypatch, out, {}) == ([], 0)
    assert run_main(monkeypatch, out, {}, "--force")[0] == list(CHECKS)


def test_checks_that_got_no_time_are_left_for_the_next_run(monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    assert run_main(monkeypatch, out, {"memcheck": None})[1] == OUT_OF_TIME
    assert run_main(monkeypatch, out, {}) == (["memcheck"], 0)


def test_a_check_runs_in_a_process_of_its_own_and_ends_in_time():
    assert check_device.outcome_of_process("failed_capture", "cpu", time.monotonic() + 80) == {
        "state": "cannot run", "said": "needs CUDA graphs",
    }  # fmt: skip
    assert check_device.outcome_of_process("pdl:tiny", "cpu", time.monotonic() + 1.9)["said"] == "no end in 1 s"
    assert check_device.outcome_of_process("pdl:tiny", "cpu", time.monotonic()) is None
    broken = check_device.outcome_of_process("nothing", "cpu", time.monotonic() + 80)
    assert broken["state"] == "failed"
    assert "unknown: nothing" in broken["said"]


def test_what_a_check_raises_is_its_outcome():
    def broken(device):
        raise RuntimeError("an illegal memory access was encountered\nsecond line")

    assert check_device.outcome(broken, "cpu") == {
        "state": "failed", "said": "RuntimeError: an illegal memory access was encountered",
    }  # fmt: skip
