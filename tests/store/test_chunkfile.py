"""The chunk file format: what is written is what is read, by us and by the safetensors package."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from store_chunks import SCOPE, make_chunk, same

from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.store.chunkfile import DamagedChunkError, pack, read_chunk, read_ids

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


def packed(chunk: ChunkKV) -> bytes:
    return b"".join(bytes(piece) for piece in pack(chunk))


@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 50),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    namespace=st.text(st.characters(exclude_categories=["Cs"])),
    start=st.integers(0, 1 << 20),
)
def test_round_trip_is_bit_for_bit(seed, tokens, layers, heads, head_dim, dtype, namespace, start):
    scope = dataclasses.replace(SCOPE, namespace=namespace)
    chunk = make_chunk(seed, tokens=tokens, layers=layers, heads=heads, head_dim=head_dim, dtype=dtype, scope=scope)
    chunk = dataclasses.replace(chunk, start=start)
    file = io.BytesIO(packed(chunk))
    assert same(read_chunk(file), chunk)
    file.seek(0)
    header, ids = read_ids(file)
    assert (header.key, header.scope, header.start) == (chunk.key, scope, start)
    assert np.array_equal(ids, chunk.ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_package_reads_the_file(tmp_path: Path, dtype: torch.dtype):
    chunk = make_chunk(1, dtype=dtype)
    path = tmp_path / "chunk.safetensors"
    path.write_bytes(packed(chunk))
    with safe_open(path, "pt") as file:
        kv, ids, metadata = file.get_tensor("kv"), file.get_tensor("ids"), file.metadata()
    assert torch.equal(kv.view(torch.uint8), chunk.kv.view(torch.uint8))
    assert np.array_equal(ids.numpy(), chunk.ids)
    assert metadata["key"] == chunk.key
    assert json.loads(metadata["scope"])["namespace"] == SCOPE.namespace


def test_a_transposed_tensor_is_written_in_its_own_order():
    chunk = make_chunk(2, heads=3)
    turned = chunk.kv.transpose(3, 4).contiguous().transpose(3, 4)
    assert turned.stride() != chunk.kv.stride()
    assert packed(dataclasses.replace(chunk, kv=turned)) == packed(chunk)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"key": "0" * 32}, "key"),
        ({"ids": np.arange(40, dtype=np.int32)}, "key"),
        ({"kv": torch.zeros(2, 2, 39, 1, 4)}, "shape"),
        ({"kv": torch.zeros(2, 3, 40, 1, 4)}, "shape"),
        ({"kv": torch.zeros(2, 2, 40, 4)}, "shape"),
        ({"kv": torch.zeros(0, 2, 40, 1, 4)}, "shape"),
        ({"kv": torch.zeros(2, 2, 40, 1, 4, dtype=torch.float64)}, "float64"),
    ],
)
def test_a_wrong_chunk_is_refused(fault, message):
    with pytest.raises(ValueError, match=message):
        pack(dataclasses.replace(make_chunk(3), **fault))


def test_every_flipped_bit_is_found():
    data = bytearray(packed(make_chunk(4, tokens=3, layers=1)))
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(DamagedChunkError):
                read_chunk(io.BytesIO(data))
            data[place] ^= 1 << bit
    assert same(read_chunk(io.BytesIO(data)), make_chunk(4, tokens=3, layers=1))


def test_every_truncation_is_found():
    data = packed(make_chunk(5, tokens=3, layers=1))
    for read in (read_chunk, read_ids):
        for length in range(len(data)):
            with pytest.raises(DamagedChunkError):
                read(io.BytesIO(data[:length]))
        with pytest.raises(DamagedChunkError):
            read(io.BytesIO(data + b"\0"))


@given(st.binary(max_size=300))
def test_noise_is_no_chunk(noise: bytes):
    for data in (noise, len(noise).to_bytes(8, "little") + noise):
        with pytest.raises(DamagedChunkError):
            read_chunk(io.BytesIO(data))


FIELDS = [
    ("__metadata__",),
    ("__metadata__", "format"),
    ("__metadata__", "key"),
    ("__metadata__", "scope"),
    ("__metadata__", "start"),
    ("__metadata__", "checksum"),
    ("__metadata__", "more"),
    ("kv",),
    ("kv", "dtype"),
    ("kv", "shape"),
    ("kv", "shape", 0),
    ("kv", "shape", 2),
    ("kv", "data_offsets", 1),
    ("ids", "dtype"),
    ("ids", "shape"),
    ("more",),
]
VALUES = [
    None, True, -1, 0, 1.0, 1e300, 1 << 70, "", "x", "1", "F64", "[]", "{}", "9" * 5000, "\ud800", [], [1],
    [2, 2, 40, 1, 0], [-2, -2, 40, 1, 4], [2, 2, "40", 1, 4], {}, {"dtype": "F32"},
    SCOPE.to_json().replace("default", "\\ud800"), SCOPE.to_json().replace("[1,", "[123456789012,"),
    SCOPE.to_json().replace('"w1"', "7"),
]  # fmt: skip


@pytest.mark.parametrize("read", [read_chunk, read_ids])
def test_a_strange_header_is_no_chunk(read):
    data = packed(make_chunk(9))
    length = int.from_bytes(data[:8], "little")
    for field, value in itertools.product(FIELDS, VALUES):
        header = json.loads(data[8 : 8 + length])
        inner = header
        for name in field[:-1]:
            inner = inner[name]
        inner[field[-1]] = value
        text = json.dumps(header).encode()
        file = io.BytesIO(len(text).to_bytes(8, "little") + text + data[8 + length :])
        if read is read_ids and (field[-1] == "checksum" or (field[-1], value) == ("start", "1")):
            read(file)  # these two are for the checksum to find, which is over the KV as well
        else:
            with pytest.raises(DamagedChunkError):
                read(file)


def test_another_safetensors_file_is_no_chunk():
    chunk = make_chunk(6)
    with pytest.raises(DamagedChunkError):
        read_chunk(io.BytesIO(save({"kv": chunk.kv, "ids": torch.from_numpy(chunk.ids)})))


@pytest.mark.parametrize("field", ["key", "scope", "start", "checksum", "format"])
def test_metadata_of_another_chunk_is_found(field: str):
    """The checksum covers the header too: a changed ``start`` would shift keys to the wrong place."""
    data = packed(make_chunk(7))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    other = dataclasses.replace(SCOPE, namespace="other")
    header["__metadata__"][field] = {
        "key": make_chunk(8).key,
        "scope": other.to_json(),
        "start": "4",
        "checksum": "0" * 32,
        "format": "cacheblend-chunk-2",
    }[field]
    text = json.dumps(header).encode()
    with pytest.raises(DamagedChunkError):
        read_chunk(io.BytesIO(len(text).to_bytes(8, "little") + text + data[8 + length :]))
