"""Times of a step on a GPU before one is measured, from shapes alone: launches, bytes and microseconds.

    python benchmarks/predict.py                           writes predicted.md
    python benchmarks/predict.py --measured results.json   prints what bench_replay.py and bench_engine.py measured beside it

The model is t = a n + bytes / b: n launches in a CUDA graph with programmatic dependent launch, and the bytes that a step
must read from memory. `a` and `b` come from public measurements of one step of one model (`PUBLIC`), read in two ways
(`fits_of`). predicted.md says what follows from either, so that the first measurement decides between them.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bandwidth import load_json
from shapes import SHAPES, sizes_of
from table import PHASES, markdown

PREDICTED = Path(__file__).parent / "predicted.md"
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b")
BATCHES, KV = (1, 4, 8), 256
SEVEN, FIVE = 7, 5
"""Launches a layer: with RoPE and the reduction of the KV splits as launches of their own, and as part of attention."""
ITEMSIZE, FLOAT = 2, 4  # bfloat16; W_a and logits are float32

PUBLIC_SHAPE, PUBLIC_KERNELS = "llama-3.2-1b", 100


class Public(NamedTuple):
    """A card: GB/s of its datasheet, and published microseconds of a token step of Llama-3.2-1B in bfloat16 at batch 1."""

    sheet: int
    graph: float  # 100 kernels in a CUDA graph with programmatic dependent launch
    persistent: float  # one kernel


PUBLIC = {"H100": Public(3350, 980, 973), "H200": Public(4800, 795, 760)}
COLD_PRODUCT = 2770 / PUBLIC["H100"].sheet
"""Share of the datasheet at which one cold matrix-vector product reads on an H100: 1.85 us + MB / 2.77, as published."""
GOALS = {  # percent of the datasheet's bandwidth; latent step, batch 1, KV 256
    ("H200", FIVE): (44, 65, 73, 78), ("H200", SEVEN): (37, 59, 68, 74),
    ("H100", FIVE): (52, 71, 77, 81), ("H100", SEVEN): (45, 65, 73, 78),
}  # fmt: skip


class Fit(NamedTuple):
    """t = launch_us n + bytes / gb_s."""

    launch_us: float
    gb_s: float

    def us(self, launches: int, moved: float) -> float:
        return self.launch_us * launches + moved / self.gb_s / 1e3


class Bytes(NamedTuple):
    """Bytes of a step. Activations are what launches hand on to each other: they stay in the L2 and take no part in `moved`."""

    layers: int
    ends: int
    kv: int
    activations: int

    @property
    def moved(self) -> int:
        return self.layers + self.ends + self.kv


def bytes_of(shape: str, step: str, batch: int, kv: float, itemsize: int = ITEMSIZE) -> Bytes:
    """What a latent or token step over `kv` slots a row reads, and what its launches hand on.

    Layers are the matrices, norms and biases with the final norm; ends are W_a of a model whose embeddings are not tied
    (latent) or the lm_head (token). Rows of the embedding that are looked up count as activations.
    """
    s = sizes_of(shape)
    family, _, tied, _ = SHAPES[shape]
    width, inner, head, vocab = s["hidden_size"], s["intermediate_size"], s["head_dim"], s["vocab_size"]
    queries, keys = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    qkv = queries + 2 * keys
    layer = width * (qkv + queries + 3 * inner) + 2 * width
    layer += 2 * head if family == "qwen3" else 0  # norms per head
    layer += qkv if family == "qwen2" else 0  # biases
    layers = s["num_hidden_layers"] * layer + width
    ends = width * vocab * itemsize if step == "token" else 0 if tied else width * width * FLOAT
    # QKV, attention, o with the residual, gate_up, down with the residual: what each reads and writes.
    passed = s["num_hidden_layers"] * (6 * width + 2 * qkv + 2 * queries + 2 * inner)
    passed = (passed + 5 * width) * itemsize + (
        2 * vocab * FLOAT if step == "token" else 0 if tied else 2 * width * FLOAT
    )
    slots = int(s["num_hidden_layers"] * 2 * keys * itemsize * batch * kv)
    return Bytes(layers * itemsize, ends, slots, batch * passed)


def launches_of(shape: str, step: str, per_layer: int) -> int:
    """Launches of a step. Ends: W_a where there is one, rescale and final norm, or embedding, lm_head, maxima and choice."""
    tied = SHAPES[shape][2]
    ends = 4 if step == "token" else 2 if tied else 3
    return sizes_of(shape)["num_hidden_layers"] * per_layer + ends


def fits_of(card: str) -> dict[str, Fit]:
    """Both readings of the public numbers of a card; either gives its graph of 100 kernels exactly.

    cold: b is the bandwidth of one cold product, a is what is left of the graph's time.
    persistent: b is what the persistent kernel reaches, a the difference of the two over 99 launches.
    """
    sheet, graph, persistent = PUBLIC[card]
    moved = public_bytes()
    cold_gb_s = COLD_PRODUCT * sheet
    launch_us = (graph - persistent) / (PUBLIC_KERNELS - 1)
    return {
        "cold": Fit((graph - moved / cold_gb_s / 1e3) / PUBLIC_KERNELS, cold_gb_s),
        "persistent": Fit(launch_us, moved / (persistent - launch_us) / 1e3),
    }


def public_bytes() -> int:
    """Of the public step. Its context is not published; 256 slots would be 0.3 % more."""
    return bytes_of(PUBLIC_SHAPE, "token", 1, 0).moved


def fit(samples: list[tuple[int, float, float]]) -> Fit:
    """a and b with the least squares of relative errors over (launches, bytes, us)."""
    rows = np.array([(launches / us, moved / us) for launches, moved, us in samples])
    (launch_us, us_per_byte), *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    return Fit(float(launch_us), float(1 / us_per_byte / 1e3))


def share(moved: float, us: float, card: str) -> float:
    """Percent of the datasheet's bandwidth."""
    return 100 * moved / us / 1e3 / PUBLIC[card].sheet


