"""Quality: how far a blend's answers are from full prefill's, by policy and budget.

    python benchmarks/quality.py --model DIR-OR-HUB-ID [--data FILE]... [--records FILE] [--json FILE] [--plot FILE]
    python benchmarks/quality.py --merge RECORDS... [--json FILE] [--plot FILE]

Full prefill answers a question greedily. Then each mode reads the same prompt and is given two answers token by token:
full prefill's own, and the gold one. Measured is the KL divergence of the mode's next-token distribution from full
prefill's, over the whole vocabulary, and whether both would say the same token. The closure of a mode is

    1 - sum KL(full prefill || mode) / sum KL(full prefill || full reuse)

so that 0 is full reuse and 1 is full prefill. "Full prefill in pieces" is full prefill too, the prompt read in four
pieces: what it lacks of 1 is rounding, and no blend can be expected to have more. Full reuse here always is that of
chunks prefilled behind the system prefix, whatever ``--primer`` says: closures with different primers compare.

Intervals are 90 %, by bootstrap over questions. The sign test compares a mode's KL with that of hkvd at 15 %, question
by question. The budget ``auto`` is also compared with a fixed ratio of the same policy, of what ``auto`` recomputed on
average, by interpolation between the fixed budgets measured. With ``--answers`` every mode also answers by itself,
which gives exact match, F1 and ROUGE-L.

Records are written question by question: a run that is stopped leaves what it has, and ``--merge`` puts together the
questions and modes of several runs. The chunks of one question at a time are warm; with ``--cold``, a share of them is
not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answer_metrics import METRICS, answer_metrics
from common import command, machine, rag_messages, system_prefix
from quality_data import Question, read_corpus, read_questions
from quality_ideas import POLICIES as IDEAS
from quality_ideas import SENSITIVITY, register
from quality_neighbours import best_last, sensitivity, warm_behind_neighbours
from quality_offsets import add_offsets, find_offsets
from quality_report import AUTO, BASELINE, FULL_PREFILL, FULL_REUSE, IN_PIECES, Record, panels, read_records, report
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from cacheblend_rag import ChunkTooLongError, PromptTooLongError, load_engine
from cacheblend_rag.diagnostics.quality_plot import plot_quality
from cacheblend_rag.divergence import divergence
from cacheblend_rag.engines.transformers import Scores, TransformersEngine
from cacheblend_rag.policies import get_policy, policy_names
from cacheblend_rag.store import open_store

STORE_BYTES = 16 << 30
NEIGHBOUR = "neighbour"
PRIMERS = ("system", "passage", "none", NEIGHBOUR)
CALIBRATED = "calibrated"
CALIBRATION_PROMPTS = 8
PIECES = 4
OFF = {"mode": "off"}


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to read a prompt.

    Attributes:
        mode: Its name.
        primer: What chunks are prefilled behind: ``"system"``, ``"passage"`` or ``"none"``; ``"neighbour"``: the
            system prefix and another passage (see ``quality_neighbours.py``); ``"calibrated"``: the system prefix, and
            their KV is corrected (see ``quality_offsets.py``); the name of a file: its text.
        policy: Empty where there is nothing to choose.
        budget: Share of the matched tokens that are recomputed, or ``"auto"``.
    """

    mode: str
    primer: str
    policy: str
    budget: float | str

    @property
    def blend(self) -> dict[str, Any]:
        """Settings of a call."""
        chosen = {"policy": self.policy} if self.policy else {}
        return {"mode": "blend", "recompute_ratio": self.budget, **chosen}


class NotBlendedError(Exception):
    """A prompt was read otherwise than its mode says."""


def compared_modes(policies: list[str], budgets: list[float | str], primer: str) -> list[Mode]:
    """What full prefill is compared with: full reuse, the baseline, and each policy at each budget behind a primer."""
    suffix = {"system": "", CALIBRATED: ", calibrated"}.get(primer, f", {primer} primer")
    modes = [
        Mode(FULL_REUSE, "system", "", 0.0),
        Mode(FULL_REUSE + suffix, primer, "", 0.0),
    ]
    modes += [
        Mode(f"{policy} {AUTO if budget == AUTO else f'{100 * float(budget):g}%'}{suffix}", primer, policy, budget)
        for policy in policies
        for budget in budgets
        if budget != 1 and (budget != AUTO or get_policy(policy).adapts)
    ]
    if 1.0 in budgets:  # there is nothing to choose: the same for every policy
        modes.append(Mode(f"recompute 100%{suffix}", primer, "", 1.0))
    modes.append(Mode(BASELINE, "system", "hkvd", 0.15))
    return list(dict.fromkeys(modes))


