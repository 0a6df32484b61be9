"""Keeps blended KV out of the prefix cache that exact requests read.

vLLM finds cached blocks by a chain of hashes, each over a block's tokens and the hash before. A block that holds a
blended token gets a hash of its own kind, as all blocks after it do: vLLM's own one mixed with a salt, and longer than
any of vLLM's. Blocks before it keep their hashes, so the system prompt stays shared with everybody. The salt is a
digest of everything that decides the blended values, so a prompt finds blocks that were blended as it would be, and no
others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cacheblend_rag.budget import ratios
from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.matching import Segment
from cacheblend_rag.policies import get_policy

_REMEMBERED = 4096
_ENDINGS = 16  # prompts remembered that differ only after their last full block, or in their settings


Marks = tuple[tuple[int, str], ...]
"""Blocks from which on a salt counts, ascending, with their salts."""


class BlockHashes:
    """The block hashes of one request, which are state of the request, made by its own hasher.

    Args:
        request: ``vllm.v1.request.Request``, before it is scheduled for the first time.
    """

    def __init__(self, request: Any) -> None:
        self.plain: tuple[bytes, ...] = tuple(request.block_hashes)
        self._request = request
        self._hasher = request._block_hasher

    def salt(self, marks: Marks) -> None:
        """Give the blocks from each mark on hashes of their own, those of tokens to be generated included.

        Args:
            marks: Where; with none, all hashes are plain.

        Raises:
            Exception: whatever goes wrong; the hashes are plain then.
        """
        request, hasher = self._request, self._hasher
        if hasher is None:
            return
        if not marks:  # as they were
            request._block_hasher = hasher
            request.block_hashes[:] = self.plain
            request.update_block_hashes()
            return
        plain = list(self.plain)
        digests = _digests(marks)

        def salting_hasher(request: Any) -> list[bytes]:
            """Salts what vLLM's hasher makes, which goes on from the plain hashes: it is shown those meanwhile."""
            salted = request.block_hashes
            del plain[len(salted) :]  # vLLM takes generated tokens back when more of a streamed prompt comes
            request.block_hashes = plain
            try:
                new = hasher(request)
            finally:
                request.block_hashes = salted
            plain.extend(new)
            return _salted(new, len(salted), digests)

        try:
            request._block_hasher = salting_hasher
            request.block_hashes[:] = _salted(plain, 0, digests)
            request.update_block_hashes()  # tokens generated before a preemption
        except BaseException:
            request._block_hasher = hasher
            request.block_hashes[:] = self.plain
            raise


def _digests(marks: Marks) -> list[tuple[int, bytes]]:
    """Each mark's block, and a digest of the mark and those before it."""
    hasher = hashlib.blake2b(digest_size=16)
    digests = []
    for block, salt in marks:
        hasher.update(f"{block} {len(salt)} {salt} ".encode())
        digests.append((block, hasher.digest()))
    return digests


