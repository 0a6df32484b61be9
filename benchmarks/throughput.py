"""Time to first token and between tokens against the rate of requests: stock vLLM, its prefix caching, and blending.

    python benchmarks/throughput.py [--shape llama-8b | --model DIR] --rates 1 2 4 8 --json FILE
    python benchmarks/throughput.py --plot-from FILE --plot PICTURE

Requests arrive as a Poisson process, whether earlier ones are answered or not. Each holds some of the warm chunks, no
chunk twice, in random order (chunk popularity is Zipf's), and a new question. The systems are asked the same requests
at the same times through the same client, vLLM's ``AsyncLLM``, each in a process of its own, one after the other:

    plain       vLLM without prefix caching
    prefix      vLLM with prefix caching; every chunk has been read once as the beginning of a prompt
    cacheblend  vLLM with prefix caching and the connector; every chunk is warm
    cold        vLLM with prefix caching and the connector; none is: what it costs to have it

The first two run without the connector. Times count from when a request was due to arrive. Caches are kept from rate
to rate, as a server's are.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.connection import Connection
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

SYSTEMS = ("plain", "prefix", "cacheblend", "cold")
MEMORY_BYTES = 34 << 30
ZIPF = 0.8
GOAL_SECONDS = 1.0
GIVE_UP_SECONDS = 5.0  # no higher rate is tried with a system whose median TTFT is over this
DRAIN_SECONDS = 30.0  # requests that are not answered so long after the last arrival are aborted
AT_ONCE = 256  # prompts that wait in vLLM at a time while warming
PRACTICE = 16  # requests before the first rate: what is set up on first use must not count


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: seconds after the start at which it arrives, and its prompt's token ids."""

    at: float
    prompt: list[int]


@dataclasses.dataclass
class Answer:
    """What became of a request, times in seconds after it was due.

    Attributes:
        first: When its first token came; infinite if none did.
        finished: When its last one came; infinite if it was aborted.
        gaps: Between its outputs. One output may hold several tokens, if the client was late.
        tokens: How many came.
        cached: Prompt tokens that vLLM did not prefill: its prefix cache had them, or the connector brought them.
        stats: The connector's, if it runs.
    """

    first: float = math.inf
    finished: float = math.inf
    gaps: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)


class Requests:
    """Makes prompts and when they arrive: the same ones for the same seed.

    Args:
        tokenizer: The model's.
        options: Of the command line.
    """

    def __init__(self, tokenizer: Any, options: argparse.Namespace) -> None:
        self._tokenizer = tokenizer
        self._options = options
        rng = np.random.default_rng(options.seed)
        self.chunks = [random_chunk(tokenizer, options.chunk_tokens, rng).ids for _ in range(options.chunks)]
        weights = np.arange(1, options.chunks + 1) ** -ZIPF
        self._popularity = weights / weights.sum()

    def prompt(self, rng: np.random.Generator) -> list[int]:
        """Token ids of a prompt."""
        options = self._options
        chosen = rng.choice(options.chunks, options.chunks_per_request, replace=False, p=self._popularity)
        passages = [token for n in rng.permutation(chosen) for token in self.chunks[n]]
        return passages + random_chunk(self._tokenizer, options.question_tokens, rng).ids

    def trace(self, rate: float) -> list[Arrival]:
        """Arrivals within the duration, at least one."""
        rng = np.random.default_rng([self._options.seed, round(1000 * rate)])
        arrivals: list[Arrival] = []
        at = rng.exponential(1 / rate)
        while not arrivals or at < self._options.duration:
            arrivals.append(Arrival(at, self.prompt(rng)))
            at += rng.exponential(1 / rate)
        return arrivals


