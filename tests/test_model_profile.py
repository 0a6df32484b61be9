"""Profiles in a store's directory: found where they belong, ignored where they can't be used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cacheblend_rag.cli import app
from cacheblend_rag.errors import StoreError
from cacheblend_rag.model_profile import ModelProfile, profile_path, read_question_layers, write_profile
from cacheblend_rag.store import ChunkStore, MemoryStore, open_store

WEIGHTS = "0123456789abcdef0123456789abcdef"
PROFILE = ModelProfile("some/model", WEIGHTS, 12, (4, 9), {"questions": 16})


@pytest.fixture
def store(store_dir: Path) -> Iterator[ChunkStore]:
    with contextlib.closing(open_store(store_dir)) as opened:
        yield opened


@pytest.fixture
def written(store: ChunkStore) -> Path:
    """The file of a profile."""
    return write_profile(store, PROFILE)


def read(store: ChunkStore) -> tuple[int, int] | None:
    return read_question_layers(store, WEIGHTS, 12)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_what_is_written_is_read(store_dir: Path, memory_bytes: int) -> None:
    for layers in ((4, 9), (0, 12)):  # the second time over the first
        with contextlib.closing(open_store(store_dir, memory_bytes=memory_bytes)) as store:
            path = write_profile(store, dataclasses.replace(PROFILE, question_layers=layers))
            assert path == profile_path(store, WEIGHTS) == store_dir / "profiles" / f"{WEIGHTS}.json"
            assert read(store) == layers
            assert read_question_layers(store, "f" * 32, 12) is None  # another model has none
    assert json.loads(path.read_text())["measured"] == {"questions": 16}


def test_it_is_for_its_owner_only(written: Path) -> None:
    assert written.stat().st_mode & 0o777 == 0o600
    assert written.parent.stat().st_mode & 0o777 == 0o700


def test_a_store_in_memory_has_none(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(1 << 20)
    assert read(store) is None
    assert caplog.text == ""
    with pytest.raises(StoreError, match="in memory"):
        write_profile(store, PROFILE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2"),
        ({"format": None}, "format None"),
        ({"weights": "f" * 32}, "another model"),
        ({"num_layers": 24}, "another model"),
        *(
            ({"question_layers": layers}, "no layers of the model")
            for layers in (None, [], [3], [4, 4], [9, 4], [-1, 3], [4, 13], [4.0, 9], ["4", "9"], {"4": 9}, "49", True)
        ),
    ],
    ids=str,
)
def test_foreign_and_newer_ones_are_ignored(
    store: ChunkStore, written: Path, change: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    written.write_text(json.dumps({**PROFILE.to_dict(), **change}))
    assert read(store) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage() and str(written) in record.getMessage() and "\n" not in record.getMessage()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=300), st.integers(0, 400).map(lambda end: json.dumps(PROFILE.to_dict()).encode()[:end])
    )
)
def test_damage_is_never_an_error(store: ChunkStore, written: Path, data: bytes) -> None:
    written.write_bytes(data)
    assert read(store) in (None, (4, 9))


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b'{"format": NaN}'], ids=str)
def test_damage_is_told_in_one_line(
    store: ChunkStore, written: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    written.write_bytes(data)
    assert read(store) is None
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()


def test_one_that_cannot_be_read_is_ignored(store: ChunkStore, written: Path, caplog: pytest.LogCaptureFixture) -> None:
    written.unlink()
    assert read(store) is None
    assert caplog.text == ""
    written.mkdir()
    assert read(store) is None
    written.rmdir()
    written.parent.rmdir()
    written.parent.touch()
    assert read(store) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_write_that_fails_leaves_the_earlier_one(
    store: ChunkStore, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match="No space left") as error:
            write_profile(store, dataclasses.replace(PROFILE, question_layers=(0, 1)))
    assert "\n" not in str(error.value)
    assert read(store) == (4, 9)
    assert not list((written.parents[1] / "tmp").iterdir())


def test_the_store_is_as_before(store_dir: Path) -> None:
    """Listing, verifying, emptying and rebuilding a store know nothing of profiles."""
    with contextlib.closing(open_store(store_dir)) as store:
        path = write_profile(store, PROFILE)
    for manifest in store_dir.glob("manifest-*"):
        manifest.unlink()
    for command in (["ls"], ["verify"], ["verify", "--repair"], ["rm", "--all", "--yes"]):
        result = CliRunner().invoke(app, ["store", *command, "--store", str(store_dir)])
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("0 chunks")
    assert json.loads(path.read_text())["question_layers"] == [4, 9]
    moved = store_dir.with_name("moved")
    shutil.move(store_dir, moved)
    with contextlib.closing(open_store(moved)) as store:
        assert read(store) == (4, 9)