def warm_passages(question: Question, cold: float) -> list[str]:
    """The passages that are warm, at least one: all but a share of them, which the question's number decides."""
    order = np.random.default_rng(question.number).permutation(len(question.passages))
    warm = sorted(order[min(round(cold * len(order)), len(order) - 1) :])
    return [question.passages[n] for n in warm]


def agreement(expected: torch.Tensor, logits: torch.Tensor) -> int:
    """How many tokens are the most likely ones of both."""
    return int((expected.argmax(-1) == logits.argmax(-1)).sum())


class Benchmark:
    """Measures questions.

    Args:
        engines: The same model by primer, "system" among them.
        modes: What full prefill is compared with.
        max_tokens: Most tokens of an answer.
        answers: Whether all modes answer by themselves.
        cold: Share of a question's passages that are not warm.
        offsets: What is added to the KV of the calibrated engine's chunks.
    """

    def __init__(
        self,
        engines: dict[str, TransformersEngine],
        modes: list[Mode],
        max_tokens: int,
        answers: bool,
        cold: float = 0.0,
        offsets: torch.Tensor | None = None,
    ) -> None:
        self._engines = engines
        self._modes = modes
        self._max_tokens = max_tokens
        self._answers = answers
        self._cold = cold
        self._offsets = offsets
        self._sensitivity = any(mode.policy.startswith("sensitive") for mode in modes)

    def measure(self, question: Question) -> Record:
        """A question in every mode.

        Returns:
            ``dataset``, ``number``, ``prompt_tokens``; ``answer_tokens`` of full prefill's own answer and of the gold
            one; and by mode ``kl`` and ``top1`` (of either answer, summed over its tokens), ``computed_tokens`` of the
            prompt (choosing them costs more), ``recomputed_share`` (of the matched tokens), ``chosen_by`` (a policy may
            leave it to another), and where it answered by itself ``answer`` and its metrics. A question that can't be
            measured has no modes, and ``left_out`` says why.
        """
        place: Record = {"dataset": question.dataset, "number": question.number}
        try:
            with self._warm(warm_passages(question, self._cold)):
                return place | self._measure(question)
        except (ChunkTooLongError, PromptTooLongError, NotBlendedError) as error:
            return {**place, "left_out": str(error), "modes": {}}

    @contextlib.contextmanager
    def _warm(self, passages: list[str]) -> Iterator[None]:
        for primer, engine in self._engines.items():
            if primer == NEIGHBOUR:
                warm_behind_neighbours(engine, passages, system_prefix(engine.render_chat))
                continue
            engine.warm(passages)
            if primer == "system" and self._sensitivity:
                SENSITIVITY.update(sensitivity(engine, passages))
            if primer == CALIBRATED and self._offsets is not None:
                add_offsets(engine, passages, self._offsets)
        try:
            yield
        finally:
            SENSITIVITY.clear()
            for engine in self._engines.values():
                engine.evict(passages)

    def _measure(self, question: Question) -> Record:
        full_engine = self._engines["system"]
        prompt = full_engine.render_chat(rag_messages(question.passages, question.text))
        own = full_engine.generate(prompt, max_tokens=self._max_tokens, blend=OFF)
        full = full_engine.score(prompt, [own.token_ids, question.answers[0]], blend=OFF)
        expected = [logits.double().log_softmax(-1) for logits in full.logits]
        measured = {FULL_PREFILL: compare(expected, full) | judge(own.text, question)}
        in_pieces = read_in_pieces(full_engine, prompt, full.token_ids)
        measured[IN_PIECES] = compare(expected, full) | divergences(expected, in_pieces)
        for mode in self._modes:
            engine = self._engines[mode.primer]
            scores = engine.score(prompt, full.token_ids, blend=mode.blend)
            if scores.stats.decision != "blend" or scores.stats.faults:
                raise NotBlendedError(f"{mode.mode}: {scores.stats.reason}, {scores.stats.faults} faults")
            measured[mode.mode] = compare(expected, scores)
            if self._answers:
                answer = engine.generate(prompt, max_tokens=self._max_tokens, blend=mode.blend)
                measured[mode.mode] |= judge(answer.text, question)
        return {
            "prompt_tokens": full.stats.prompt_tokens,
            "answer_tokens": [len(ids) for ids in full.token_ids],
            "modes": measured,
        }


