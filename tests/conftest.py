"""Models the tests run on: SmolLM2-135M-Instruct (real weights) and small random models of every architecture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cacheblend_rag.decision import BlendCosts

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside this file are imported by name

settings.register_profile("default", deadline=None)
settings.load_profile("default")

# Every kind of RoPE, biases, query norms, fused projections and head grouping that must be handled.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama3-scaled": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "phi3": {
        "model_type": "phi3",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}


def policies_to_test(num_layers: int) -> list[str]:
    """Policies that a model of so many layers is tested with: SmolLM2 takes seconds a prompt, the random ones don't."""
    return ["hkvd", "query_aware", *(["hkvd_kv", "hybrid"] if num_layers < 10 else [])]


@pytest.fixture(scope="session", autouse=True)
def no_measured_costs() -> Iterator[None]:
    """What a test blends must not depend on how quick the machine is that it runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacheblend_rag.engines.transformers.measure_costs", lambda *_: BlendCosts())
        yield


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Directory of SmolLM2-135M-Instruct."""
    directory = os.environ.get("CACHEBLEND_TEST_MODEL")
    if not directory:
        pytest.skip("CACHEBLEND_TEST_MODEL names no directory of SmolLM2-135M-Instruct: run `make test`")
    return directory


@pytest.fixture(scope="session")
def small_smollm2(smollm2: str) -> str:
    """Directory of a model with SmolLM2's tokenizer and chat template, and few random weights in float32.

    For what does not depend on answers that make sense: it takes a hundredth of the time.
    """
    return str(_beside(smollm2, "smollm2-small"))


@pytest.fixture(scope="session")
def example_models(smollm2: str, small_smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples fetch, with a smaller model in the place of SmolLM2."""
    models = tmp_path_factory.mktemp("models")
    (models / "smollm2-135m-instruct").symlink_to(small_smollm2)
    (models / "all-minilm-l6-v2").symlink_to(_beside(smollm2, "all-minilm-l6-v2"))
    return models


@pytest.fixture(scope="session")
def fetched_models(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples fetch, but for the dtype: many a CPU is slow at bfloat16."""
    models = tmp_path_factory.mktemp("models")
    (models / "all-minilm-l6-v2").symlink_to(_beside(smollm2, "all-minilm-l6-v2"))
    model = models / "smollm2-135m-instruct"
    model.mkdir()
    for file in Path(smollm2).resolve().iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return models


def _beside(model: str, name: str) -> Path:
    directory = Path(model).resolve().parent / name
    if not directory.is_dir():
        pytest.skip(f"no {name} beside CACHEBLEND_TEST_MODEL: run `make test`")
    return directory


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-sequence token."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="session")
def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece makes them: the first word of a text has no space before it, bytes that are no character may
    change what is before them. Tokens 0 to 2 are special, 3 to 13 are bytes, 14 to 16 are words."""
    special = ["<unk>", "<s>", "<eos>"]
    pieces = [f"<0x{byte:02X}>" for byte in "\né€😀A".encode()] + ["▁Paris", "▁is", "▁a"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?"]
    vocabulary = {token: number for number, token in enumerate([*special, *pieces, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<eos>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """Builds a small random model of any architecture; the same arguments give the same weights."""

    def build(name: str, **changes: Any) -> str:
        directory = tmp_path_factory.mktemp(name)
        settings: dict[str, Any] = {
            "vocab_size": 257,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": 256,
            "pad_token_id": None,
            # Attention that is far from uniform: wrong KV must show.
            "initializer_range": 0.2,
        }
        settings |= ARCHITECTURES.get(name, {}) | changes
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        model.save_pretrained(directory)
        byte_tokenizer.save_pretrained(directory)
        return str(directory)

    return build


@pytest.fixture(scope="session")
def sentence_model(make_model: Callable[..., str], sentence_tokenizer: PreTrainedTokenizerFast) -> str:
    """Directory of a random model that may say any token of this tokenizer."""
    sizes = {"hidden_size": 128, "vocab_size": len(sentence_tokenizer)}  # heads of a size that vLLM takes on CPU
    directory = make_model("llama", model_type="llama", eos_token_id=sentence_tokenizer.eos_token_id, **sizes)
    sentence_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def random_models(make_model: Callable[..., str]) -> dict[str, str]:
    """Directories of the random models, by name."""
    return {name: make_model(name) for name in ARCHITECTURES}


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """Where a test keeps chunks."""
    return tmp_path / "store"
