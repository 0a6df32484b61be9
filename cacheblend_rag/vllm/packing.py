"""Runs the blends of one step together.

Those passes that the GPU's kernels take are packed, rows of several prompts in one pass; the others run one by one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from cacheblend_rag.blending import BlendResult, run_pass
from cacheblend_rag.passes import Pass, QuestionAttention, Recompute
from cacheblend_rag.vllm.forward import AskedPrompt, PagedForward, PromptRows
from cacheblend_rag.vllm.model import PagedModel

MOST_PROMPTS = 16
"""Prompts in one pass: what a step may blend together is seldom more."""


def run_blends(
    model: PagedModel, blends: Sequence[tuple[PagedForward, Generator[Pass, torch.Tensor, BlendResult]]]
) -> list[BlendResult | Exception]:
    """Run blends to their ends.

    Args:
        model: The worker's model.
        blends: Prompts, and their :func:`~cacheblend_rag.blending.blend_passes`.

    Returns:
        What became of each: one that fails takes along those whose rows were in the same pass, no others.
    """
    forwards = [forward for forward, _ in blends]
    ends: dict[int, BlendResult | Exception] = {}
    waiting: dict[int, Pass] = {}

    def go_on(number: int, found: torch.Tensor | None) -> None:
        try:
            passes = blends[number][1]
            waiting[number] = next(passes) if found is None else passes.send(found)
        except StopIteration as end:
            ends[number] = end.value
        except Exception as error:
            ends[number] = error

    for number in range(len(blends)):
        go_on(number, None)
    while waiting:
        # What recomputes waits for those that still choose.
        kind = next((type(one) for one in waiting.values() if not isinstance(one, Recompute)), Recompute)
        numbers = [number for number, one in waiting.items() if type(one) is kind]
        wanted = [waiting.pop(number) for number in numbers]
        found = _run(model, [forwards[number] for number in numbers], wanted)
        for number, one in zip(numbers, found, strict=True):
            if isinstance(one, Exception):
                ends[number] = one
            else:
                go_on(number, one)
    return [ends[number] for number in range(len(blends))]


def _run(model: PagedModel, forwards: Sequence[PagedForward], wanted: Sequence[Pass]) -> list[torch.Tensor | Exception]:
    """Run passes of one kind; what fails has its exception in place of a result."""
    found: dict[int, torch.Tensor | Exception] = {}
    questions: list[tuple[int, PromptRows]] = []
    asked: dict[int, AskedPrompt] = {}
    scattered: list[tuple[int, PromptRows]] = []
    passes = model.kernel_passes
    for number, (forward, one) in enumerate(zip(forwards, wanted, strict=True)):
        match one:
            case QuestionAttention() if passes is not None and passes.takes_question(
                (seen := forward.leaving_out(one.rows, one.unread)).rows
            ):
                asked[number] = seen
                questions += [(number, rows) for rows in seen.forward.slices(seen.rows)]
            case Recompute() if passes is not None and passes.takes(one.rows[:-1]):
                scattered += [(number, rows) for rows in forward.slices(one.rows[:-1])]
                found[number] = torch.empty(0)  # the last row is left to vLLM's own step
            case _:
                try:
                    found[number] = run_pass(forward, one)
                except Exception as error:
                    found[number] = error
    if passes is None:
        return [found[number] for number in range(len(wanted))]

    for pack in packs([len(rows.rows) for _, rows in scattered], passes.unit(passes.most_rows), passes.most_rows):
        packed = scattered[pack]
        try:
            passes.recompute([rows for _, rows in packed])
        except Exception as error:
            found.update((number, error) for number, _ in packed)
    for pack in packs([len(rows.rows) for _, rows in questions], passes.tile, passes.most_watched):
        packed = questions[pack]
        asking = [one for one in (wanted[number] for number, _ in packed) if isinstance(one, QuestionAttention)]
        try:
            given = passes.question_attention(
                [rows for _, rows in packed], [one.weights for one in asking], [one.layers for one in asking]
            )
            for (number, _), one, of_rank in zip(packed, asking, given, strict=True):
                forwards[number].extend_exact(one.rows)
                # The mean over all ranks' heads: all have to choose the same tokens.
                mean = model.tp.all_reduce(of_rank).div_(model.tp.world_size)
                found[number] = asked[number].spread(mean)
        except Exception as error:
            found.update((number, error) for number, _ in packed)
    return [found[number] for number in range(len(wanted))]


def packs(sizes: Sequence[int], unit: int, most: int) -> list[slice]:
    """Which prompts go into one pass: slices of those whose numbers of rows are given, in order.

    Args:
        sizes: Rows of each prompt.
        unit: They are rounded up to a multiple of this.
        most: Most rows of a pass, rounded; a prompt that has more has a pass of its own.
    """
    found, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        rows = -(-size // unit) * unit
        if number > first and (total + rows > most or number - first == MOST_PROMPTS):
            found.append(slice(first, number))
            first, total = number, 0
        total += rows
    return [*found, slice(first, len(sizes))] if sizes else []
