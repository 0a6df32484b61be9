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
        prefix_segments: Runs of chunks inside the prefix; what stands before them is the primer.
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
        is_matched = torch.zeros(length, dtype=torch.bool)
        for segment in segments:
            is_matched[segment.start : segment.end] = True
        missed = (~is_matched).nonzero().flatten()
        return cls(
            length,
            prefix,
            tuple(prefix_segments),
            tuple(segments),
            is_matched.nonzero().flatten(),
            missed[missed >= prefix],
        )

    @classmethod
    def of_prompt(cls, prompt_ids: TokenIds, segments: Sequence[Segment], primer_ids: TokenIds) -> PromptLayout:
        """Lay out a prompt whose matches are known.

        A prompt that begins with the primer has exact KV there. Where the whole primer is followed by the head of a
        chunk, the chunk stands just where it stood when it was prefilled: it is exact too.

        Args:
            prompt_ids: int32 ``[tokens]``.
            segments: Matched runs, in order, disjoint, the last token in none.
            primer_ids: int32: what chunks were prefilled behind.
        """
        length = len(prompt_ids)
        common = min(length - 1, len(primer_ids))
        differs = np.flatnonzero(prompt_ids[:common] != primer_ids[:common])
        prefix = int(differs[0]) if len(differs) else common
        prefix_segments: list[Segment] = []
        if prefix == len(primer_ids):
            prefix_segments = [s for s in segments if s.start == prefix and s.offset == 0]
        if prefix_segments:
            prefix = prefix_segments[0].end
        if prefix < MIN_PREFIX:
            prefix, prefix_segments = 0, []
        after = [_cut(s, prefix) for s in segments if s.end > prefix]
        return cls.build(length, after, prefix=prefix, prefix_segments=prefix_segments)

    def without_segments(self) -> PromptLayout:
        """The same prompt when only its exact prefix is reused."""
        return PromptLayout.build(self.length, prefix=self.prefix, prefix_segments=self.prefix_segments)

    @property
    def question_start(self) -> int:
        """First position of the question: the unmatched tail after the last segment."""
        return self.segments[-1].end if self.segments else self.prefix


def _cut(segment: Segment, start: int) -> Segment:
    """The part of a segment from a position on."""
    cut = max(0, start - segment.start)
    return Segment(segment.start + cut, segment.length - cut, segment.key, segment.offset + cut)
