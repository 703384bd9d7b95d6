"""What only a device can show, checked before anything is timed there.

    python benchmarks/check_device.py --out results.json

pdl:SHAPE: the same bits with programmatic dependent launch (PDL) as without, and twice with: a stale cache line, a race or a
    lost wait differs. The counters of split-K and of KV splits are back at 0.
freed_memory: a token graph that a second call captured reads what it read, after that call's tensors died and the allocator
    gave their memory to others.
streams: two threads with a stream each on one model; afterwards one alone.
failed_capture: a capture that raises leaves the thread on its stream, and the next one succeeds.
second_device: a model on cuda:1, while cuda:0 is the current device, takes the same steps.
memcheck, racecheck: a few steps under compute-sanitizer, every tensor an allocation of its own.

Each check runs in a process of its own, several at a time, so that one that hangs or breaks the CUDA context costs only
itself. What passed or cannot run here is not run again; what failed is.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import torch
from bandwidth import OUT_OF_TIME, conditions, load_json, merge_json
from bench_engine import prepare
from peers import Ours, Start
from replays import Replays, pdl_target
from shapes import build_model
from torch import Tensor

from latentmas_kernels import generate, latent_generate
from latentmas_kernels.engines.cuda_graphs import CudaGraphs, EagerReplay

# On CUDA, and in a dry run on the CPU, where a step in Triton's interpreter takes a second.
PDL_BATCH = {"tiny": 3, "qwen3-0.6b": 1, "qwen3-8b": 1}
PDL_STEPS, PDL_KV = {"cuda": 100, "cpu": 1}, {"cuda": 256, "cpu": 20}
NEW_TOKENS = {"cuda": 24, "cpu": 2}
STREAM_ROUNDS, STREAM_STEPS = {"cuda": 50, "cpu": 1}, {"cuda": 16, "cpu": 1}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # the interpreter's dot takes no bfloat16
SANITIZER_PATHS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", *os.environ["PATH"].split(os.pathsep))
SANITIZER_SECONDS = 70
LONGEST = 80


class WrongOnDevice(Exception):
    """A check failed; the message says what was wrong."""


class CannotRun(Exception):
    """There is nothing here to check with; the message says what is missing."""


def same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Compare states or tokens [B, steps, ...] with those of the first run."""
    if got.is_floating_point() and not (got.isfinite().all() and want.isfinite().all()):
        raise WrongOnDevice(f"{name}: NaN or Inf")
    same = (got == want).reshape(*got.shape[:2], -1).all(-1).all(0)
    if not same.all():
        first = int((~same).int().argmax())
        raise WrongOnDevice(f"{name}: other bits at {int((~same).sum())} of {len(same)} steps, first at step {first}")


@torch.no_grad()
def pdl(shape: str, device: str) -> str:
    if device == "cpu" and shape != "tiny":
        raise CannotRun("takes minutes in Triton's interpreter")
    batch, steps = PDL_BATCH[shape] if device == "cuda" else 1, PDL_STEPS[device]
    model, aligner = prepare(shape, DTYPE[device], device)
    start = Start.random(model, aligner, batch, PDL_KV[device], PDL_KV[device] + 2 * steps)
    first: tuple[Tensor, ...] | None = None
    for enable_pdl, run in ((False, "without PDL"), (True, "with PDL"), (True, "with PDL, again")):
        side = Replays(start, pdl_target(start.hidden.device, enable_pdl=enable_pdl))
        side.rewind()
        last, logits = side.latent(steps), side.token(steps)
        got = side.latents[:, :steps], last[:, None], side.tokens[:, :steps], logits[:, None]
        first = first or got
        for what, mine, want in zip(("latents", "state", "tokens", "logits"), got, first, strict=True):
            same_bits(f"{run}, {what} against the first run", mine, want)
        if left := [name for name, counter in side.counters().items() if counter.any()]:
            raise WrongOnDevice(f"{run}: counters are not back at 0: {', '.join(left)}")
    there = pdl_target(start.hidden.device, enable_pdl=True).enable_pdl
    said = f"same bits in three runs of {steps} latent and {steps} token steps, batch {batch}"
    return said if there else f"{said}; there is no PDL here, so all three ran without"