def compare(expected: list[torch.Tensor], scores: Scores) -> Record:
    """What is recorded of a mode, given full prefill's log-probabilities."""
    stats = scores.stats
    matched = stats.recomputed_tokens + stats.reused_tokens
    return {
        **divergences(expected, scores.logits),
        "computed_tokens": stats.recomputed_tokens + stats.missed_tokens,
        "recomputed_share": stats.recomputed_tokens / matched if matched else 1.0,
        "chosen_by": stats.policy,
    }


def divergences(expected: list[torch.Tensor], logits: list[torch.Tensor]) -> Record:
    """Of each answer, summed over its tokens."""
    pairs = list(zip(expected, logits, strict=True))
    return {"kl": [divergence(*pair) for pair in pairs], "top1": [agreement(*pair) for pair in pairs]}


@torch.inference_mode()
def read_in_pieces(engine: TransformersEngine, prompt: str, answers: list[list[int]]) -> list[torch.Tensor]:
    """Full prefill, some rows at a time; returns for each answer its logits ``[tokens, vocabulary]``."""
    ids = engine._prompt_ids(prompt)
    kv = engine._loaded.empty_kv(len(ids) + max(map(len, answers)))
    forward = engine._reader._forward(ids, kv)
    for piece in torch.arange(len(ids)).tensor_split(PIECES):
        first = forward.recompute(piece)[None]
    found = []
    for answer in answers:
        given = torch.tensor(answer[:-1], device=kv.device)
        found.append(torch.cat([first, forward.look_ahead(given)]) if len(given) else first)
    return found


def judge(answer: str, question: Question) -> Record:
    """What is recorded of an answer."""
    return {"answer": answer, **answer_metrics(answer, question.answers)}


