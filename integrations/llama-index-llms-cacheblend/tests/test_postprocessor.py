from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from llama_index.core.schema import NodeWithScore, TextNode

from llama_index.llms.cacheblend import CacheBlendPostprocessor

Passages = Callable[..., list[str]]
AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]
FullDisk = Callable[[], AbstractContextManager[None]]
both = pytest.mark.parametrize("use_async", [False, True])


def _nodes(texts: list[str]) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]


async def _process(processor: CacheBlendPostprocessor, nodes: list[NodeWithScore], use_async: bool) -> Any:
    if use_async:
        return await processor.apostprocess_nodes(nodes, query_str="query")
    return processor.postprocess_nodes(nodes, query_str="query")


@both
async def test_cold_nodes_are_warmed(engine: Engine, passages: Passages, use_async: bool) -> None:
    texts = passages(2)
    nodes = _nodes(texts)
    assert await _process(CacheBlendPostprocessor(engine=engine), nodes, use_async) == nodes
    assert engine.is_warm(texts) == [True, True]


async def test_with_the_metadata_that_the_model_is_shown(engine: Engine, passages: Passages) -> None:
    (text,) = passages(1)
    node = TextNode(text=text, metadata={"title": "Mill", "page": 1}, excluded_llm_metadata_keys=["page"])
    CacheBlendPostprocessor(engine=engine).postprocess_nodes([NodeWithScore(node=node)])
    assert engine.is_warm([text, f"title: Mill\n\n{text}"]) == [False, True]


@both
async def test_misses_can_be_ignored(engine: Engine, passages: Passages, use_async: bool) -> None:
    texts = passages(2)
    processor = CacheBlendPostprocessor(engine=engine, on_miss="ignore")
    assert len(await _process(processor, _nodes(texts), use_async)) == 2
    assert engine.is_warm(texts) == [False, False]


@both
async def test_the_best_can_come_last(engine: Engine, passages: Passages, use_async: bool) -> None:
    nodes = _nodes(passages(3))
    processor = CacheBlendPostprocessor(engine=engine, best_last=True)
    assert await _process(processor, nodes, use_async) == nodes[::-1]


def test_warm_nodes_are_prefetched(engine: Engine, passages: Passages) -> None:
    """What is on disk only is brought to memory before the prompt is read."""
    texts = passages(3)
    engine.warm(texts)
    memory = engine.library.store.memory  # type: ignore[attr-defined]
    memory.close()  # forgets everything
    keys = engine.chunk_keys(texts)
    assert [key in memory for key in keys] == [False] * 3
    CacheBlendPostprocessor(engine=engine, on_miss="ignore").postprocess_nodes(_nodes(texts[:2]))
    until = time.monotonic() + 10
    while not all(key in memory for key in keys[:2]):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert keys[2] not in memory


@both
async def test_a_query_does_not_fail_because_of_warming(
    engine: Engine, passages: Passages, caplog: pytest.LogCaptureFixture, full_disk: FullDisk, use_async: bool
) -> None:
    nodes = _nodes(passages(1))
    with full_disk():
        assert await _process(CacheBlendPostprocessor(engine=engine), nodes, use_async) == nodes
    (record,) = [record for record in caplog.records if record.name.startswith("llama_index.llms.cacheblend")]
    assert record.levelname == "WARNING"
    assert "cold" in record.getMessage()


def test_a_node_too_long_leaves_only_itself_cold(
    engine: Engine, passages: Passages, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*passages(1), "word " * engine.context_window]
    CacheBlendPostprocessor(engine=engine).postprocess_nodes(_nodes(texts))
    assert engine.is_warm(texts) == [True, False]
    assert "context" in caplog.text


async def test_event_loop_is_not_blocked(
    real_engine: Engine, passages: Passages, assert_loop_runs: AssertLoopRuns
) -> None:
    await assert_loop_runs(CacheBlendPostprocessor(engine=real_engine).apostprocess_nodes(_nodes(passages(4))))


def test_bad_construction(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="on_miss"):
        CacheBlendPostprocessor(engine=engine, on_miss="cry")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="on_mis'"):
        CacheBlendPostprocessor(engine=engine, on_mis="warm")