def freed_memory(device: str) -> str:
    # Cast after it was built: RoPE's frequencies are then in bfloat16, and what reads them in float32 reads a copy.
    model = build_model("tiny", torch.float32, device).to(torch.bfloat16).to(DTYPE[device])
    ids = torch.randint(3, 500, (1, 9), generator=torch.Generator().manual_seed(2)).to(device)

    def tokens(*, refill: bool) -> Tensor:
        past = latent_generate(model, ids, latent_steps=2, aligner="identity", engine="cuda").past_key_values
        gc.collect()
        held = [torch.full((size,), 1e3, device=device) for size in range(1, 300)] if refill else []
        out = generate(
            model, ids, past_key_values=past, max_new_tokens=NEW_TOKENS[device], eos_token_id=None, engine="cuda"
        )
        del held
        return out.sequences.cpu()

    want = tokens(refill=False)
    for run in ("second", "third"):
        if not torch.equal(tokens(refill=True), want):
            raise WrongOnDevice(
                f"the {run} call gives other tokens once freed memory was written again: a graph reads it"
            )
    return "same tokens after the allocator reused what the calls before had freed"


@torch.no_grad()
def streams(device: str) -> str:
    rounds, steps = STREAM_ROUNDS[device], STREAM_STEPS[device]
    model, aligner = prepare("tiny", DTYPE[device], device)

    def last_hidden() -> Tensor:
        return Ours(Start.random(model, aligner, 1, 60, 128)).latent(steps).cpu()

    want, faults = last_hidden(), []

    def work() -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
        try:
            with torch.no_grad(), stream:
                wrong = sum(not torch.equal(last_hidden(), want) for _ in range(rounds))
            faults.extend([f"{wrong} of {rounds} calls"] if wrong else [])
        except Exception as fault:  # in a thread it would only be printed
            faults.append(f"{type(fault).__name__}: {fault}")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise WrongOnDevice(f"two threads on one model, wrong results: {'; '.join(faults)}")
    if not torch.equal(last_hidden(), want):
        raise WrongOnDevice("right with two threads, but wrong alone afterwards: something they share stayed changed")
    return f"{2 * rounds} calls of two threads and one afterwards are right"


@torch.no_grad()
def failed_capture(device: str) -> str:
    if device == "cpu":
        raise CannotRun("needs CUDA graphs")
    before, x = torch.cuda.current_stream(), torch.ones(4, device=device)

    def copies_to_the_host() -> None:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()

    capture = CudaGraphs(x.device)
    try:
        capture(copies_to_the_host)
    except RuntimeError:
        pass
    else:
        raise WrongOnDevice("a copy to the host was captured without an error")
    if torch.cuda.current_stream() != before:
        raise WrongOnDevice("after a capture that raised, the thread is still on the capture's stream")
    capture(lambda: x.add_(1))()  # by the same one, which shares its memory between captures
    model, aligner = prepare("tiny", DTYPE[device], device)
    if not Ours(Start.random(model, aligner, 1, 60, 128)).latent(2).isfinite().all():
        raise WrongOnDevice("NaN or Inf in the first steps captured after a capture that raised")
    return "the thread is on its stream again, and the next capture runs"


@torch.no_grad()
def second_device(device: str) -> str:
    if device == "cpu" or torch.cuda.device_count() < 2:
        raise CannotRun("needs two CUDA devices")
    got = []
    for name in ("cuda:0", "cuda:1"):
        model, aligner = prepare("tiny", DTYPE[device], "cuda:0")
        start = Start.random(model.to(name), aligner, 1, 60, 128)
        # Drawn on the host, so that both devices start from the same numbers.
        draw = torch.Generator().manual_seed(3)
        for tensor in (*start.memory.keys, *start.memory.values, start.hidden):
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
        assert torch.cuda.current_device() == 0
        got.append(Ours(start).latent(16).cpu())
    same_bits("16 steps on cuda:1 against cuda:0", got[1][:, None], got[0][:, None])
    return "same bits on cuda:1 as on cuda:0 while cuda:0 is the current device"


@torch.no_grad()
def sanitized_steps(device: str) -> str:
    """What memcheck and racecheck watch: launches one by one, since the sanitizer's own tools do not see all of a graph."""
    model, aligner = prepare("tiny", DTYPE[device], device)
    start = Start.random(model, aligner, 3, 70, 128)
    side = Replays(start, pdl_target(start.hidden.device, enable_pdl=False), EagerReplay())
    side.latent(2)
    side.token(2)
    return "ran"


