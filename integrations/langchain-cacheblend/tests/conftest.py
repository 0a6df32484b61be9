from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import faiss
import pytest
import torch
from cacheblend_rag import BlendConfig, load_engine
from cacheblend_rag.engines.base import Engine
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from langchain_cacheblend import CacheBlendLLM

WORDS = (  # noqa: SIM905
    "harbour lamp winter ledger copper orchard signal bridge velvet granite ferry compass thunder barley canvas "
    "meadow piston lantern cedar ribbon quarry saddle turbine violet anchor glacier pepper chimney falcon marble "
    "carried opened counted painted followed borrowed measured repaired crossed remembered under behind along the a"
).split()


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
    torch.set_num_threads(1)  # for so small a model more threads cost more than they bring
    blend = {"mode": "blend", "min_reused_tokens": 0}
    store = tmp_path_factory.mktemp("chunks")
    llm = CacheBlendLLM(model=model_path, store=store, dtype="float32", blend=blend, max_tokens=4)
    yield llm
    llm.engine.close()


@pytest.fixture(scope="session")
def engine(llm_from_settings: CacheBlendLLM) -> Engine:
    return llm_from_settings.engine


@pytest.fixture(scope="session")
def chat_engine(model_path: str) -> Iterator[Engine]:
    """An engine whose chat template has tools."""
    with _chat_engine(model_path) as engine:
        yield engine


@pytest.fixture(scope="session")
def real_chat_engine(real_model_path: str) -> Iterator[Engine]:
    """The same, where answers have to make sense or to take a while."""
    with _chat_engine(real_model_path) as engine:
        yield engine


def _chat_engine(model: str) -> Engine:
    torch.set_num_threads(1)
    blend = BlendConfig(mode="blend", min_reused_tokens=0)
    return load_engine(model, dtype="float32", blend=blend, chat_template=str(Path(__file__).parent / "hermes.jinja"))


@pytest.fixture
def passages(request: pytest.FixtureRequest) -> Callable[[int], list[str]]:
    """Makes passages that no other test uses: the chunk store is shared by all tests."""
    rng = random.Random(request.node.nodeid)

    def make(count: int) -> list[str]:
        return [f"Note {rng.randrange(10**9)}: {' '.join(rng.choices(WORDS, k=30))}." for _ in range(count)]

    return make


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file of this process can grow beyond 64 KiB; the KV of a passage takes more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def while_disk_is_full() -> Callable[[], AbstractContextManager[None]]:
    """A context in which nothing can be stored."""
    return _full_disk


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Nothing can be stored during the test."""
    with _full_disk():
        yield


def _faiss(embedding: Embeddings) -> VectorStore:
    size = len(embedding.embed_query("size"))
    return FAISS(embedding, faiss.IndexFlatL2(size), InMemoryDocstore(), {})


def _qdrant(embedding: Embeddings) -> VectorStore:
    client = QdrantClient(":memory:")
    size = len(embedding.embed_query("size"))
    client.create_collection("notes", vectors_config=VectorParams(size=size, distance=Distance.COSINE))
    return QdrantVectorStore(client, "notes", embedding)


_INDEXES = {"memory": InMemoryVectorStore, "faiss": _faiss, "qdrant": _qdrant}


@pytest.fixture(params=list(_INDEXES))
def make_index(request: pytest.FixtureRequest) -> Callable[[Embeddings], VectorStore]:
    """Makes an empty vector store that knows nothing of CacheBlend; Qdrant's ids are UUIDs."""
    return _INDEXES[request.param]


@pytest.fixture
def was_warm(engine: Engine) -> Callable[[list[str]], list[bool]]:
    """Tells which texts are warm, and evicts them."""
    return lambda texts: [engine.evict([text]) == 1 for text in texts]


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
