"""Time to first token of the vLLM engine against the length of the prompt: plain prefill and blending.

    python benchmarks/lengths.py [--shape llama-8b | --model DIR] [--mixed] --json FILE
    python benchmarks/lengths.py --plot-from FILE --plot PICTURE

A prompt is warm chunks in random order and a question that is new, sent as token ids, one prompt at a time, without
prefix caching. All modes answer the same prompt in the same process, one after the other in an order that changes from
round to round; the next round has another prompt. Measured is the whole call for one token, from outside. A share of
plain prefill is the median over the rounds of the mode's time divided by plain prefill's in the same round.

``--mixed`` adds prompts that blending has little or nothing to gain from, in mode "auto" and plainly: what they lose.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import write_json
from shapes import (
    add_options,
    make_up_weights,
    parse_options,
    prepare_model,
    print_table,
    random_chunk,
    say,
    settings_of,
    title,
)

from cacheblend_rag import Engine, load_engine
from cacheblend_rag.store import open_store

PLAIN = "plain"
OFF: dict[str, Any] = {"mode": "off"}
MEMORY_BYTES = 16 << 30
COUNTS = ("prefix_tokens", "reused_tokens", "recomputed_tokens", "missed_tokens")
PARTS = ("match", "load", "select", "recompute", "first_token")
MIXED_REPEATS = 5  # rounds of the short prompts for one of the long ones: they are quick, and differ by little
ONE_HIT_PROMPT = 2048
HALF_HIT_PAIRS = (4, 16)  # a warm chunk and a cold one
NO_HIT_PROMPTS = (20, 100, 300, 600, 1200, 4096, 16384)


class Measured:
    """Times and stats of some modes over the same prompts.

    Attributes:
        seconds: By mode, one a round.
        stats: By mode, one a round.
    """

    def __init__(self, modes: dict[str, dict[str, Any]]) -> None:
        self._modes = modes
        self.seconds: dict[str, list[float]] = {name: [] for name in modes}
        self.stats: dict[str, list[Any]] = {name: [] for name in modes}

    def measure(
        self, engine: Engine, make_prompt: Callable[[], list[int]], rounds: int, rng: np.random.Generator
    ) -> None:
        """Ask each mode once, not counted, then all of them in each round."""
        names = list(self._modes)
        for number in range(-1, rounds):
            prompt = make_prompt()
            for n in rng.permutation(len(names)):
                started = time.perf_counter()
                answer = engine.generate(prompt, max_tokens=1, blend=self._modes[names[n]])
                seconds = time.perf_counter() - started
                if number >= 0:
                    self.seconds[names[n]].append(seconds)
                    self.stats[names[n]].append(answer.stats)

    def row(self, mode: str) -> dict[str, Any]:
        """What is reported of a mode."""
        pairs = list(zip(self.seconds[mode], self.seconds[PLAIN], strict=True))
        shares = [seconds / plain for seconds, plain in pairs]
        stats = self.stats[mode]
        return {
            "mode": mode,
            "ttft_ms": 1000 * statistics.median(self.seconds[mode]),
            "share": statistics.median(shares),
            "share_quartiles": [float(q) for q in np.quantile(shares, [0.25, 0.75])],
            "difference_ms": 1000 * statistics.median(seconds - plain for seconds, plain in pairs),
            "decisions": Counter(one.decision for one in stats),
            "reasons": Counter(one.reason for one in stats),
            "faults": sum(one.faults for one in stats),
            "tokens": {name: statistics.median(getattr(one, name) for one in stats) for name in COUNTS},
            "parts_ms": {part: 1000 * statistics.median(getattr(one, part) for one in stats) for part in PARTS},
            "seconds": self.seconds[mode],
        }


def compared_modes(policies: list[str], ratios: list[float]) -> dict[str, dict[str, Any]]:
    """What is compared: settings of a call, by name."""
    blends = {
        f"{policy} {ratio:.0%}": {"mode": "blend", "policy": policy, "recompute_ratio": ratio}
        for policy in policies
        for ratio in ratios
    }
    return {PLAIN: OFF, **blends, "auto 15%": {"mode": "auto", "recompute_ratio": 0.15}}


def mixed_prompts(
    chunks: list[list[int]], new: Callable[[int], list[int]], question_tokens: int, window: int
) -> dict[str, Callable[[], list[int]]]:
    """What makes prompts of which half, little or nothing can be reused, by a name; those that don't fit are left out.

    Args:
        chunks: Token ids of warm chunks.
        new: Makes as many tokens as it is told, known to nobody.
        question_tokens: Length of the question behind passages.
        window: Most tokens that a prompt and its answer may have.
    """

    def no_hit(tokens: int) -> Callable[[], list[int]]:
        return lambda: new(tokens)

    def one_hit(tokens: int) -> Callable[[], list[int]]:
        before = (ONE_HIT_PROMPT - tokens) // 2
        after = ONE_HIT_PROMPT - tokens - before
        return lambda: [*new(before), *chunks[0][:tokens], *new(after)]

    def half_hit(pairs: int) -> Callable[[], list[int]]:
        def make() -> list[int]:
            passages = [ids for chunk in chunks[:pairs] for ids in (chunk, new(len(chunk)))]
            return [token for ids in passages for token in ids] + new(question_tokens)

        return make

    made = {f"{tokens} tokens, no hit": no_hit(tokens) for tokens in NO_HIT_PROMPTS if tokens < window}
    if window > ONE_HIT_PROMPT:
        for tokens in (128, 512):
            if tokens <= len(chunks[0]):
                made[f"{ONE_HIT_PROMPT} tokens, {tokens} of them hit"] = one_hit(tokens)
    for pairs in HALF_HIT_PAIRS:
        tokens = 2 * sum(len(chunk) for chunk in chunks[:pairs]) + question_tokens
        if pairs <= len(chunks) and tokens < window:
            made[f"{tokens} tokens, half of them hit"] = half_hit(pairs)
    return made


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    modes = compared_modes(options.policies, options.ratios)
    results: dict[str, Any] = {"settings": settings_of(options), "lengths": [], "mixed": []}

    def write() -> None:
        if options.json:
            write_json(options.json, results)

    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        model, needed, primer = prepare_model(options, Path(directory, "model"))
        memory_bytes = MEMORY_BYTES if options.memory_bytes is None else options.memory_bytes
        store = open_store(Path(directory, "store"), memory_bytes=memory_bytes)
        arguments = {
            **needed,
            "max_model_len": max(options.lengths) + 1024,
            "enable_prefix_caching": False,
            **options.engine_args,
        }
        with load_engine(
            model, engine="vllm", store=store, primer=primer, codec=options.codec, dtype=options.dtype,
            engine_args=arguments,
        ) as engine:  # fmt: skip
            from transformers import AutoTokenizer

            if not options.model:
                engine._thread.engine.collective_rpc(make_up_weights)
            tokenizer = AutoTokenizer.from_pretrained(model)
            results["settings"]["dtype"] = engine.scope.fingerprint.dtype
            scheduling = engine._thread.engine.vllm_config.scheduler_config
            results["settings"]["max_num_batched_tokens"] = scheduling.max_num_batched_tokens
            results["settings"]["primer_tokens"] = len(engine.scope.primer_ids)

            def new(tokens: int) -> list[int]:
                return random_chunk(tokenizer, tokens, rng).ids

            chunks = [
                random_chunk(tokenizer, options.chunk_tokens, rng)
                for _ in range(max(options.lengths) // options.chunk_tokens)
            ]
            report = engine.warm([chunk.text for chunk in chunks])
            say(f"{report.stored} chunks warm, {report.bytes / 2**30:.2f} GiB in {report.seconds:.1f} s")
            results["warm"] = {"chunks": report.stored, "bytes": report.bytes, "seconds": report.seconds}
            for length in options.lengths:
                chosen = length // options.chunk_tokens

                def prompt(chosen: int = chosen) -> list[int]:
                    order = rng.permutation(len(chunks))[:chosen]
                    return [token for n in order for token in chunks[n].ids] + new(options.question_tokens)

                measured = Measured(modes)
                measured.measure(engine, prompt, options.rounds, rng)
                rows = [measured.row(mode) for mode in modes]
                results["lengths"].append({"prompt_tokens": len(prompt()), "length": length, "rows": rows})
                write()
                say(f"\n{title(options)}, {chosen} chunks of {options.chunk_tokens} tokens and a question")
                print_rows("mode", rows)
            if options.mixed:
                pair = {PLAIN: OFF, "auto": {"mode": "auto"}}
                mixed = mixed_prompts(
                    [chunk.ids for chunk in chunks], new, options.question_tokens, engine.context_window
                )
                for name, make in mixed.items():
                    measured = Measured(pair)
                    measured.measure(engine, make, MIXED_REPEATS * options.rounds, rng)
                    results["mixed"].append({"prompt": name, PLAIN: measured.row(PLAIN), "auto": measured.row("auto")})
                    write()
                    auto = results["mixed"][-1]["auto"]
                    say(f"{name}: auto takes {auto['share']:.3f} of plain, {auto['difference_ms']:+.2f} ms")
                say("\nPrompts that are not all warm, mode auto against plain")
                print_rows("prompt", [{**one["auto"], "mode": one["prompt"]} for one in results["mixed"]])


def print_rows(first: str, rows: list[dict[str, Any]]) -> None:
    """A table, one row a mode or a prompt."""
    columns = (first, "TTFT ms", "of plain", "quartiles", "difference ms", "reused", "recomputed", "missed", "decision")
    print_table(
        columns,
        [
            (
                row["mode"],
                f"{row['ttft_ms']:.2f}",
                f"{row['share']:.3f}",
                "-".join(f"{q:.3f}" for q in row["share_quartiles"]),
                f"{row['difference_ms']:+.2f}",
                *(f"{row['tokens'][name]:.0f}" for name in COUNTS[1:]),
                ", ".join(f"{count}× {what}" for what, count in row["decisions"].items())
                + (f" ({row['faults']} faults)" if row["faults"] else ""),
            )
            for row in rows
        ],
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of plain prefill's time against length, one line a mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lengths = [one["prompt_tokens"] for one in results["lengths"]]
    for n, row in enumerate(results["lengths"][0]["rows"]):
        shares = [one["rows"][n]["share"] for one in results["lengths"]]
        quartiles = np.array([one["rows"][n]["share_quartiles"] for one in results["lengths"]]).T
        plain = row["mode"] == PLAIN
        (line,) = axes.plot(
            lengths, shares, "--" if plain else "o-", color="#777777" if plain else f"C{n}", label=row["mode"]
        )
        axes.fill_between(lengths, *quartiles, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the prompt")
    axes.set_ylabel("time to first token, share of plain prefill")
    settings, machine = results["settings"], results["machine"]
    axes.set_title(f"{settings['model']}, {settings['dtype']}, {machine['gpu'] or machine['cpu']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="tokens of chunks")
    parser.add_argument("--policies", nargs="+", default=["query_aware", "hkvd"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--codec", default="raw", help="how chunk KV is kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mixed", action="store_true", help="also prompts that gain nothing")
    options = parse_options(parser)
    if min(options.lengths) < options.chunk_tokens:
        parser.error("a length is shorter than a chunk: lower --chunk-tokens")
    if options.plot_from:
        plot(json.loads(options.plot_from.read_text()), options.plot)
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
