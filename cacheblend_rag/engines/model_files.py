"""What can be known of a model without loading its weights: where it is, its config, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from cacheblend_rag.chunks import TokenIds
from cacheblend_rag.errors import ConfigError


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The directory of a model, downloaded if it is a hub id, of a revision unless that is None.

    Raises:
        ConfigError: there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")):
        raise ConfigError(f"model directory {name!r} does not exist: give a directory with config.json, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise ConfigError(f"model {name!r} is no directory and no hub model in reach: {first_line(error)}") from error


def load_config(name: str, directory: Path) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        ConfigError: the directory holds no transformers model.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
        return config
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is not a transformers model: {first_line(error)}") from error


def load_tokenizer(name: str, directory: Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Args:
        name: What the user called the model.
        directory: Where it is.
        chat_template: In place of the tokenizer's own: the Jinja template, or a file that holds it.

    Raises:
        ConfigError: the directory holds no fast tokenizer, or the template can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError("it has no fast tokenizer (tokenizer.json)")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is not a transformers model: {first_line(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _read_template(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template {chat_template!r} is no Jinja template and no file: {error}") from error


def tokenize_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenIds:
    """As without this package: with special tokens, but no second BOS before that of a rendered chat template."""
    bos = tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return np.asarray(tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)


def tokenize_chunk(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenIds:
    """The tokens of a chunk: those of its text and no others."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    options: Mapping[str, Any],
) -> str:
    """See :meth:`Engine.render_chat`, of a model with some name; ``options`` are its further ones."""
    if not tokenizer.chat_template:
        raise ConfigError(f"model {name!r} has no chat template: give chat_template, or write the prompt as plain text")
    try:
        return str(
            tokenizer.apply_chat_template(
                [_for_template(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the chat template of {name!r} refuses these messages: {first_line(error)}") from error


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates take the arguments of tool calls as dicts, where OpenAI has JSON text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