def load_engines(options: argparse.Namespace) -> dict[str, TransformersEngine]:
    """The model, once for each primer that is compared."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def render_chat(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    texts = {"system": system_prefix(render_chat), "passage": None, "none": ""}
    texts |= {CALIBRATED: texts["system"], NEIGHBOUR: ""}
    if options.primer_file:
        texts[options.primer] = options.primer_file.read_text("utf-8")
    engines = {}
    for primer in dict.fromkeys(["system", options.primer]):
        store = open_store(None, memory_bytes=STORE_BYTES)
        engine = load_engine(
            options.model, store=store, primer=texts[primer], dtype=options.dtype, device=options.device
        )
        assert isinstance(engine, TransformersEngine)
        engines[primer] = engine
    return engines


def calibrate(engine: TransformersEngine, path: Path) -> torch.Tensor:
    """What is added to the KV of chunks, found on the first questions of a file that is not the measured one."""
    questions = read_questions(path)[:CALIBRATION_PROMPTS]
    prompts = [(engine.render_chat(rag_messages(one.passages, one.text)), one.passages) for one in questions]
    return find_offsets(engine, prompts)


def run(options: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Measure; returns the run, alone in a list, and the questions' records."""
    if options.calibrate_on:
        options.primer = CALIBRATED
    elif options.primer_file:
        options.primer = options.primer_file.name
    modes = compared_modes(options.policies, options.budgets, options.primer)
    engines = load_engines(options)
    offsets = calibrate(engines[CALIBRATED], options.calibrate_on) if options.calibrate_on else None
    engine = engines["system"]
    datasets = [read_questions(path) for path in options.data]
    datasets = datasets or [read_corpus(engine.count_tokens, tokens=options.corpus_tokens)]
    asked = [one for dataset in datasets for one in dataset[options.offset :: options.step][: options.questions]]
    if options.best_last:
        asked = [dataclasses.replace(one, passages=best_last(one.passages, one.text)) for one in asked]
    settings = {name: getattr(options, name) for name in ("primer", "best_last", "cold", "max_tokens", "corpus_tokens")}
    settings |= {"model": Path(options.model).name, "dtype": engine.scope.fingerprint.dtype}
    header: Record = {"command": command(), "machine": machine(), "settings": settings}
    header["modes"] = [
        dataclasses.asdict(mode) for mode in [Mode(FULL_PREFILL, "", "", 1.0), Mode(IN_PIECES, "", "", 1.0), *modes]
    ]
    benchmark = Benchmark(engines, modes, options.max_tokens, options.answers, options.cold, offsets)
    records = []
    with open(options.records or os.devnull, "w", encoding="utf-8") as file:
        print(json.dumps(header), file=file, flush=True)
        for count, question in enumerate(asked, start=1):
            started = time.perf_counter()
            record = benchmark.measure(question)
            records.append(record)
            print(json.dumps(record), file=file, flush=True)
            what = record.get("left_out") or f"{record['prompt_tokens']} tokens"
            place = f"{count}/{len(asked)}: {question.dataset} {question.number}"
            print(f"{place}: {what}, {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    for engine in engines.values():
        engine.close()
    return [header], records


def print_tables(results: Record) -> None:
    """One table a data set."""
    for dataset in results["datasets"]:
        console = Console(width=None if sys.stdout.isatty() else 150)
        table = Table(
            title=f"{dataset['dataset']}: {dataset['questions']} questions, {dataset['prompt_tokens']:.0f} tokens"
        )
        columns = ("mode", "budget", "computed", "closure", "median", "worst 10 %", "KL/token", "worst 10 %", "top-1")
        for column in (*columns, *METRICS, f"against {BASELINE}"):
            table.add_column(column, justify="left" if column == "mode" else "right")
        for row in dataset["rows"]:
            closure, kl, signs = row["closure"], row["kl_per_token"], row["against_baseline"]
            table.add_row(
                row["mode"],
                f"{row['mean_budget']:.3f}" if "mean_budget" in row else "",
                f"{row['computed_share']:.2f}",
                f"{closure['value']:.2f} [{closure['low']:.2f}, {closure['high']:.2f}]",
                f"{closure['median']:.2f}",
                f"{closure['worst_decile']:.2f}",
                f"{kl['median']:.2g}",
                f"{kl['worst_decile']:.2g}",
                f"{row['top1_agreement']['value']:.3f}",
                *(f"{row[metric]['value']:.3f}" if metric in row else "" for metric in METRICS),
                f"{signs['wins']}:{signs['losses']}, p {signs['p']:.2g}",
            )
        console.print(table)
        for row in dataset["rows"]:
            if "against_fixed" in row:
                fixed = row["against_fixed"]
                difference, signs = fixed["kl_difference"], fixed["signs"]
                console.print(
                    f"{row['mode']} against a fixed ratio of {row['mean_budget']:.3f}, whose closure would be"
                    f" {fixed['closure']:.2f}: KL a question {difference['value']:+.3g}"
                    f" [{difference['low']:+.3g}, {difference['high']:+.3g}],"
                    f" {signs['wins']}:{signs['losses']}, p {signs['p']:.2g}",
                    highlight=False,
                )


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        get_policy(name)
    return names


def _budgets(text: str) -> list[float | str]:
    budgets = [word if word == AUTO else float(word) for word in text.split(",")]
    if not all(budget == AUTO or 0 < float(budget) <= 1 for budget in budgets):
        raise argparse.ArgumentTypeError("budgets must be in (0, 1], or auto: full reuse is always measured")
    return budgets


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError("a share must be in [0, 1)")
    return share


def main() -> int:
    """Command line."""
    register()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="directory or hub id")
    what.add_argument("--merge", type=Path, nargs="+", help="records of earlier runs: measure nothing")
    parser.add_argument("--data", type=Path, action="append", default=[], help="questions; none: the example corpus")
    parser.add_argument("--questions", type=int, help="most of each data set")
    parser.add_argument("--offset", type=int, default=0, help="leave out so many first ones")
    parser.add_argument("--step", type=int, default=1, help="of the rest, take every so-many-th")
    parser.add_argument(
        "--policies",
        type=_policies,
        default=[name for name in policy_names() if name not in IDEAS],
        help=f"names with commas between them, of ideas too: {', '.join(IDEAS)}",
    )
    parser.add_argument(
        "--budgets", type=_budgets, default="0.05,0.10,0.15,0.25,0.50,1", help="likewise, in (0, 1], or auto"
    )
    parser.add_argument("--primer", choices=PRIMERS, default="system", help="what chunks are read behind")
    parser.add_argument("--primer-file", type=Path, help="a text that chunks are read behind, in place of --primer")
    parser.add_argument("--calibrate-on", type=Path, help="questions, not the measured ones: chunk KV is corrected")
    parser.add_argument("--best-last", action="store_true", help="the passages most like the question come last")
    parser.add_argument("--cold", type=_share, default=0.0, help="share of each question's passages that are not warm")
    parser.add_argument("--answers", action="store_true", help="all modes answer by themselves")
    parser.add_argument("--max-tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--corpus-tokens", type=int, default=2200, help="least tokens of passages, example corpus")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--records", type=Path, help="what was measured of each question, as JSON lines")
    parser.add_argument("--json", type=Path, help="the report")
    parser.add_argument("--plot", type=Path, help="closure against budget, .png or .svg")
    options = parser.parse_args()
    for path in filter(None, (options.records, options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    runs, records = read_records(options.merge) if options.merge else run(options)
    results = report(runs, records)
    print_tables(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    if options.plot:
        plot_quality(panels(results), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
