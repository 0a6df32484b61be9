from __future__ import annotations

import asyncio
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import torch
from cacheblend_rag.engines.base import Engine

from langchain_cacheblend import CacheBlendLLM

WORDS = (  # noqa: SIM905
    "harbour lamp winter ledger copper orchard signal bridge velvet granite ferry compass thunder barley canvas "
    "meadow piston lantern cedar ribbon quarry saddle turbine violet anchor glacier pepper chimney falcon marble "
    "carried opened counted painted followed borrowed measured repaired crossed remembered under behind along the a"
).split()


@pytest.fixture(scope="session")
def model_path() -> str:
    path = os.environ.get("CACHEBLEND_TEST_MODEL")
    if not path:
        pytest.skip("set CACHEBLEND_TEST_MODEL to the directory or hub id of a small chat model")
    return path


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


@pytest.fixture
def passages(request: pytest.FixtureRequest) -> Callable[[int], list[str]]:
    """Makes passages that no other test uses: the chunk store is shared by all tests."""
    rng = random.Random(request.node.nodeid)

    def make(count: int) -> list[str]:
        return [f"Note {rng.randrange(10**9)}: {' '.join(rng.choices(WORDS, k=30))}." for _ in range(count)]

    return make


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond a megabyte; the KV of a passage takes more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
        assert took > 0.1, "too quick to tell"
        assert max(pauses) < took / 2

    return check