class Client:
    """Asks vLLM's asynchronous engine."""

    def __init__(self, engine: Any, output_tokens: int) -> None:
        self._engine = engine
        self._output_tokens = output_tokens
        self._sent = 0

    def outputs(self, ids: list[int], max_tokens: int, extra: dict[str, Any] | None = None) -> AsyncIterator[Any]:
        """The outputs of a request, as they come; ``extra`` are its ``kv_transfer_params``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if extra is None else {"kv_transfer_params": extra},
        )
        self._sent += 1
        outputs: AsyncIterator[Any] = self._engine.generate({"prompt_token_ids": ids}, params, str(self._sent))
        return outputs

    async def read_all(self, prompts: Sequence[list[int]], extra: dict[str, Any] | None = None) -> list[Any]:
        """The last output of each prompt, for one token."""

        async def read(ids: list[int]) -> Any:
            return [output async for output in self.outputs(ids, 1, extra)][-1]

        last: list[Any] = []
        for first in range(0, len(prompts), AT_ONCE):
            last += await asyncio.gather(*map(read, prompts[first : first + AT_ONCE]))
        return last

    async def ask(self, arrival: Arrival, start: float, answer: Answer) -> None:
        """Wait until a request arrives, send it, and note down what happens to it."""
        due = start + arrival.at
        await asyncio.sleep(due - time.perf_counter())
        before = math.inf
        async for output in self.outputs(arrival.prompt, self._output_tokens):
            now = time.perf_counter() - due
            tokens = len(output.outputs[0].token_ids)
            if tokens and answer.tokens:
                answer.gaps.append(now - before)
            elif tokens:
                answer.first = now
            if tokens:
                before = now
            answer.tokens += tokens
            if output.finished:
                answer.finished = now
                answer.cached = output.num_cached_tokens or 0
                answer.stats = (output.kv_transfer_params or {}).get("cacheblend", {})

    async def serve(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """What became of each request."""
        start = time.perf_counter()
        answers = [Answer() for _ in arrivals]
        tasks = [
            asyncio.create_task(self.ask(arrival, start, answer))
            for arrival, answer in zip(arrivals, answers, strict=True)
        ]
        done, late = await asyncio.wait(tasks, timeout=arrivals[-1].at + DRAIN_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()  # raises what it has raised
        return answers


def summarise(rate: float, arrivals: Sequence[Arrival], answers: Sequence[Answer]) -> dict[str, Any]:
    """What is reported of a system at a rate, times in seconds. Nothing is interpolated; None: never came."""
    firsts = [answer.first for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    finished = [
        arrival.at + answer.finished
        for arrival, answer in zip(arrivals, answers, strict=True)
        if answer.finished < math.inf
    ]
    known = [answer.stats for answer in answers if answer.stats]
    return {
        "rate": rate,
        "requests": len(arrivals),
        "finished": len(finished),
        "finished_per_second": len(finished) / max(finished) if finished else 0.0,
        "ttft_p50": quantile(firsts, 0.5),
        "ttft_p99": quantile(firsts, 0.99),
        "itl_p50": quantile(gaps, 0.5),
        "itl_p99": quantile(gaps, 0.99),
        "output_tokens": sum(answer.tokens for answer in answers),
        "prompt_tokens": sum(len(arrival.prompt) for arrival in arrivals),
        "cached_tokens": sum(answer.cached for answer in answers),
        "decisions": Counter(stats["decision"] for stats in known),
        "faults": sum(stats["faults"] for stats in known),
        "tokens": {
            kind: sum(stats[f"{kind}_tokens"] for stats in known)
            for kind in ("prefix", "reused", "recomputed", "missed")
        },
        "ttft_seconds": [first if first < math.inf else None for first in firsts],
    }


def quantile(values: Sequence[float], q: float) -> float | None:
    """The least value that at least this share of all are not above."""
    if not values:
        return None
    found = sorted(values)[max(math.ceil(q * len(values)) - 1, 0)]
    return found if found < math.inf else None


def best_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    """The highest rate that was tried with a median TTFT within the goal."""
    good = [row["rate"] for row in rows if row["ttft_p50"] is not None and row["ttft_p50"] < GOAL_SECONDS]
    return max(good, default=None)


async def measure(
    system: str,
    model: str,
    needed: dict[str, Any],
    store: dict[str, Any],
    options: argparse.Namespace,
    tell: Connection,
) -> None:
    """Start a system, warm it, and tell of each rate."""
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from cacheblend_rag.engines.wire import action_params, parse_answer
    from cacheblend_rag.vllm.plugin import CONNECTOR_CONFIG

    requests = Requests(AutoTokenizer.from_pretrained(model), options)
    prompt_tokens = options.chunk_tokens * options.chunks_per_request + options.question_tokens
    arguments: dict[str, Any] = {
        "max_model_len": prompt_tokens + options.output_tokens + 1024,  # warming takes the primer besides
        "dtype": options.dtype,
        "disable_log_stats": True,
        **needed,
        **options.engine_args,
        "enable_prefix_caching": system != "plain",
    }
    if system in ("cacheblend", "cold"):
        arguments["kv_transfer_config"] = {**CONNECTOR_CONFIG, "kv_connector_extra_config": store}
    # With the defaults of vLLM's server: without a context, steps would be of 2048 tokens on any GPU.
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=model, **arguments), usage_context=UsageContext.OPENAI_API_SERVER
    )
    try:
        if not options.model:
            await engine.collective_rpc(make_up_weights)
        client = Client(engine, options.output_tokens)
        tell.send(("dtype", str(engine.vllm_config.model_config.dtype).removeprefix("torch.")))
        tell.send(("max_num_batched_tokens", engine.vllm_config.scheduler_config.max_num_batched_tokens))
        started = time.perf_counter()
        if system == "cacheblend":
            for output in await client.read_all(requests.chunks, action_params("warm")):
                parse_answer(output.kv_transfer_params)  # raises what went wrong
        elif system in ("prefix", "cold"):
            await client.read_all(requests.chunks)
        if system != "plain":
            seconds = time.perf_counter() - started
            tell.send(("warm_seconds", seconds))
            say(f"{system}: {options.chunks} chunks read in {seconds:.1f} s")
        rng = np.random.default_rng([options.seed, 0])
        await client.serve([Arrival(0.0, requests.prompt(rng)) for _ in range(PRACTICE)])
        for rate in sorted(options.rates):
            arrivals = requests.trace(rate)
            row = summarise(rate, arrivals, await client.serve(arrivals))
            tell.send(("rate", row))
            say(
                f"{system}: {rate:g} requests a second: {row['finished']} of {row['requests']} finished, "
                f"median TTFT {milliseconds(row['ttft_p50'])} ms, p99 {milliseconds(row['ttft_p99'])} ms"
            )
            if row["ttft_p50"] is None or row["ttft_p50"] > GIVE_UP_SECONDS:
                say(f"{system}: no higher rates, the median TTFT is over {GIVE_UP_SECONDS:g} s")
                break
    finally:
        engine.shutdown()


def run_system(
    system: str,
    model: str,
    needed: dict[str, Any],
    store: dict[str, Any],
    options: argparse.Namespace,
    tell: Connection,
) -> None:
    """The process of a system."""
    asyncio.run(measure(system, model, needed, store, options, tell))


def run(options: argparse.Namespace) -> int:
    """Measure all systems, print and write; returns how many of them failed."""
    from cacheblend_rag.vllm.settings import ConnectorSettings

    results: dict[str, Any] = {"settings": settings_of(options), "systems": {}}
    failed = 0

    def write() -> None:
        if options.json:
            write_json(options.json, results)

    with tempfile.TemporaryDirectory() as directory:
        model, needed, primer = prepare_model(options, Path(directory, "model"))
        store = ConnectorSettings.parse(
            {
                "memory_bytes": MEMORY_BYTES if options.memory_bytes is None else options.memory_bytes,
                "primer": primer,
                "blend": options.blend,
                **options.connector_args,
            }
        ).to_extra_config()
        results["settings"]["connector"] = {
            name: value for name, value in store.items() if name not in ("store", "primer")
        }
        for system in options.systems:
            found: dict[str, Any] = {"rates": []}
            results["systems"][system] = found
            listen, tell = multiprocessing.Pipe(duplex=False)
            # Spawned: the GPU's memory is free again when it ends, and nothing of vLLM is shared.
            own_store = {**store, "store": str(Path(directory, system))}
            process = multiprocessing.get_context("spawn").Process(
                target=run_system, args=(system, model, needed, own_store, options, tell)
            )
            process.start()
            tell.close()
            receive(listen, found, write)
            process.join()
            if process.exitcode:
                failed += 1
                found["error"] = f"ended with {process.exitcode}"
            found["best_rate"] = best_rate(found["rates"])
            write()
    report(title(options), results["systems"])
    return failed


def receive(listen: Connection, found: dict[str, Any], write: Callable[[], None]) -> None:
    """Put down what a system's process tells, until it ends."""
    while True:
        try:
            kind, value = listen.recv()
        except EOFError:
            return
        if kind == "rate":
            found["rates"].append(value)
        else:
            found[kind] = value
        write()


