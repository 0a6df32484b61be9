"""Keeps blended KV out of the prefix cache that exact requests read.

vLLM finds cached blocks by a chain of hashes, each over a block's tokens and the hash before. A block that holds a
blended token gets a hash of its own kind: from that block on the chain continues from a salted predecessor. Blocks
before it keep their hashes, so the system prompt stays shared with everybody. The salt is a digest of everything that
decides the blended values, so a prompt finds blocks that were blended as it would be, and no others.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.matching import Segment
from cacheblend_rag.policies import get_policy

_REMEMBERED = 4096
_ENDINGS = 16  # prompts remembered that differ only after their last full block


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
        self._cache_salt = request.cache_salt or ""

    def salt(self, marks: Marks) -> None:
        """Give the blocks from each mark on hashes of their own, those of tokens to be generated included.

        Raises:
            Exception: whatever goes wrong; the hashes are plain then.
        """
        request, hasher = self._request, self._hasher
        if hasher is None:
            return
        salts = dict(marks)
        # vLLM's hasher mixes a salt into the first block only.
        request.cache_salt = f"{self._cache_salt}+{salts[0]}" if 0 in salts else self._cache_salt or None

        def salting_hasher(request: Any) -> list[bytes]:
            """What vLLM's hasher makes, but at each mark it goes on from a salted predecessor."""
            hashes = request.block_hashes
            first = len(hashes)
            while True:
                at = len(hashes)
                kept = hashes[-1] if at else b""
                if at in salts and at:
                    hashes[-1] = type(kept)(hashlib.sha256(kept + salts[at].encode()).digest())
                new = list(hasher(request))
                if at:
                    hashes[-1] = kept
                end = min((mark for mark in salts if mark > at), default=at + len(new))
                hashes.extend(new[: end - at])
                if len(new) <= end - at:
                    break
            made = hashes[first:]
            del hashes[first:]
            return list(made)

        request._block_hasher = salting_hasher
        request.block_hashes[:] = self.plain[: marks[0][0]]
        try:
            request.update_block_hashes()
        except BaseException:
            request._block_hasher = hasher
            request.cache_salt = self._cache_salt or None
            request.block_hashes[:] = self.plain
            raise


@dataclasses.dataclass(frozen=True)
class _Earlier:
    rest: bytes
    length: int
    segments: tuple[Segment, ...]
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
        self._scope = scope
        self._block_size = block_size
        self._earlier: OrderedDict[tuple[bytes, str], list[_Earlier]] = OrderedDict()
        self._age = 0

    def choose(
        self,
        ids: TokenIds,
        plain: Sequence[bytes],
        segments: Sequence[Segment],
        config: BlendConfig,
        first_block: int,
    ) -> Marks:
        """Where a prompt's blocks are salted, and with what.

        Args:
            ids: The prompt, int32 ``[tokens]``.
            plain: Its plain block hashes.
            segments: Matched runs of the whole prompt.
            config: The request's settings.
            first_block: The first block that holds a blended token.
        """
        settings = repr((config.recompute_ratio, config.policy, config.check_layers))
        marks: Marks = ()
        since = first_block * self._block_size
        earlier = self._find(ids, plain, settings, segments, first_block)
        if earlier is not None:
            marks, since = earlier.marks, earlier.length
        new = [segment for segment in segments if segment.end > since]
        if new or not marks:
            # What stands after the last segment decides the blended values only if the policy looks at the question.
            read = ids if get_policy(config.policy).reads_question else ids[: segments[-1].end]
            block = max(new[0].start, since) // self._block_size if marks else first_block
            marks = (*(mark for mark in marks if mark[0] < block), (block, self._digest(settings, segments, read)))
        self._remember(ids, plain, settings, _Earlier(b"", len(ids), tuple(segments), marks))
        return marks

    def renew(self) -> None:
        """Let nobody find blended blocks made so far: something went wrong in a blend.

        All of them, so that what went wrong need not be remembered.
        """
        self._age += 1
        self._earlier.clear()

    def _find(
        self, ids: TokenIds, plain: Sequence[bytes], settings: str, segments: Sequence[Segment], first_block: int
    ) -> _Earlier | None:
        """The longest earlier prompt that this one begins with and that was blended alike, itself included."""
        for blocks in range(len(plain), 0, -1):
            for earlier in self._earlier.get((plain[blocks - 1], settings), ()):
                rest = ids[blocks * self._block_size :].tobytes()
                if (
                    rest.startswith(earlier.rest)
                    and earlier.marks[0][0] <= first_block
                    and tuple(s for s in segments if s.start < earlier.length) == earlier.segments
                ):
                    return earlier
        return None

    def _remember(self, ids: TokenIds, plain: Sequence[bytes], settings: str, prompt: _Earlier) -> None:
        if not plain:
            return
        rest = ids[len(plain) * self._block_size :].tobytes()
        key = plain[-1], settings
        others = [earlier for earlier in self._earlier.pop(key, ()) if earlier.rest != rest]
        self._earlier[key] = [dataclasses.replace(prompt, rest=rest), *others[: _ENDINGS - 1]]
        if len(self._earlier) > _REMEMBERED:
            self._earlier.popitem(last=False)

    def _digest(self, settings: str, segments: Sequence[Segment], read: TokenIds) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        for part in (str(self._age), self._scope.digest, settings, repr(segments)):
            hasher.update(f"{len(part)}:{part}".encode())
        hasher.update(read.tobytes())
        return hasher.hexdigest()