def _salted(plain: Sequence[bytes], first: int, digests: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """Hashes of consecutive blocks, from the first mark on such as tell both plain hash and digest.

    Args:
        plain: The blocks' plain hashes.
        first: Number of the first of the blocks.
        digests: By the blocks they count from, ascending.
    """
    hashes = list(plain)
    end = first + len(plain)
    for (block, digest), (next_block, _) in itertools.pairwise([*digests, (end, b"")]):
        part = slice(max(block - first, 0), max(next_block - first, 0))
        if plain[part]:
            # Mixed too, not only joined: vLLM's events call a block by the last 8 bytes of its hash.
            size = len(plain[0])
            mixed = np.frombuffer(b"".join(plain[part]), np.uint8).reshape(-1, size)
            data = (mixed ^ np.resize(np.frombuffer(digest, np.uint8), size)).tobytes()
            hashes[part] = [digest + data[i : i + size] for i in range(0, len(data), size)]
    return hashes


@dataclasses.dataclass(frozen=True)
class _Earlier:
    settings: str
    rest: bytes
    length: int
    segments: tuple[Segment, ...]
    left_out: frozenset[str]
    marks: Marks


class Salts:
    """Chooses the salts of each blended prompt.

    Besides a repeated prompt, one other may read blended blocks: a prompt that begins with a whole earlier one, the
    next turn of a conversation. Its own salt would differ, since its question does. With the earlier one's it finds
    that turn's blocks, question and answer included, just as in an exact conversation. Chunks that are new in the next
    turn are blended for its own question, so from there on it has a salt of its own.

    An earlier prompt is known by the plain hash of its last full block, which covers all before it, and by the tokens
    after that.

    Args:
        scope: Model and primer.
        block_size: Tokens of a block.
    """

    def __init__(self, scope: ChunkScope, block_size: int) -> None:
        self._scope_digest = scope.digest
        self._block_size = block_size
        self._earlier: OrderedDict[bytes, list[_Earlier]] = OrderedDict()
        self._age = 0

    def choose(
        self,
        ids: TokenIds,
        plain: Sequence[bytes],
        segments: Sequence[Segment],
        config: BlendConfig,
        first_block: int,
        *,
        alone: bool = False,
    ) -> Marks:
        """Where a prompt's blocks are salted, and with what.

        Args:
            ids: The prompt, int32 ``[tokens]``.
            plain: Its plain block hashes.
            segments: Matched runs of the whole prompt.
            config: The request's settings.
            first_block: The first block that holds a blended token.
            alone: Whether it goes on from no earlier prompt.
        """
        settings = _settings(config)
        marks: Marks = ()
        since = first_block * self._block_size
        for earlier in () if alone else self._find(ids, plain, settings):
            known = tuple(segment for segment in segments if segment.start < earlier.length)
            if earlier.marks[0][0] <= first_block and known == earlier.segments:
                marks, since = earlier.marks, earlier.length
                break
        new = [segment for segment in segments if segment.end > since]
        if new or not marks:
            # What stands after the last segment decides the blended values only if the policy looks at the question.
            read = ids if get_policy(config.policy).reads_question else ids[: segments[-1].end]
            block = max(new[0].start, since) // self._block_size if marks else first_block
            marks = (
                *(mark for mark in marks if mark[0] < block),
                (block, self._digest(settings, segments, plain, read)),
            )
        return marks

    def may_go_on(self, ids: TokenIds, plain: Sequence[bytes], config: BlendConfig) -> bool:
        """Whether blended blocks may be in the prefix cache that a prompt would find with the salts of :meth:`choose`.

        They are those of the same prompt or of the turn before; of prompts with the same passages, if the policy does
        not look at the question.
        """
        return not get_policy(config.policy).reads_question or any(self._find(ids, plain, _settings(config)))

    def left_out_before(self, ids: TokenIds, plain: Sequence[bytes], config: BlendConfig) -> frozenset[str]:
        """Keys of known chunks that the turn before was blended without. With them, its blocks would not be found."""
        return next((earlier.left_out for earlier in self._find(ids, plain, _settings(config))), frozenset())

    def remember(
        self,
        ids: TokenIds,
        plain: Sequence[bytes],
        segments: Sequence[Segment],
        config: BlendConfig,
        left_out: frozenset[str],
        marks: Marks,
    ) -> None:
        """A prompt is blended with the salts that :meth:`choose` gave: a next turn goes on from it."""
        if not plain:
            return
        rest = ids[len(plain) * self._block_size :].tobytes()
        new = _Earlier(_settings(config), rest, len(ids), tuple(segments), left_out, marks)
        others = [
            one for one in self._earlier.pop(plain[-1], ()) if (one.settings, one.rest) != (new.settings, new.rest)
        ]
        self._earlier[plain[-1]] = [new, *others[: _ENDINGS - 1]]
        if len(self._earlier) > _REMEMBERED:
            self._earlier.popitem(last=False)

    def renew(self) -> None:
        """Let nobody find blended blocks made so far: something went wrong in a blend.

        All of them, so that what went wrong need not be remembered.
        """
        self._age += 1
        self._earlier.clear()

    def _find(self, ids: TokenIds, plain: Sequence[bytes], settings: str) -> Iterator[_Earlier]:
        """Earlier prompts that this one begins with and that were blended alike, longest first, itself included."""
        if self._earlier.keys().isdisjoint(plain):  # as most prompts are, and much faster to find out
            return
        for blocks in range(len(plain), 0, -1):
            for earlier in self._earlier.get(plain[blocks - 1], ()):
                rest = ids[blocks * self._block_size :].tobytes()
                if earlier.settings == settings and rest.startswith(earlier.rest):
                    yield earlier

    def _digest(self, settings: str, segments: Sequence[Segment], plain: Sequence[bytes], read: TokenIds) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        places = ";".join(f"{s.start},{s.length},{s.key},{s.offset}" for s in segments)
        for part in (str(self._age), self._scope_digest, settings, places):
            hasher.update(f"{len(part)}:{part}".encode())
        blocks = min(len(plain), len(read) // self._block_size)
        if blocks:
            hasher.update(plain[blocks - 1])  # a hash of all tokens before, too
        hasher.update(read[blocks * self._block_size :].tobytes())
        return hasher.hexdigest()


def _settings(config: BlendConfig) -> str:
    """All that decides which tokens are recomputed."""
    chosen_by = (config.policy, config.check_layers, config.question_layers, config.forced_tokens)
    return repr((ratios(config), *chosen_by))
