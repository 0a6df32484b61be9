"""A chunk as a safetensors file: written, read back, verified.

The files are plain safetensors and open with the safetensors package. It isn't used here because its reads hold the
GIL or map the file (an I/O error then kills the process instead of being a miss), and because its metadata is
outside any checksum: a flipped bit in ``start`` would shift keys to the wrong place.

Layout: tensor ``kv`` first (aligned to 64 bytes), then ``scales`` if there are any, then ``ids``. Metadata: ``format``,
``key``, ``scope`` (JSON), ``start``, ``checksum``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from cacheblend_rag.chunks import ChunkKV, ChunkScope, TokenIds

# A file of another format counts as damaged. Whoever changes this also raises the manifest's SCHEMA, so that older
# versions refuse the store before they read such a file.
FORMAT = "cacheblend-chunk-1"

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
_ALIGNMENT = 64


class DamagedChunkError(Exception):
    """A file is not the chunk it should be; the message says in what way."""


@dataclasses.dataclass(frozen=True)
class ChunkHeader:
    """All of a chunk file but its tensors.

    Attributes:
        key: The chunk's key.
        scope: Who may read it.
        start: Position its keys were rotated for.
        dtype: safetensors name of the dtype of ``kv``.
        shape: Shape of ``kv``: layers, 2, tokens, kv_heads, head_dim.
        checksum: xxh3_128 over all the above, then the tensors (32 hex digits).
    """

    key: str
    scope: ChunkScope
    start: int
    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @property
    def kv_bytes(self) -> int:
        """Size of ``kv``."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of ``scales``, which go with 8-bit floats: layers, 2, kv_heads."""
        layers, two, _, heads, _ = self.shape
        return (layers, two, heads) if self.dtype == "F8_E4M3" else (0,)

    @property
    def scales_bytes(self) -> int:
        """Size of ``scales``."""
        return math.prod(self.scales_shape) * 4

    @property
    def ids_bytes(self) -> int:
        """Size of ``ids``."""
        return self.shape[2] * 4

    def to_json(self) -> str:
        """The safetensors header."""
        kv = self.kv_bytes
        scales = kv + self.scales_bytes
        tensors: dict[str, Any] = {"kv": {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": [0, kv]}}
        if self.scales_bytes:
            tensors["scales"] = {"dtype": "F32", "shape": list(self.scales_shape), "data_offsets": [kv, scales]}
        tensors["ids"] = {"dtype": "I32", "shape": [self.shape[2]], "data_offsets": [scales, scales + self.ids_bytes]}
        metadata = {
            "format": FORMAT,
            "key": self.key,
            "scope": self.scope.to_json(),
            "start": str(self.start),
            "checksum": self.checksum,
        }
        return json.dumps({"__metadata__": metadata, **tensors})

    @classmethod
    def from_json(cls, text: bytes) -> ChunkHeader:
        """Inverse of :meth:`to_json`; takes nothing that :meth:`to_json` would not write.

        Raises:
            DamagedChunkError: it isn't the header of a chunk.
        """
        try:
            fields = json.loads(text)
            metadata, kv = fields["__metadata__"], fields["kv"]
            header = cls(
                key=metadata["key"],
                scope=ChunkScope.from_json(metadata["scope"]),
                start=int(metadata["start"]),
                dtype=kv["dtype"],
                shape=tuple(kv["shape"]),
                checksum=metadata["checksum"],
            )
            shaped = len(header.shape) == 5 and all(type(size) is int and size > 0 for size in header.shape)
            sound = shaped and bool(header.scope.digest) and json.loads(header.to_json()) == fields
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DamagedChunkError(f"its header is unreadable ({type(error).__name__}: {error})") from error
        if not sound:
            raise DamagedChunkError(f"its header is not that of a {FORMAT} file")
        return header

    def digest(self, *tensors: memoryview) -> str:
        """What ``checksum`` must be, of the tensors' bytes in the order of the file."""
        hasher = xxhash.xxh3_128(dataclasses.replace(self, checksum="").to_json().encode())
        for tensor in tensors:
            hasher.update(tensor)
        return hasher.hexdigest()


def pack(chunk: ChunkKV) -> list[bytes | memoryview]:
    """The chunk's file, as pieces to write one after the other; tensors are not copied.

    Raises:
        ValueError: the chunk's key, shape or dtype is not what a chunk's must be.
    """
    if chunk.key != chunk.scope.key(chunk.ids):
        raise ValueError(f"chunk {chunk.key} does not have the key of its scope and token ids")
    if chunk.kv.dim() != 5 or chunk.kv.shape[1:3] != (2, len(chunk.ids)) or not chunk.kv.numel():
        raise ValueError(
            f"a chunk of {len(chunk.ids)} tokens, at least one, needs KV of shape "
            f"[layers, 2, {len(chunk.ids)}, kv_heads, head_dim], not {list(chunk.kv.shape)}"
        )
    if chunk.kv.dtype not in _DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in _DTYPE_NAMES)
        raise ValueError(f"KV can be stored as {known}, not {chunk.kv.dtype}")
    kv = _bytes(chunk.kv)
    ids = np.ascontiguousarray(chunk.ids, np.int32).view(np.uint8).data
    header = ChunkHeader(
        chunk.key, chunk.scope, chunk.start, _DTYPE_NAMES[chunk.kv.dtype], tuple(chunk.kv.shape), checksum=""
    )
    if (tuple(chunk.scales.shape) if chunk.scales is not None else (0,)) != header.scales_shape:
        raise ValueError(f"scales of shape {list(header.scales_shape)} belong to KV of {chunk.kv.dtype}, not others")
    tensors = [kv, ids] if chunk.scales is None else [kv, _bytes(chunk.scales), ids]
    text = dataclasses.replace(header, checksum=header.digest(*tensors)).to_json().encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *tensors]


