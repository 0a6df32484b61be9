"""Constrained decoding: what an answer must look like, in one form for every engine.

That form is xgrammar's structural tag, which vLLM takes as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cacheblend_rag.errors import ConfigError

KINDS = ("json", "regex", "choice", "grammar", "structural_tag")
_MAX_WHITESPACE = 2  # in a row between JSON tokens: small models would go on with it for ever


def structural_tag(structured_outputs: Mapping[str, Any]) -> str:
    """A structural tag, as JSON text.

    Args:
        structured_outputs: One entry, named as in vLLM's ``StructuredOutputsParams``: ``json`` (a JSON schema as dict,
            bool or text), ``regex``, ``choice`` (a list of strings), ``grammar`` (EBNF) or ``structural_tag``.

    Raises:
        ConfigError: no such kind of constraint, or not exactly one.
    """
    kinds = list(structured_outputs) if isinstance(structured_outputs, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ConfigError(
            f"structured_outputs must be a dict with one entry of {', '.join(KINDS)}, not {structured_outputs!r}"
        )
    kind, value = kinds[0], structured_outputs[kinds[0]]
    if kind == "structural_tag":
        return _as_text(kind, _parsed(kind, value))
    if kind == "json":
        content = json_content(_parsed(kind, value))
    elif kind == "choice":
        if (
            not isinstance(value, list | tuple)
            or not value
            or not all(isinstance(text, str) and text for text in value)
        ):
            raise ConfigError(f"structured_outputs: choice must be a list of non-empty strings, not {value!r}")
        content = {"type": "or", "elements": [const(text) for text in value]}
    elif not isinstance(value, str) or not value:
        raise ConfigError(f"structured_outputs: {kind} must be non-empty text, not {value!r}")
    else:
        content = {"type": kind, ("pattern" if kind == "regex" else "grammar"): value}
    return _as_text(kind, tag_of(content))


def either(*structural_tags: str) -> str:
    """The structural tag of answers that fit one of some structural tags."""
    return json.dumps(tag_of({"type": "or", "elements": [json.loads(tag)["format"] for tag in structural_tags]}))


def tag_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The structural tag of an answer with some content."""
    return {"type": "structural_tag", "format": content}


def json_content(schema: Any) -> dict[str, Any]:
    """Content that is JSON of a schema (a dict, or True for any JSON)."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _MAX_WHITESPACE}


def const(text: str) -> dict[str, Any]:
    """Content that is one text."""
    return {"type": "const_string", "value": text}


def _parsed(kind: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"structured_outputs: {kind} is no JSON: {error}") from error
    if not isinstance(value, Mapping) and not (kind == "json" and value is True):
        raise ConfigError(f"structured_outputs: {kind} must be a dict, not {value!r}")
    return value


def _as_text(kind: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"structured_outputs: {kind} can't be written as JSON: {error}") from error
