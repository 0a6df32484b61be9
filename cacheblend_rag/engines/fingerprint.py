"""Names a model by content, so that KV is never read by a model that did not write it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import xxhash
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from cacheblend_rag.chunks import ModelFingerprint

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
# They name where the config came from or what wrote it, not what it says.
_IRRELEVANT = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype")


def fingerprint_model(
    name: str,
    directory: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    *,
    overrides: str = "",
) -> ModelFingerprint:
    """The fingerprint of a model in a directory.

    Args:
        name: What the user called it.
        directory: Holds its weight files, which are read in full: a second for a few gigabytes.
        config: Its config, RoPE parameters included.
        tokenizer: Its tokenizer.
        dtype: Dtype of the computation, such as ``"bfloat16"``.
        overrides: What the engine changes of the model besides, such as quantising it on loading; empty for nothing.
    """
    fields = {field: value for field, value in config.to_dict().items() if field not in _IRRELEVANT}
    return ModelFingerprint(
        name=name,
        weights=_digest_weights(directory),
        config=_digest(json.dumps(fields, sort_keys=True, default=str) + overrides),
        tokenizer=_digest(tokenizer.backend_tokenizer.to_str()),
        dtype=dtype,
    )


def _digest_weights(directory: Path) -> str:
    hasher = xxhash.xxh3_128()
    for file in sorted(file for pattern in _WEIGHT_FILES for file in directory.glob(pattern)):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                hasher.update(block)
    return hasher.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
