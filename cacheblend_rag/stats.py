"""What an engine reports: per request, per generation, per warm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from cacheblend_rag.matching import Segment

if TYPE_CHECKING:
    from cacheblend_rag.trace import BlendTrace

Decision = Literal["blend", "prefix", "prefill"]
FinishReason = Literal["stop", "length"]

Tier = Literal["disk", "memory", "gpu"]
"""Where a chunk's KV was when a prompt needed it; ``gpu`` is what vLLM's workers keep there within ``gpu_bytes``."""

PARTS = ("match", "load", "select", "recompute", "first_token")
"""What the time to first token is made of: fields of :class:`BlendStats`, in order."""


@dataclasses.dataclass
class BlendStats:
    """How one prompt was read, in tokens and seconds.

    ``prompt_tokens == prefix_tokens + reused_tokens + recomputed_tokens + missed_tokens``.

    Attributes:
        prompt_tokens: Tokens in the prompt.
        prefix_tokens: Tokens whose KV was read from an exact prefix (same tokens at the same positions).
        reused_tokens: Matched tokens whose cached KV was used as it was, shifted.
        recomputed_tokens: Matched tokens that the policy chose to recompute.
        missed_tokens: Tokens no known chunk covers: the template, the question, cold chunks.
        segments: Number of runs of tokens that were matched with known chunks.
        decision: ``"blend"``, ``"prefix"`` (only the exact prefix is reused) or ``"prefill"``.
        reason: Why, in a few words.
        policy: The policy that chose the recomputed tokens, empty if none did.
        faults: Chunks that matched but could not be read; they were prefilled.
        read_bytes: By tier, bytes of KV of the chunks that were read, each as a whole and as often as it was read. With
            tensor parallelism those of the first worker, which reads its heads. Empty if nothing was read. A chunk that
            was brought to memory ahead of the prompt counts as ``"disk"`` for the first prompt that uses it.
        read_seconds: By tier, seconds until these chunks were in the host's memory: all of the reading from
            ``"disk"``, which may have gone on before ``load`` began; next to nothing otherwise. Reads from disk that
            overlap share their time, so that all prompts' sum is the time in which anything was read.
        deviation: ``"mean"`` and ``"p95"`` (95th percentile) of the squared L2 distances between fresh and cached
            values, over all matched tokens of a prompt that was traced; see ``BlendTrace.deviation``. Else empty.
        match: Seconds for tokenising and matching.
        load: Seconds for reading, copying and shifting cached KV.
        select: Seconds for choosing the tokens to recompute.
        recompute: Seconds for the forward pass over recomputed and missed tokens.
        first_token: Seconds from the last hidden state to the first token.
        ttft: Seconds from the call to the first token.
        started: Unix time of the call; 0 where it isn't known.
    """

    prompt_tokens: int
    prefix_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    missed_tokens: int = 0
    segments: int = 0
    decision: Decision = "prefill"
    reason: str = ""
    policy: str = ""
    faults: int = 0
    read_bytes: dict[Tier, int] = dataclasses.field(default_factory=dict)
    read_seconds: dict[Tier, float] = dataclasses.field(default_factory=dict)
    deviation: dict[str, float] = dataclasses.field(default_factory=dict)
    match: float = 0.0
    load: float = 0.0
    select: float = 0.0
    recompute: float = 0.0
    first_token: float = 0.0
    ttft: float = 0.0
    started: float = 0.0

    def count_read(self, tier: Tier, nbytes: int, seconds: float) -> None:
        """Count a chunk that was read."""
        self.read_bytes[tier] = self.read_bytes.get(tier, 0) + nbytes
        self.read_seconds[tier] = self.read_seconds.get(tier, 0.0) + seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return dataclasses.asdict(self)

    def line(self, scores: Sequence[float] = ()) -> str:
        """All of it in one line, for a log.

        Args:
            scores: What the recomputed tokens were chosen by: the lowest and the highest; empty if that isn't known.
        """
        chosen = f" by {self.policy}" if self.policy else ""
        if len(scores):
            chosen += f", scores {min(scores):.3g} to {max(scores):.3g}"
        matched = self.recomputed_tokens + self.reused_tokens
        counts = (
            f"{self.recomputed_tokens} of {matched} matched tokens recomputed{chosen}, {self.missed_tokens} missed, "
            f"{self.prefix_tokens} of an exact prefix, {self.prompt_tokens} in all, {self.segments} segments, "
            f"{self.faults} faults"
        )
        parts = ", ".join(f"{part} {1000 * getattr(self, part):.1f} ms" for part in PARTS)
        return f"{self.decision} ({self.reason}): {counts}; {parts}"


@dataclasses.dataclass
class Generation:
    """The answer to one prompt.

    Attributes:
        text: The generated text, without the stop string.
        token_ids: The generated tokens, an end-of-sequence token included.
        finish_reason: ``"stop"`` (end of sequence or a stop string) or ``"length"``.
        logprobs: With ``logprobs=K``, one dict per generated token: token id to natural-log probability, of the K
            most likely tokens and the one chosen, among those that ``structured_outputs`` leave. None otherwise.
        stats: How the prompt was read.
        segments: The matched runs, in prompt order.
        trace: With ``trace=True``, what the blend measured and chose; None otherwise, and where nothing was blended.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[dict[int, float]] | None
    stats: BlendStats
    segments: tuple[Segment, ...] = ()
    trace: BlendTrace | None = None


class StreamPiece(str):
    """A piece of a streamed answer: a string. Pieces joined are the answer.

    Attributes:
        generation: On the last piece only, the whole generation.
    """

    generation: Generation | None

    def __new__(cls, text: str, generation: Generation | None = None) -> StreamPiece:
        """A piece; ``generation`` on the last one."""
        piece = super().__new__(cls, text)
        piece.generation = generation
        return piece


@dataclasses.dataclass(frozen=True)
class WarmReport:
    """What warming did.

    Attributes:
        stored: Chunks prefilled and stored.
        already_there: Chunks that were warm, repeats within the call included.
        tokens: Tokens prefilled.
        bytes: Bytes written.
        seconds: Wall time.
    """

    stored: int
    already_there: int
    tokens: int
    bytes: int
    seconds: float
