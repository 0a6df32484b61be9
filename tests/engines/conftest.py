"""Engines for tests in float32, with every KV buffer poisoned, and prompts whose matches are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_model import LoadedModel
from cacheblend_rag.store import MemoryStore

from ..conftest import ARCHITECTURES, policies_to_test

BLEND = BlendConfig(mode="blend")


@pytest.fixture(autouse=True, scope="session")
def _poisoned_buffers() -> Iterator[None]:
    """A position that is read before it is written turns the answer into NaN."""
    plain = LoadedModel.empty_kv

    def poisoned(self: LoadedModel, tokens: int) -> torch.Tensor:
        return plain(self, tokens).fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "empty_kv", poisoned)
        yield


def open_engine(model: str, **changes: Any) -> TransformersEngine:
    """An engine in float32 on the CPU with an empty memory store."""
    settings: dict[str, Any] = {
        "store": MemoryStore(1 << 30),
        "blend": BLEND,
        "dtype": "float32",
        "device": "cpu",
        "primer": None,
        "namespace": "test",
        "codec": "raw",
        "chat_template": None,
        "engine_args": {},
    }
    return TransformersEngine(model, **(settings | changes))


@dataclasses.dataclass
class Case:
    """An engine, the same model untouched, and the texts that are warm."""

    engine: TransformersEngine
    reference: PreTrainedModel
    chunks: list[str]
    real: bool = False  # weights; they take a hundred times as long, so that tests ask less of them

    @property
    def passages(self) -> int:
        """How many are in a prompt."""
        return 2 if self.real else 4

    def prompt(self, seed: int) -> str:
        """Some of the chunks in random order, the second without its head, with something around each of them."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.chunks))[: self.passages]
        passages = [self.chunks[n][25 if i == 1 else 0 :] for i, n in enumerate(order)]
        parts = [f"Passage {i}: {text}\n\n" for i, text in enumerate(passages)]
        return (
            "Read these passages, then answer.\n"
            + "".join(parts)
            + f"Question {seed}: what comes next, and why?\nAnswer:"
        )

    @property
    def policies(self) -> list[str]:
        """Policies that are tested on this model."""
        return policies_to_test(self.engine.num_layers)

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt."""
        return [int(n) for n in self.engine._prompt_ids(prompt)]

    def plain_logits(self, ids: list[int]) -> torch.Tensor:
        """Logits after the last token by the model without us: float32 ``[vocabulary]``."""
        with torch.inference_mode():
            return self.reference(torch.tensor([ids], device=self.reference.device)).logits[0, -1]

    def logits(self, ids: list[int], **blend: Any) -> torch.Tensor:
        """Logits after the last token as the engine reads the prompt."""
        config = BLEND.with_overrides(blend)
        read = self.engine._reader.read_prompt(np.asarray(ids, np.int32), len(ids) + 1, config)
        assert read.stats.reason != "blending failed, see the log"
        return read.logits


def random_text(seed: int, length: int) -> str:
    """Random words of random letters."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz      ,."), size=length)
    return "".join(letters)


@pytest.fixture(scope="session", params=["smollm2", *ARCHITECTURES])
def case(request: pytest.FixtureRequest, random_models: dict[str, str]) -> Iterator[Case]:
    """Every model in turn, six chunks warm."""
    directory = random_models.get(request.param) or request.getfixturevalue("smollm2")
    engine = open_engine(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    chunks = [random_text(seed, 130 + 10 * seed) for seed in range(6)]
    case = Case(engine, reference, chunks, real=request.param == "smollm2")
    engine.warm(case.chunks)
    yield case
    engine.close()


@pytest.fixture(scope="session")
def smol(smollm2: str) -> Iterator[TransformersEngine]:
    """SmolLM2 in float32, nothing warm to begin with."""
    with open_engine(smollm2) as engine:
        yield engine
