"""What is stored of a chunk, and the name it is stored under."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import numpy.typing as npt
import torch

TokenIds = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class ModelFingerprint:
    """Everything that decides whether KV computed once may be read again by this model.

    Attributes:
        name: What the user called the model; shown in listings, part of neither digest nor comparison.
        weights: Digest of the weight files.
        config: Digest of the model's config, RoPE parameters included.
        tokenizer: Digest of the tokenizer.
        dtype: Dtype of the computation, such as ``"bfloat16"``.
        codec: How the KV is kept, see ``store/codecs.py``; ``"raw"`` keeps it bit for bit.
    """

    name: str = dataclasses.field(compare=False)
    weights: str
    config: str
    tokenizer: str
    dtype: str
    codec: str = "raw"

    @property
    def digest(self) -> str:
        """Hex digest over all that matters."""
        return _digest(self.weights, self.config, self.tokenizer, self.dtype, self.codec)


@dataclasses.dataclass(frozen=True)
class ChunkScope:
    """The chunks that may stand in for each other: one tenant, one model, one primer.

    Attributes:
        namespace: The tenant; chunks of different namespaces never meet.
        fingerprint: The model.
        primer_ids: Token ids every chunk was prefilled behind (their KV is dropped).
    """

    namespace: str
    fingerprint: ModelFingerprint
    primer_ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Hex digest that prefixes nothing but is hashed into each key."""
        return _digest(self.namespace, self.fingerprint.digest, np.asarray(self.primer_ids, np.int32).tobytes().hex())

    def key(self, chunk_ids: TokenIds) -> str:
        """The chunk's key: a content hash over namespace, fingerprint, primer ids and chunk ids (32 hex digits)."""
        return _digest(self.digest, np.ascontiguousarray(chunk_ids, np.int32).tobytes().hex())

    def to_json(self) -> str:
        """For file headers."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ChunkScope:
        """Inverse of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(fields["namespace"], ModelFingerprint(**fields["fingerprint"]), tuple(fields["primer_ids"]))


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkKV:
    """The keys and values of one chunk, prefilled once behind its scope's primer.

    Attributes:
        key: ``scope.key(ids)``.
        scope: Who may read it.
        ids: Token ids, int32 ``[tokens]``.
        start: Position of the first token when the KV was computed: its keys carry RoPE for ``start + i``.
        kv: ``[layers, 2, tokens, kv_heads, head_dim]``, keys at index 0, values at 1, on the CPU; in the model's dtype,
            or as the fingerprint's codec keeps it.
        scales: float32 ``[layers, 2, kv_heads]``: what ``kv`` was divided by; None: by nothing.
    """

    key: str
    scope: ChunkScope
    ids: TokenIds
    start: int
    kv: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of KV."""
        return self.kv.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _digest(*parts: str) -> str:
    # Lengths are hashed too: ("ab", "c") and ("a", "bc") must differ.
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()