def milliseconds(seconds: float | None) -> str:
    """For printing."""
    return "never" if seconds is None else f"{1000 * seconds:.1f}"


def report(model: str, systems: dict[str, Any]) -> None:
    """Print a table, one row a system and rate."""
    say(f"\n{model}, times in ms")
    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    columns = ("system", "rate", "requests", "finished", "per second", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99")
    rows = [
        (
            system,
            f"{row['rate']:g}",
            str(row["requests"]),
            str(row["finished"]),
            f"{row['finished_per_second']:.2f}",
            *(milliseconds(row[name]) for name in names),
            ", ".join(f"{count}× {what}" for what, count in row["decisions"].items()),
        )
        for system, found in systems.items()
        for row in found["rates"]
    ]
    print_table((*columns, "decisions"), rows)
    for system, found in systems.items():
        best = "none" if found["best_rate"] is None else f"{found['best_rate']:g} a second"
        wrong = f"; {found['error']}" if "error" in found else ""
        say(f"{system}: highest rate tried with a median TTFT under {GOAL_SECONDS:g} s: {best}{wrong}")


def plot(results: dict[str, Any], path: Path) -> None:
    """Median TTFT and the slowest gaps between tokens against the rate, one line a system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "ttft_p50", "time to first token, median, s"),
        (right, "itl_p99", "time between tokens, 99th percentile, s"),
    ):
        for system, found in results["systems"].items():
            rows = [row for row in found["rates"] if row[name] is not None]
            axes.plot([row["rate"] for row in rows], [row[name] for row in rows], "o-", label=system)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("requests a second")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:g}")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    left.axhline(GOAL_SECONDS, color="#777777", linestyle="--", linewidth=1)
    left.legend(frameon=False, fontsize=9)
    machine = results["machine"]
    figure.suptitle(f"{results['settings']['model']}, {machine['gpu'] or machine['cpu']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8, 16], help="requests a second")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds in which requests arrive, per rate")
    parser.add_argument("--chunks", type=int, default=500)
    parser.add_argument("--chunks-per-request", type=int, default=6)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--blend", type=json.loads, default={"recompute_ratio": 0.15}, help="JSON: settings of blends")
    parser.add_argument("--connector-args", type=json.loads, default={}, help="JSON: further settings of the connector")
    options = parse_options(parser)
    if options.chunks < options.chunks_per_request:
        parser.error("a request can't hold more chunks than there are")
    if options.plot_from:
        plot(json.loads(options.plot_from.read_text()), options.plot)
        return 0
    return min(run(options), 1)


if __name__ == "__main__":
    sys.exit(main())
