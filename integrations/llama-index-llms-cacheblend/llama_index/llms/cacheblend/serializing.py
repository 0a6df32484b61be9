"""Settings as plain data that may be logged and stored: no secrets, nothing that JSON doesn't have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cacheblend_rag import BlendConfig
from cacheblend_rag.redaction import is_secret, without_credentials


def plain_blend(blend: BlendConfig) -> dict[str, Any]:
    """The settings of a blend."""
    return blend.to_dict()


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``load_engine``, as far as they are plain and no secrets.

    Keys, tokens, headers and passwords are left out, those within URLs too, and so are values that can't be written
    down, such as an open store.
    """
    known = {name: _plain(value) for name, value in settings.items() if name != "blend" and not is_secret(name)}
    return {name: value for name, value in known.items() if value is not None}


def _plain(value: object) -> Any:
    """The value, or None where it isn't plain."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return without_credentials(value) if "://" in value else value
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return plain_settings({str(name): item for name, item in value.items()})
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None
