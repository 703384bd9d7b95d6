"""The results of a device as Markdown: `python benchmarks/table.py benchmarks/results/NAME.json` writes NAME.md beside it."""

import sys
from pathlib import Path
from typing import Any

from bandwidth import load_json
from peers import PEERS

PHASES = ("latent", "token")


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table, the first column to the left and the others to the right."""
    width = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, width, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(width)]
    return [line(columns), line(rule), *map(line, rows), ""]


def about(results: dict[str, Any]) -> str:
    """The conditions that all results share, and the days that they were made on."""
    days = sorted({r["date"] for r in results.values() if "date" in r})
    one = next((r for r in results.values() if "versions" in r), None)
    if one is None:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
    return f"{one['device']}; {versions}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."


def order(result: dict[str, Any]) -> tuple[str, int, int]:
    return result["shape"], result["batch"], result["kv"]


def engine(path: Path) -> list[str]:
    results = load_json(path, "engine")
    timed = sorted((r for r in results.values() if "latent" in r), key=order)
    if not results:
        return []
    lines = ["## Latent and token steps", "", about(results), ""]
    lines += [f"- {name}: {what}" for name, (_, what) in PEERS.items()]
    lines += [
        "",
        "Bandwidth (bw) is the read bandwidth of the same process, sheet the datasheet's. A peer's column is its time, and "
        "in parentheses how many times as long as the engine's. Errors are relative to float32, of the engine and of "
        "transformers.",
        "",
    ]
    for phase in PHASES:
        rows = []
        for r in timed:
            row = r[phase]
            sheet = "-" if row["percent_of_datasheet"] is None else f"{row['percent_of_datasheet']:.0f}%"
            cells = [r["shape"], str(r["batch"]), str(r["kv"]), f"{row['ms']:.3f}", f"{row['gb_s']:.0f}"]
            cells += [f"{row['percent_of_bandwidth']:.0f}%", sheet]
            for name in PEERS:
                peer = r["peers"][name].get(phase)
                cells.append(f"{peer['ms']:.3f} ({peer['ours_faster']:.2f})" if peer else "-")
            rows.append([*cells, f"{r['error'][phase]:.1e}", f"{r['transformers_error'][phase]:.1e}"])
        columns = ["shape", "batch", "KV", "ms", "GB/s", "bw", "sheet", *PEERS, "error", "hf error"]
        lines += [f"### {phase.capitalize()} step", "", *markdown(columns, rows)]
    missing = [f"- {key}: {r.get('refused') or r['skipped']}" for key, r in results.items() if "latent" not in r]
    for r in timed:
        cell = f"{r['shape']} batch {r['batch']} KV {r['kv']}"
        missing += [f"- {cell}, {name}: {peer['refused']}" for name, peer in r["peers"].items() if "refused" in peer]
    return [*lines, *(["No time for:", "", *missing, ""] if missing else [])]


def checks(path: Path) -> list[str]:
    results = load_json(path, "checks")
    said = [f"- {name}: {r['state']}, {r['said']}" for name, r in sorted(results.items())]
    return ["## Checks on the device", "", about(results), "", *said, ""] if said else []


def replays(path: Path) -> list[str]:
    results = load_json(path, "replay")
    timed = sorted((r for r in results.values() if "latent" in r), key=lambda r: (r["shape"], r["batch"], not r["pdl"]))
    if not timed:
        return []
    rows = []
    for r in timed:
        cells = [r["shape"], str(r["batch"]), "on" if r["pdl"] else "off"]
        for phase in PHASES:
            row = r[phase]
            sheet = "-" if row["percent_of_datasheet"] is None else f"{row['percent_of_datasheet']:.0f}%"
            cells += [f"{row['us']:.1f}", sheet, f"{r['error'][phase]:.1e}"]
        rows.append(cells)
    columns = ["shape", "batch", "PDL", "latent us", "sheet", "error", "token us", "sheet", "error"]
    return ["## One step, replayed", "", about(results), "", *markdown(columns, rows)]


def ops(path: Path) -> list[str]:
    results = load_json(path, "ops")
    if not results:
        return []
    rows = [
        [name.removeprefix("test_"), str(r["batch"]), r["dtype"], f"{r['ms'] * 1e3:.2f}", f"{r['gb_s']:.0f}",
         f"{r['percent_of_bandwidth']:.0f}%", f"{r['torch_ms'] * 1e3:.2f} ({r['faster_than_torch']:.2f})"]
        for name, r in sorted(results.items())
    ]  # fmt: skip
    columns = ["op", "batch", "dtype", "us", "GB/s", "bw", "torch us"]
    return ["## Ops", "", about(results), "", *markdown(columns, rows)]


def launches(path: Path) -> list[str]:
    cost = {k.removesuffix("_us"): f"{v:.2f} us" for k, v in load_json(path, "launch").items() if k.endswith("_us")}
    said = ", ".join(f"{value} {name}" for name, value in cost.items())
    return [f"A launch of an empty kernel in a CUDA graph: {said}.", ""] if cost else []


def chains(path: Path) -> list[str]:
    results = load_json(path, "chain")
    if not results:
        return []
    lines = ["## Beyond one step", "", about(results), ""]
    for key, r in results.items():
        what = key.split()[0]
        if "refused" in r:
            said = f"no result, {r['refused']}"
        elif what == "capacity":
            small, large = r["capacities"]
            ratios = ", ".join(f"{phase} {ratio:.3f}" for phase, ratio in r["ratio"].items())
            said = f"{large} slots against {small}, {r['kv']} in use: {ratios}"
        elif what == "rows":
            said = f"{r['identical_rows']} of {r['rows']} rows give the tokens that they give alone"
        else:
            phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in r["phases"].items())
            said = (
                f"{r['agents']} agents of {r['latent_steps']} latent steps and a judger of {r['new_tokens']} tokens in "
                f"{r['chain_seconds']:.3f} s ({phases}); one agent in transformers {r['single_seconds']:.3f} s: "
                f"{r['single_over_chain']:.2f} times as long"
            )
        lines.append(f"- {key}: {said}")
    return [*lines, ""]


def main() -> None:
    path = Path(sys.argv[1])
    lines = [
        f"# {path.stem}",
        "",
        *checks(path),
        *launches(path),
        *replays(path),
        *engine(path),
        *chains(path),
        *ops(path),
    ]
    path.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