def goal_samples(card: str) -> list[tuple[int, float, float]]:
    """The goals of a card as (launches, bytes, us)."""
    samples = []
    for (of, per_layer), percents in GOALS.items():
        for shape, percent in zip(MODELS[:4], percents, strict=True):
            moved = bytes_of(shape, "latent", 1, KV).moved
            us = 100 * moved / percent / 1e3 / PUBLIC[card].sheet
            samples += [(launches_of(shape, "latent", per_layer), moved, us)] if of == card else []
    return samples


# ---- predicted.md ------------------------------------------------------------------------------------------------------


def calibration_lines() -> list[str]:
    moved = public_bytes()
    rows, checks = [], []
    for card, public in PUBLIC.items():
        fits = {**fits_of(card), "goals": fit(goal_samples(card))}
        for name, (launch_us, gb_s) in fits.items():
            said = [fits[name].us(n, moved) for n in (PUBLIC_KERNELS, 1)]
            against = [f"{us:.0f} ({us / real - 1:+.0%})" for us, real in zip(said, public[1:], strict=True)]
            rows.append([card, name, f"{launch_us:.2f}", f"{gb_s:.0f} ({gb_s / public.sheet:.0%})", *against])
    ours, theirs = PUBLIC["H100"], PUBLIC["H200"]
    for name, (launch_us, gb_s) in fits_of("H100").items():
        carried = Fit(launch_us, gb_s / ours.sheet * theirs.sheet)
        said = [carried.us(n, moved) / real - 1 for n, real in ((PUBLIC_KERNELS, theirs.graph), (1, theirs.persistent))]
        checks.append(f"*{name}* {said[0]:+.0%} and {said[1]:+.0%}")
    columns = ["card", "reading", "a, us", "b, GB/s (of the datasheet)", "graph of 100, us", "persistent, us"]
    published = " and ".join(
        f"{p.graph:.0f} us (graph) and {p.persistent:.0f} us (persistent) on an {c}" for c, p in PUBLIC.items()
    )
    return [
        *markdown(columns, rows),
        f"Published are {published}; the step reads {moved / 1e6:.0f} MB. In parentheses, how far a reading is from them.",
        "",
        "The public numbers do not scale from card to card: an H200 has 1.43 times the bandwidth of an H100 and is "
        "1.23 times as fast in a graph, 1.28 times in one kernel. a and b of the H100, b by the ratio of the "
        f"datasheets, miss the graph and the persistent kernel of the H200 by {'; '.join(checks)}. So each card has "
        "its own a and b, and what no reading can tell is whether the H200 is slow per launch or per byte.",
        "",
    ]


