"""What was measured of a model, beside the chunks of a store: a small JSON file that every engine finds by itself.

A profile belongs to the model's weights: dtype, codec, primer and namespace don't matter. It only says which choice
works well, so one that can't be used is ignored, with a warning: answers are then those without a profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import ChunkStore, DiskStore, TieredStore
from cacheblend_rag.validation import is_layer_range

FORMAT = 1
"""Version of the file's form. Files of others are ignored."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelProfile:
    """What is known of one model.

    Attributes:
        model: What the user called it; to be read by people.
        weights: Digest of its weights, see :class:`~cacheblend_rag.chunks.ModelFingerprint`.
        num_layers: Its decoder layers.
        question_layers: First layer and end of those where the question's attention counts.
        measured: How that was found; plain values, to be read by people.
    """

    model: str
    weights: str
    num_layers: int
    question_layers: tuple[int, int]
    measured: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "question_layers": list(self.question_layers),
        }


def profile_path(store: ChunkStore, weights: str) -> Path | None:
    """Where the profile of a model is kept: in the store's directory; None if it has none.

    Args:
        store: Chunks of this model and of others.
        weights: Digest of the model's weights.
    """
    disk = store.disk if isinstance(store, TieredStore) else store
    return disk.directory / "profiles" / f"{weights}.json" if isinstance(disk, DiskStore) else None


def read_question_layers(store: ChunkStore, weights: str, num_layers: int) -> tuple[int, int] | None:
    """What the profile of a model says of ``BlendConfig.question_layers``; None where there is none to go by.

    Args:
        store: Where to look.
        weights: Digest of the model's weights.
        num_layers: Its decoder layers.
    """
    path = profile_path(store, weights)
    if path is None:
        return None
    try:
        return _parse(path.read_bytes(), weights, num_layers)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _log.warning("the profile %s is ignored: %s", path, " ".join(str(reason).split()))
        return None


def write_profile(store: ChunkStore, profile: ModelProfile) -> Path:
    """Keep a profile in place of an earlier one, for the owner's eyes only; returns where.

    Raises:
        StoreError: the store is in memory only, or can't be written; an earlier profile stays.
    """
    path = profile_path(store, profile.weights)
    if path is None:
        raise StoreError("a profile needs a store with a directory, not one in memory")
    text = json.dumps(profile.to_dict(), indent=2) + "\n"
    temp = path.parents[1] / "tmp" / uuid.uuid4().hex  # where the store clears away what a crash leaves
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(temp, "x", encoding="utf-8", opener=_private) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        finally:
            with contextlib.suppress(OSError):
                temp.unlink()
    except OSError as error:
        raise StoreError(f"the profile {path} can't be written ({error.strerror or error})") from error
    return path


def _parse(data: bytes, weights: str, num_layers: int) -> tuple[int, int]:
    """The layers that a profile names.

    Raises:
        ValueError: it is damaged, of another form, or of another model.
    """
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("it holds no JSON object")
    if fields.get("format") != FORMAT:
        raise ValueError(f"it has format {fields.get('format')!r}, and this version reads {FORMAT}")
    if fields.get("weights") != weights or fields.get("num_layers") != num_layers:
        raise ValueError("it is of another model")
    layers = fields.get("question_layers")
    if not is_layer_range(layers) or layers[1] > num_layers:
        raise ValueError(f"question_layers {layers!r} are no layers of the model")
    return layers[0], layers[1]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
