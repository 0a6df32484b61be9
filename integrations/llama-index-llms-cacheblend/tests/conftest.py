from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import faiss
import pytest
import torch
from cacheblend_rag.engines.base import Engine
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.schema import TextNode
from llama_index.vector_stores.faiss import FaissVectorStore

from llama_index.llms.cacheblend import CacheBlendLLM

WORDS = (  # noqa: SIM905
    "harbour lamp winter ledger copper orchard signal bridge velvet granite ferry compass thunder barley canvas "
    "meadow piston lantern cedar ribbon quarry saddle turbine violet anchor glacier pepper chimney falcon marble "
    "carried opened counted painted followed borrowed measured repaired crossed remembered under behind along the a"
).split()

# The model's own template, and tools in the format of Hermes.
TEMPLATE = """
{%- if tools -%}
<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


class WordEmbedding(BaseEmbedding):
    """A bag of hashed words: texts that share words are near to each other."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.0] * 64
        for word in text.lower().split():
            vector[hashlib.md5(word.encode()).digest()[0] % 64] += 1.0
        return vector

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@pytest.fixture(scope="session")
def real_model_path() -> str:
    """A model whose answers make sense."""
    path = os.environ.get("CACHEBLEND_TEST_MODEL")
    if not path:
        pytest.skip("set CACHEBLEND_TEST_MODEL to the directory or hub id of a small chat model")
    return path


@pytest.fixture(scope="session")
def model_path(real_model_path: str) -> str:
    """One with few random weights, if there is one beside it: it takes a hundredth of the time."""
    small = Path(real_model_path).parent / "smollm2-small"
    return str(small) if small.is_dir() else real_model_path


@pytest.fixture(scope="session")
def llm_from_settings(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheBlendLLM]:
    llm = _llm_from_settings(model_path, tmp_path_factory.mktemp("chunks"))
    yield llm
    llm.engine.close()


def _llm_from_settings(model: str, store: Path) -> CacheBlendLLM:
    torch.set_num_threads(1)  # for so small a model more threads cost more than they bring
    return CacheBlendLLM(
        model=model,
        store=store,
        dtype="float32",
        blend={"mode": "blend", "min_reused_tokens": 0},
        chat_template=TEMPLATE,
        max_tokens=4,
    )


@pytest.fixture(scope="session")
def engine(llm_from_settings: CacheBlendLLM) -> Engine:
    return llm_from_settings.engine


@pytest.fixture(scope="session")
def real_engine(real_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same, where answers have to make sense or to take a while."""
    llm = _llm_from_settings(real_model_path, tmp_path_factory.mktemp("chunks"))
    yield llm.engine
    llm.engine.close()


@pytest.fixture
def llm(engine: Engine) -> CacheBlendLLM:
    return CacheBlendLLM(engine=engine, max_tokens=4)


@pytest.fixture
def embedding() -> WordEmbedding:
    return WordEmbedding()


@pytest.fixture
def passages(request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """Makes passages that no other test uses: the chunk store is shared by all tests."""
    rng = random.Random(request.node.nodeid)

    def make(count: int, words: int = 30) -> list[str]:
        return [f"Note {rng.randrange(10**9)}: {' '.join(rng.choices(WORDS, k=words))}." for _ in range(count)]

    return make


@pytest.fixture
def faiss_index(embedding: WordEmbedding) -> Callable[..., VectorStoreIndex]:
    """Makes an index over FAISS."""

    def make(nodes: list[TextNode], **kwargs: Any) -> VectorStoreIndex:
        context = StorageContext.from_defaults(vector_store=FaissVectorStore(faiss.IndexFlatL2(64)))
        return VectorStoreIndex(nodes, storage_context=context, embed_model=embedding, **kwargs)

    return make


class Recorder(BaseEventHandler):
    """Keeps the events of LlamaIndex's instrumentation."""

    events: list[BaseEvent] = []  # noqa: RUF012  # a field of a pydantic model

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)

    def of(self, kind: type[BaseEvent]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def reused(self) -> list[int]:
        """Tokens that each chat reused."""
        responses = [event.response for event in self.of(LLMChatEndEvent)]
        return [response.additional_kwargs["stats"]["reused_tokens"] for response in responses]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    dispatcher = get_dispatcher()
    handler = Recorder(events=[])
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """While it lasts, no file of this process can grow beyond 64 KiB; the KV of a passage takes more."""

    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def assert_loop_runs() -> Callable[[Awaitable[object]], Awaitable[None]]:
    """Awaits some work and fails if the event loop stood still for most of it."""

    async def check(work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        started = last = time.perf_counter()
        pauses = []
        while not task.done():
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now
        await task
        took = last - started
        assert took > 0.05, "too quick to tell"
        assert max(pauses) < took / 2

    return check


@pytest.fixture(scope="session")
def tool_model() -> str:
    path = os.environ.get("CACHEBLEND_TEST_TOOL_MODEL")
    if not path:
        pytest.skip("set CACHEBLEND_TEST_TOOL_MODEL to the directory or hub id of a model that calls tools well")
    return path
