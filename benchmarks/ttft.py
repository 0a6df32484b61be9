"""Time to first token: full prefill, exact prefix reuse, full reuse, blending at several ratios, and mode "auto".

    python benchmarks/ttft.py --engine transformers --model DIR-OR-HUB-ID [--json FILE] [--plot FILE]

All modes answer the same prompts in the same process, one after the other for each prompt, in an order that changes
from round to round, so that what the machine does meanwhile hits all of them alike. Chunk KV is read from disk each
time (through the system's page cache), there is no memory tier. Ratios are medians over prompts of full prefill's time
divided by the mode's, each pair measured in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import corpus_prompts, system_prefix, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cacheblend_rag import BlendConfig, Engine, load_engine
from cacheblend_rag.store import open_store

PARTS = ("match", "load", "select", "recompute", "first_token")


def modes(policies: list[str]) -> dict[str, dict[str, Any]]:
    """What is compared: settings of a call, by name."""
    blends = {
        f"{policy} {ratio:.0%}": {"mode": "blend", "recompute_ratio": ratio, "policy": policy}
        for policy in policies
        for ratio in (0.05, 0.15, 0.30)
    }
    return {
        "full prefill": {"mode": "off"},
        # Nothing may be blended, so what stands at the beginning just as it was read before is all that is reused: the
        # system prompt and the first passage. More than a prefix cache has, unless it has seen them together.
        "prefix reuse": {"mode": "auto", "min_reused_tokens": 10**9},
        "full reuse": {"mode": "blend", "recompute_ratio": 0.0},
        **blends,
        "auto": {"mode": "auto"},  # the default: blends only what it gains from
        "recompute 100%": {"mode": "blend", "recompute_ratio": 1.0},
    }


def measure(engine: Engine, prompts: list[str], compared: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Stats of every mode, prompt and round."""
    names = list(compared)
    stats: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:  # what is set up on first use must not count
        engine.generate(prompts[0], max_tokens=1, blend=compared[name])
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for prompt in track(prompts, description="Measuring", console=Console(stderr=True), transient=True):
            for n in rng.permutation(len(names)):
                name = names[n]
                stats[name].append(engine.generate(prompt, max_tokens=1, blend=compared[name]).stats)
    return stats


def summarise(stats: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Medians and ratios, one row a mode."""
    full = [one.ttft for one in stats["full prefill"]]
    rows = []
    for name, measured in stats.items():
        ratios = [f / m.ttft for f, m in zip(full, measured, strict=True)]
        rows.append(
            {
                "mode": name,
                "ttft_seconds": statistics.median(m.ttft for m in measured),
                "speed_up": statistics.median(ratios),
                "speed_up_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
                "tokens": {
                    part: statistics.median(getattr(m, f"{part}_tokens") for m in measured)
                    for part in ("prompt", "prefix", "reused", "recomputed", "missed")
                },
                "parts_seconds": {part: statistics.median(getattr(m, part) for m in measured) for part in PARTS},
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Stacked bars of the parts, one a mode, with the speed-up at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(PARTS, ("#CC79A7", "#E69F00", "#009E73", "#0072B2", "#56B4E9"), strict=True))
    for y, row in enumerate(rows):
        left = 0.0
        for part in PARTS:
            seconds = row["parts_seconds"][part]
            axes.barh(y, seconds, left=left, color=colours[part], label=part.replace("_", " ") if y == 0 else None)
            left += seconds
        axes.text(left, y, f"  {row['ttft_seconds']:.3f} s, {row['speed_up']:.2f}×", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["mode"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("seconds to first token (median)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="transformers", help="what runs the model")
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON: further arguments of the engine")
    parser.add_argument("--policies", nargs="+", default=["hkvd", "query_aware"])
    parser.add_argument("--primer", choices=("passage", "system"), default="system", help="what chunks are read behind")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2200, help="least tokens of passages in a prompt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        arguments = {"engine": options.engine, "dtype": options.dtype, "device": options.device}
        arguments["engine_args"] = dict(options.engine_args)
        if options.engine == "vllm":
            # Every prompt is asked in every mode: a prefix cache would answer all but the first.
            arguments["engine_args"].setdefault("enable_prefix_caching", False)
        with load_engine(options.model, **arguments) as plain:
            primer = system_prefix(plain.render_chat) if options.primer == "system" else None
        store = open_store(Path(directory) / "store", memory_bytes=0)
        with load_engine(options.model, store=store, primer=primer, blend=BlendConfig(), **arguments) as engine:
            documents, prompts = corpus_prompts(
                engine.render_chat, engine.count_tokens, prompts=options.prompts, tokens=options.tokens, seed=0
            )
            with console.status("Warming"):
                report = engine.warm(documents)
            rows = summarise(measure(engine, prompts, modes(options.policies), options.rounds))
            dtype = engine.scope.fingerprint.dtype
    table = Table(title=f"TTFT, {Path(options.model).name}, {dtype}")
    for column in ("mode", "TTFT s", "× full", "reused", "recomputed", "missed", "prefix", "load s", "select s"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        counts = [f"{row['tokens'][part]:.0f}" for part in ("reused", "recomputed", "missed", "prefix")]
        times = [f"{row['parts_seconds'][part]:.3f}" for part in ("load", "select")]
        table.add_row(row["mode"], f"{row['ttft_seconds']:.3f}", f"{row['speed_up']:.2f}", *counts, *times)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "plot", "model")}
        settings |= {"model": Path(options.model).name, "dtype": dtype}
        warm = {"chunks": report.stored, "tokens": report.tokens, "bytes": report.bytes, "seconds": report.seconds}
        write_json(options.json, {"settings": settings, "warm": warm, "rows": rows})
    if options.plot:
        prompt_tokens = rows[0]["tokens"]["prompt"]
        plot(rows, f"{Path(options.model).name}, {dtype}, prompts of {prompt_tokens:.0f} tokens", options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