def sanitize(tool: str, device: str) -> str:
    if device == "cpu":
        raise CannotRun("needs a CUDA device")
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(SANITIZER_PATHS))
    if sanitizer is None:
        raise CannotRun("compute-sanitizer is not installed")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        __file__,
        "sanitized_steps",
        "--alone",
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        ["timeout", "-k", "5", str(SANITIZER_SECONDS), *command], env=environment, capture_output=True, text=True
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    unsupported = [line for line in said if line.startswith("=========") and "not supported" in line]
    if unsupported and '"passed"' not in done.stdout:
        raise CannotRun(unsupported[0])
    if done.returncode or '"passed"' not in done.stdout:
        # The tool's own lines and, where the steps raised, their outcome.
        found = [
            line for line in said if line.startswith(("=========", "{")) and "ERROR SUMMARY: 0" not in line
        ] or said
        raise WrongOnDevice(f"exit {done.returncode}; {' | '.join(line.strip('= ') for line in found[:6])}")
    return next((line.strip("= ") for line in said if "SUMMARY" in line), "no error")


CHECKS: dict[str, Callable[[str], str]] = {
    **{f"pdl:{shape}": partial(pdl, shape) for shape in PDL_BATCH},
    "freed_memory": freed_memory,
    "streams": streams,
    "failed_capture": failed_capture,
    "second_device": second_device,
    "memcheck": partial(sanitize, "memcheck"),
    "racecheck": partial(sanitize, "racecheck"),
}


def outcome(check: Callable[[str], str], device: str) -> dict[str, str]:
    """Run a check in this process."""
    try:
        return {"state": "passed", "said": check(device)}
    except CannotRun as reason:
        return {"state": "cannot run", "said": str(reason)}
    except WrongOnDevice as fault:
        return {"state": "failed", "said": str(fault)}
    except Exception as fault:
        return {"state": "failed", "said": f"{type(fault).__name__}: {str(fault).splitlines()[0][:300]}"}


def outcome_of_process(name: str, device: str, stop: float) -> dict[str, str] | None:
    """Run a check in a process of its own that ends by `stop`; None where no time is left to start it."""
    seconds = int(min(LONGEST, stop - time.monotonic()))
    if seconds < 1:
        return None
    command = [sys.executable, __file__, name, "--device", device, "--alone"]
    done = subprocess.run(["timeout", "-k", "5", str(seconds), *command], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    if done.returncode in (124, 137):
        return {"state": "failed", "said": f"no end in {seconds} s"}
    return {"state": "failed", "said": f"exit {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])}"}


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; all of them by default")
    parser.add_argument(
        "--device", default=default, choices=["cpu", "cuda"], help="cpu: a dry run (TRITON_INTERPRET=1)"
    )
    parser.add_argument("--seconds", type=float, default=600, help="all checks end by then")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="checks at a time")
    parser.add_argument(
        "--out", metavar="JSON", help="merge the outcomes into this file; checks that passed there are skipped"
    )
    parser.add_argument("--force", action="store_true", help="run again what passed")
    parser.add_argument(
        "--alone", action="store_true", help="run one check in this process and print its outcome as JSON"
    )
    args = parser.parse_args()
    known = {**CHECKS, "sanitized_steps": sanitized_steps} if args.alone else CHECKS
    if unknown := [name for name in args.checks if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    if args.alone:
        print(json.dumps(outcome(known[args.checks[0]], args.device)))
        return
    done = {} if args.force else load_json(args.out, "checks")
    todo = [name for name in args.checks or CHECKS if done.get(name, {}).get("state") not in ("passed", "cannot run")]
    stop, failed, left = time.monotonic() + args.seconds, [], []
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(outcome_of_process, name, args.device, stop): name for name in todo}
        for future in as_completed(running):
            name, said = running[future], future.result()
            if said is None:
                left.append(name)
                continue
            print(f"{name}: {said['state']}, {said['said']}", flush=True)
            failed += [name] if said["state"] == "failed" else []
            if args.out:
                merge_json(args.out, "checks", {name: {**conditions(args.device), **said}})
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")
    if left:
        print(f"{args.seconds:.0f} s are spent: {', '.join(left)} are left for the next run")
        sys.exit(OUT_OF_TIME)


if __name__ == "__main__":
    main()
