"""Keeps blended KV out of the prefix cache that exact requests read.

vLLM finds cached blocks by a chain of hashes, each over a block's tokens and the hash before. A block that holds a
blended token gets a hash of its own kind: from that block on the chain continues from a salted predecessor. Blocks before
it keep their hashes, so the system prompt stays shared with everybody. The salt is a digest of everything that decides
the blended values, so a repeated prompt finds its own blended blocks, and nobody else does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.matching import Segment
from cacheblend_rag.policies import get_policy

_REMEMBERED = 4096
_ENDINGS = 16  # prompts remembered that differ only after their last full block


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

    def salt(self, first_block: int, salt: str) -> None:
        """Give the blocks from ``first_block`` on hashes of their own, those of tokens to be generated included."""
        request, hasher = self._request, self._hasher
        if hasher is None:
            return
        if first_block == 0:
            request.cache_salt = f"{self._cache_salt}+{salt}"
        else:
            # vLLM's hasher mixes a salt into the first block only. So it is made to continue from a salted predecessor,
            # whose place the plain hash takes again.
            predecessor = type(self.plain[0])(hashlib.sha256(self.plain[first_block - 1] + salt.encode()).digest())

            def salting_hasher(request: Any) -> list[bytes]:
                hashes = request.block_hashes
                if len(hashes) != first_block:
                    return list(hasher(request))
                plain, hashes[-1] = hashes[-1], predecessor
                try:
                    return list(hasher(request))
                finally:
                    hashes[-1] = plain

            request._block_hasher = salting_hasher
        request.block_hashes[:] = self.plain[:first_block]
        request.update_block_hashes()


@dataclasses.dataclass(frozen=True)
class _Earlier:
    rest: bytes
    length: int
    segments: tuple[Segment, ...]
    salt: str
    first_block: int


class Salts:
    """Chooses the salt of each blended prompt.

    Besides a repeated prompt, one other may read blended blocks: a prompt that begins with a whole earlier one, the next
    turn of a conversation. Its own salt would differ, since its question does. With the earlier one's it finds that
    turn's blocks, question and answer included, just as in an exact conversation.

    An earlier prompt is known by the plain hash of its last full block, which covers all before it, and its last tokens.

    Args:
        scope: Model and primer.
        block_size: Tokens of a block.
    """

    def __init__(self, scope: ChunkScope, block_size: int) -> None:
        self._scope = scope
        self._block_size = block_size
        self._earlier: OrderedDict[tuple[bytes, str], list[_Earlier]] = OrderedDict()
        self._spoilt: Counter[str] = Counter()

    def choose(
        self,
        ids: TokenIds,
        plain: Sequence[bytes],
        segments: Sequence[Segment],
        config: BlendConfig,
        first_block: int,
    ) -> tuple[str, int]:
        """Salt and first salted block of a prompt.

        Args:
            ids: The prompt, int32 ``[tokens]``.
            plain: Its plain block hashes.
            segments: Matched runs of the whole prompt.
            config: The request's settings.
            first_block: The first block that holds a blended token.
        """
        settings = repr((config.recompute_ratio, config.policy, config.check_layers))
        for blocks in range(len(plain), 0, -1):
            rest = ids[blocks * self._block_size :].tobytes()
            for earlier in self._earlier.get((plain[blocks - 1], settings), ()):
                if (
                    rest.startswith(earlier.rest)
                    and earlier.first_block <= first_block
                    and earlier.salt not in self._spoilt
                    and tuple(s for s in segments if s.start < earlier.length) == earlier.segments
                ):
                    self._remember(ids, plain, settings, segments, earlier.salt, earlier.first_block)
                    return earlier.salt, earlier.first_block
        salt = self._digest(settings, segments, ids, config)
        self._remember(ids, plain, settings, segments, salt, first_block)
        return salt, first_block

    def _remember(
        self,
        ids: TokenIds,
        plain: Sequence[bytes],
        settings: str,
        segments: Sequence[Segment],
        salt: str,
        first_block: int,
    ) -> None:
        if not plain:
            return
        rest = ids[len(plain) * self._block_size :].tobytes()
        new = _Earlier(rest, len(ids), tuple(segments), salt, first_block)
        key = plain[-1], settings
        others = [earlier for earlier in self._earlier.pop(key, ()) if earlier.rest != rest]
        self._earlier[key] = [new, *others[: _ENDINGS - 1]]
        if len(self._earlier) > _REMEMBERED:
            self._earlier.popitem(last=False)

    def spoil(self, salt: str) -> None:
        """Something went wrong in a blend under this salt: nobody may find its blocks any more."""
        self._spoilt[salt] += 1

    def _digest(self, settings: str, segments: Sequence[Segment], ids: TokenIds, config: BlendConfig) -> str:
        # What stands after the last segment decides the blended values only if the policy looks at the question.
        read = ids if get_policy(config.policy).reads_question else ids[: segments[-1].end]
        hasher = hashlib.blake2b(digest_size=16)
        for part in (self._scope.digest, settings, repr(segments)):
            hasher.update(f"{len(part)}:{part}".encode())
        hasher.update(read.tobytes())
        salt = hasher.hexdigest()
        while salt in self._spoilt:
            salt += f".{self._spoilt[salt]}"
        return salt