def byte_lines() -> list[str]:
    rows = []
    for shape in MODELS:
        for step in PHASES:
            b = bytes_of(shape, step, 1, KV)
            counts = [str(launches_of(shape, step, n)) for n in (SEVEN, FIVE)]
            rows.append([f"{shape}, {step}", *counts, *(f"{part / 1e6:.1f}" for part in b)])
    columns = ["step", "launches, 7 a layer", "5 a layer", "layers", "W_a or lm_head", "KV a row", "activations a row"]
    return markdown(columns, rows)


def cell(card: str, launches: int, moved: int) -> str:
    """Both readings, the faster one first."""
    us = sorted(f.us(launches, moved) for f in fits_of(card).values())
    return f"{us[0]:.0f} to {us[1]:.0f} us, {share(moved, us[0], card):.0f} to {share(moved, us[1], card):.0f} %"


def prediction_lines(card: str, step: str) -> list[str]:
    rows = []
    for shape in MODELS:
        for batch in BATCHES:
            moved = bytes_of(shape, step, batch, KV).moved
            floor = moved / PUBLIC[card].sheet / 1e3
            counts = [launches_of(shape, step, SEVEN), launches_of(shape, step, FIVE), 1]
            rows.append(
                [shape, str(batch), f"{moved / 1e6:.0f}", f"{floor:.0f}", *(cell(card, n, moved) for n in counts)]
            )
    columns = ["shape", "batch", "MB", "floor, us", "seven a layer", "five a layer", "one a step"]
    return [f"### {card}, {step} step", "", *markdown(columns, rows)]


def goal_lines() -> list[str]:
    rows = []
    for (card, per_layer), percents in GOALS.items():
        own = fit(goal_samples(card))
        for shape, percent in zip(MODELS[:4], percents, strict=True):
            moved, launches = bytes_of(shape, "latent", 1, KV).moved, launches_of(shape, "latent", per_layer)
            shares = {name: share(moved, f.us(launches, moved), card) for name, f in fits_of(card).items()}
            outside = [f"above {name}" for name, value in shares.items() if round(value) < percent]
            verdict = "above both" if len(outside) == 2 else outside[0] if outside else "below both"
            rows.append([f"{card}, {shape}, {per_layer} a layer", f"{percent} %", *(f"{v:.0f} %" for v in shares.values()),
                         f"{share(moved, own.us(launches, moved), card):.0f} %", verdict])  # fmt: skip
    return markdown(["latent step, batch 1", "goal", "cold", "persistent", "goals' own a and b", "the goal is"], rows)


def document() -> str:
    """predicted.md."""
    goals = {card: fit(goal_samples(card)) for card in PUBLIC}
    own = "; ".join(f"{f.launch_us:.2f} us and {f.gb_s / PUBLIC[c].sheet:.0%} on an {c}" for c, f in goals.items())
    ends = []
    for name, reading in fits_of("H200").items():
        moved = {shape: bytes_of(shape, "latent", 1, KV).moved for shape in (MODELS[0], MODELS[3])}
        us = {shape: reading.us(launches_of(shape, "latent", FIVE), m) for shape, m in moved.items()}
        seven = reading.us(launches_of(MODELS[0], "latent", SEVEN), moved[MODELS[0]])
        small, large = (share(moved[shape], us[shape], "H200") for shape in us)
        saved = 1 - us[MODELS[0]] / seven
        ends.append(
            f"*{name}* {small:.0f} % at 0.6B and {large:.0f} % at 8B, five launches instead of seven save {saved:.0%} at 0.6B"
        )
    lines = [
        "# Expected times of a step",
        "",
        "Written by `python benchmarks/predict.py` before any device was there: **nothing here was measured by us.**"
        f" bfloat16, KV of {KV} slots a row, greedy tokens, W_a (float32) in the latent step of a model whose embeddings "
        "are not tied.",
        "",
        "t = a n + bytes / b, with n launches in a CUDA graph (programmatic dependent launch on) and the bytes of "
        "weights and of the KV cache that a step reads. Two public figures a card, both of a token step of "
        "Llama-3.2-1B at batch 1, are read in two ways:",
        "",
        f"- *cold*: b is what one cold product reads (published for an H100: 1.85 us + MB / 2.77, that is {COLD_PRODUCT:.0%} "
        "of the datasheet; the same share is taken for an H200). a is fitted to the graph of 100 kernels. The "
        "persistent kernel is the check: its own waits are not in the model, so it is slower than the reading says.",
        "- *persistent*: a and b are fitted to both figures, the persistent kernel as one launch. Two unknowns from "
        "two figures: it meets both and nothing is left as a check. It makes a launch nearly free and the bandwidth low.",
        "",
        "*goals* is no reading: a and b that meet the goals below best.",
        "",
        *calibration_lines(),
        "## Launches and megabytes, batch 1",
        "",
        "Activations stay in the L2 and are not in the times.",
        "",
        *byte_lines(),
        "## Times",
        "",
        "Microseconds and percent of the datasheet's bandwidth, from the faster to the slower reading. The floor is "
        "bytes over the datasheet's bandwidth. One launch a step is the limit of a persistent kernel. a and b are of "
        "batch 1: larger batches only have more KV here, so a measured time above these lines at batch 4 or 8 is "
        "arithmetic that does not hide.",
        "",
        f"What decides between the readings is the smallest and the largest shape, latent step on an H200: {'; '.join(ends)}. "
        "`predict.py --measured` fits a and b to what was measured.",
        "",
    ]
    for card in PUBLIC:
        for step in PHASES:
            lines += prediction_lines(card, step)
    lines += [
        "## Goals",
        "",
        f"The goals follow from one pair a card: {own}. With them the public graph would take what the first table "
        "says under *goals*. Where a goal is above both readings, no public figure supports it yet.",
        "",
        *goal_lines(),
    ]
    return "\n".join(lines).rstrip() + "\n"


