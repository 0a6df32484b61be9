"""What each position of a prompt is to a blend: exact, matched, or missed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from cacheblend_rag.chunks import TokenIds
from cacheblend_rag.matching import Segment

# An exact prefix shorter than this is not worth copying (a BOS token, the opening of a chat template).
MIN_PREFIX = 16


@dataclasses.dataclass(frozen=True)
class PromptLayout:
    """The positions of one prompt, by where their KV comes from.

    Attributes:
        length: Tokens in the prompt.
        prefix: Positions ``0 .. prefix - 1`` have exact KV: the same tokens were read at the same positions.
        prefix_segments: Runs of chunks that stand just where they stood when they were prefilled, so that their KV is
            exact: inside the prefix, or after it where the engine computes what is before them.
        segments: Matched runs after the prefix, in order, disjoint. Their cached KV is approximate.
        matched: int64, ascending: the positions in ``segments``.
        missed: int64, ascending: the positions after the prefix that no segment covers. Always recomputed.
    """

    length: int
    prefix: int
    prefix_segments: tuple[Segment, ...]
    segments: tuple[Segment, ...]
    matched: torch.Tensor
    missed: torch.Tensor

    @classmethod
    def build(
        cls, length: int, segments: Sequence[Segment] = (), *, prefix: int = 0, prefix_segments: Sequence[Segment] = ()
    ) -> PromptLayout:
        """Lay out a prompt; see the attributes."""
        is_matched, is_exact = np.zeros((2, length), bool)  # torch would wake its threads for these
        is_exact[:prefix] = True
        for segment in prefix_segments:
            is_exact[segment.start : segment.end] = True
        for segment in segments:
            is_matched[segment.start : segment.end] = True
        return cls(
            length,
            prefix,
            tuple(prefix_segments),
            tuple(segments),
            torch.from_numpy(np.flatnonzero(is_matched)),
            torch.from_numpy(np.flatnonzero(~is_matched & ~is_exact)),
        )

    @classmethod
    def of_prompt(cls, prompt_ids: TokenIds, segments: Sequence[Segment], primer_ids: TokenIds) -> PromptLayout:
        """Lay out a prompt whose matches are known, for an engine that keeps the primer's KV.

        A prompt that begins with the primer has exact KV there. Where the whole primer is followed by the head of a
        chunk, the chunk stands just where it stood when it was prefilled: it is exact too.

        Args:
            prompt_ids: int32 ``[tokens]``.
            segments: Matched runs, in order, disjoint, the last token in none.
            primer_ids: int32: what chunks were prefilled behind.
        """
        prefix = _common_length(prompt_ids[:-1], primer_ids)
        exact = _behind_primer(prefix, segments, primer_ids)
        if exact is not None:
            prefix = exact.end
        if prefix < MIN_PREFIX:
            prefix, exact = 0, None
        after = [s.since(prefix) for s in segments if s.end > prefix]
        return cls.build(len(prompt_ids), after, prefix=prefix, prefix_segments=[exact] if exact else [])

    @classmethod
    def after_hit(
        cls, prompt_ids: TokenIds, segments: Sequence[Segment], primer_ids: TokenIds, hit: int
    ) -> PromptLayout:
        """Lay out a prompt whose first ``hit`` tokens are in the engine's prefix cache; otherwise :meth:`of_prompt`.

        The primer is computed like any other text where it isn't in the cache; a chunk right behind it is exact.
        """
        exact = _behind_primer(_common_length(prompt_ids[:-1], primer_ids), segments, primer_ids)
        kept = [exact.since(hit)] if exact is not None and exact.end > hit else []
        first = kept[0].end if kept else hit
        after = [s.since(first) for s in segments if s.end > first]
        return cls.build(len(prompt_ids), after, prefix=hit, prefix_segments=kept)

    def without_segments(self) -> PromptLayout:
        """The same prompt when only its exact prefix is reused."""
        return PromptLayout.build(self.length, prefix=self.prefix, prefix_segments=self.prefix_segments)

    def counting_as_missed(self, positions: torch.Tensor) -> PromptLayout:
        """The same prompt when some matched positions (int64, ascending) are recomputed whatever is chosen."""
        is_among = np.zeros(self.length, bool)
        is_among[positions.numpy()] = True
        matched = self.matched.numpy()
        return dataclasses.replace(
            self,
            matched=torch.from_numpy(matched[~is_among[matched]]),
            missed=in_order(self.missed, positions),
        )

    def places_in_segments(self) -> torch.Tensor:
        """For each matched position, how many tokens of its segment stand before it: int64 ``[matched]``."""
        starts = np.array([segment.start for segment in self.segments], np.int64)
        matched = self.matched.numpy()
        return torch.from_numpy(matched - starts[np.searchsorted(starts, matched, "right") - 1])

    @property
    def question_start(self) -> int:
        """First position of the question: the unmatched tail after the last segment."""
        return self.segments[-1].end if self.segments else self.prefix


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, without waiting for the work that is under way there."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    pinned = torch.empty_like(tensor, pin_memory=True)
    np.copyto(pinned.numpy(), tensor.numpy())  # torch would wake its threads for a long one
    return pinned.to(device, non_blocking=True)


def in_order(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two lists of positions (int64, where the first one is) as one, ascending."""
    if first.device.type != "cpu":
        return torch.cat([first, upload(second, first.device)]).sort().values
    return torch.from_numpy(np.sort(np.concatenate([first.numpy(), second.numpy()])))  # without torch's threads


def _common_length(prompt_ids: TokenIds, primer_ids: TokenIds) -> int:
    """How many tokens of the primer the prompt begins with."""
    common = min(len(prompt_ids), len(primer_ids))
    differs = np.flatnonzero(prompt_ids[:common] != primer_ids[:common])
    return int(differs[0]) if len(differs) else common


def _behind_primer(common: int, segments: Sequence[Segment], primer_ids: TokenIds) -> Segment | None:
    """The run of a chunk's head right behind the whole primer, of which ``common`` tokens begin the prompt."""
    if common < len(primer_ids):
        return None
    return next((s for s in segments if s.start == common and s.offset == 0), None)
