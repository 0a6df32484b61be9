"""What can be known of a model without loading its weights: where it is, its config, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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


def load_tokenizer(name: str, directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Raises:
        ConfigError: the directory holds no fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError("it has no fast tokenizer (tokenizer.json)")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is not a transformers model: {first_line(error)}") from error
    return tokenizer


def tokenize_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenIds:
    """As without this package: with special tokens, but no second BOS before that of a rendered chat template."""
    bos = tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return np.asarray(tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)


def tokenize_chunk(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenIds:
    """The tokens of a chunk: those of its text and no others."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def render_chat(tokenizer: PreTrainedTokenizerFast, name: str, messages: Sequence[Mapping[str, str]]) -> str:
    """See :meth:`Engine.render_chat`, of a model with some name."""
    if not tokenizer.chat_template:
        raise ConfigError(f"model {name!r} has no chat template: write the prompt as plain text")
    conversation = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