# ---- beside what was measured --------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    what: str
    launches: int
    moved: int
    us: float


def measured_steps(path: str) -> list[Measured]:
    """The steps of a results file: replays with programmatic dependent launch, then whole calls of the engine."""
    steps = []
    for key, result in load_json(path, "replay").items():
        if result.get("pdl"):
            steps += [(f"replay {key}", result, step, result[step]["us"], result[step]["kv"]) for step in PHASES]
    for key, result in load_json(path, "engine").items():
        if "latent" in result:
            steps += [(f"engine {key}", result, step, result[step]["ms"] * 1e3, result[step]["kv"]) for step in PHASES]
    return [
        Measured(
            f"{name}, {step}", launches_of(r["shape"], step, FIVE), bytes_of(r["shape"], step, r["batch"], kv).moved, us
        )
        for name, r, step, us, kv in steps
        if r["dtype"] == "bfloat16"
    ]


def comparison(path: str) -> list[str]:
    """A line per measured step: time, share, and both predictions with measured / predicted. Then a and b of the replays."""
    results: list[dict[str, Any]] = [*load_json(path, "replay").values(), *load_json(path, "engine").values()]
    device = next((r["device"] for r in results if "device" in r), "")
    card = next((name for name in PUBLIC if re.search(name, device)), None)
    if card is None:
        return [f"no prediction for {device or 'a file without steps'}; there are some for {', '.join(PUBLIC)}"]
    steps = measured_steps(path)
    rows = []
    for what, launches, moved, us in steps:
        said = [f.us(launches, moved) for f in fits_of(card).values()]
        rows.append([what, f"{us:.0f}", f"{share(moved, us, card):.0f} %", *(f"{p:.0f} ({us / p:.2f})" for p in said)])
    lines = [f"Measured on {device}, beside the predictions for an {card} (measured / predicted).", ""]
    lines += markdown(["step", "us", "share", *fits_of(card)], rows)
    replays = [step[1:] for step in steps if step.what.startswith("replay")]
    if len({launches / moved for launches, moved, _ in replays}) < 2:
        return [*lines, "a and b need replays of two shapes"]
    own = fit(replays)
    worst = max(abs(own.us(launches, moved) / us - 1) for launches, moved, us in replays)
    return [
        *lines,
        f"fitted to the {len(replays)} replays: a = {own.launch_us:.2f} us, b = {own.gb_s:.0f} GB/s "
        f"({own.gb_s / PUBLIC[card].sheet:.0%} of the datasheet), at most {worst:.0%} off",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measured", metavar="JSON", help="print the predictions beside the steps of this results file"
    )
    args = parser.parse_args()
    if args.measured:
        print("\n".join(comparison(args.measured)))
    else:
        PREDICTED.write_text(document())
        print(PREDICTED)


if __name__ == "__main__":
    main()