def read_chunk(file: BinaryIO) -> ChunkKV:
    """Read a whole chunk into one buffer and verify it.

    Args:
        file: Opened for binary reading, at its start.

    Raises:
        DamagedChunkError: the file is damaged, cut short, or no chunk.
        OSError: it can't be read.
    """
    header = _read_header(file)
    # NumPy asks for huge pages where torch.empty does not: half the time for 100 MB.
    data = np.empty(header.kv_bytes + header.scales_bytes + header.ids_bytes, np.uint8)
    _read_into(file, data)
    kv, scale_bytes, ids = np.split(data, [header.kv_bytes, header.kv_bytes + header.scales_bytes])
    if header.digest(kv.data, scale_bytes.data, ids.data) != header.checksum:
        raise DamagedChunkError("its checksum does not match")
    tokens = ids.view(np.int32)
    _check_key(header, tokens)
    tensor = torch.from_numpy(kv).view(_DTYPES[header.dtype]).reshape(header.shape)
    scales = torch.from_numpy(scale_bytes.view(np.float32).reshape(header.scales_shape)) if len(scale_bytes) else None
    return ChunkKV(header.key, header.scope, tokens, header.start, tensor, scales)


def read_ids(file: BinaryIO) -> tuple[ChunkHeader, TokenIds]:
    """Read header and token ids (int32 ``[tokens]``), not the KV; the key vouches for ids and scope.

    Raises:
        DamagedChunkError: the file is damaged, cut short, or no chunk.
        OSError: it can't be read.
    """
    header = _read_header(file)
    file.seek(header.kv_bytes + header.scales_bytes, os.SEEK_CUR)
    ids = np.empty(header.ids_bytes, np.uint8)
    _read_into(file, ids)
    tokens = ids.view(np.int32)
    _check_key(header, tokens)
    return header, tokens


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_header(file: BinaryIO) -> ChunkHeader:
    # The size is checked before anything is allocated: a damaged length must not ask for terabytes.
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_HEADER, size - 8):
        raise DamagedChunkError("it is cut short or not a safetensors file")
    header = ChunkHeader.from_json(file.read(length))
    expected = 8 + length + header.kv_bytes + header.scales_bytes + header.ids_bytes
    if size != expected:
        raise DamagedChunkError(f"it has {size} bytes, not {expected}")
    return header


def _read_into(file: BinaryIO, buffer: npt.NDArray[np.uint8]) -> None:
    readinto: Any = file.readinto  # type: ignore[attr-defined]
    if readinto(buffer.data) != buffer.nbytes:
        raise DamagedChunkError("it was cut short while it was read")


def _check_key(header: ChunkHeader, ids: TokenIds) -> None:
    if header.scope.key(ids) != header.key:
        raise DamagedChunkError("its key is not that of its scope and token ids")
