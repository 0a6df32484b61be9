from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ChunkTooLongError, ConfigError, StoreError
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from llama_index.llms.cacheblend import CacheBlendPipeline, CacheBlendTransform
from llama_index.llms.cacheblend.ledger import Ledger

Passages = Callable[..., list[str]]
FullDisk = Callable[[], AbstractContextManager[None]]
AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]
# Words for tokens: LlamaIndex's own tokenizer needs the network where it is unpickled.
SPLITTER = SentenceSplitter(chunk_size=40, chunk_overlap=0, paragraph_separator="\n\n", tokenizer=str.split)


@pytest.fixture
def transform(engine: Engine) -> CacheBlendTransform:
    return CacheBlendTransform(engine=engine)


def _documents(**texts: str) -> list[Document]:
    return [Document(text=text, doc_id=name) for name, text in texts.items()]


def _pipeline(
    transform: CacheBlendTransform,
    embedding: Any,
    strategy: DocstoreStrategy | None = None,
    cls: type[IngestionPipeline] = IngestionPipeline,
) -> IngestionPipeline:
    stores: dict[str, Any] = {}
    if strategy:
        stores = {"docstore": SimpleDocumentStore(), "vector_store": SimpleVectorStore(), "docstore_strategy": strategy}
    return cls(transformations=[SPLITTER, transform, embedding], **stores)


async def _run(pipeline: IngestionPipeline, use_async: bool, documents: list[Document], **kwargs: Any) -> list[str]:
    """The texts of the nodes that a run made."""
    run = pipeline.arun(documents=documents, **kwargs) if use_async else None
    nodes = await run if run else pipeline.run(documents=documents, **kwargs)
    return [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]


@pytest.mark.parametrize("use_async", [False, True])
async def test_warms_what_the_prompt_will_hold(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any, use_async: bool
) -> None:
    (text,) = passages(1)
    document = Document(text=text, metadata={"title": "Harbour", "page": 3}, excluded_llm_metadata_keys=["page"])
    (shown,) = await _run(_pipeline(transform, embedding), use_async, [document])
    assert shown == f"title: Harbour\n\n{text}"
    assert engine.is_warm([shown, text]) == [True, False]
    stats = engine.generate(f"Notes:\n\n{shown}\n\nSummary:", max_tokens=1).stats
    assert stats.reused_tokens + stats.recomputed_tokens >= engine.count_tokens(shown) - 3


def test_nodes_pass_unchanged(transform: CacheBlendTransform, passages: Passages) -> None:
    nodes = [TextNode(text=text) for text in [*passages(2), ""]]
    assert transform(nodes) is nodes
    assert transform([]) == []


def test_an_index_over_documents(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any
) -> None:
    a, b, c = passages(3)
    index = VectorStoreIndex.from_documents(
        _documents(one=a, two=b), transformations=[SPLITTER, transform], embed_model=embedding
    )
    assert engine.is_warm([a, b]) == [True, True]
    index.refresh_ref_docs(_documents(one=a, two=c))
    assert engine.is_warm([a, b, c]) == [True, False, True]
    index.delete_ref_doc("one", delete_from_docstore=True)
    assert transform.evict_removed(index.docstore) == 1
    assert engine.is_warm([a, c]) == [False, True]


@pytest.mark.parametrize(
    ("cls", "use_async"), [(IngestionPipeline, False), (IngestionPipeline, True), (CacheBlendPipeline, True)]
)
async def test_a_cached_run_warms_what_is_cold(
    engine: Engine,
    transform: CacheBlendTransform,
    passages: Passages,
    embedding: Any,
    cls: type[IngestionPipeline],
    use_async: bool,
) -> None:
    a, b, c = passages(3)
    pipeline = _pipeline(transform, embedding, cls=cls)
    documents = _documents(one=f"{a}\n\n{b}", two=c)
    for _ in range(3):
        assert await _run(pipeline, use_async, documents) == [a, b, c]
    entries = len(pipeline.cache.cache.get_all(collection="llama_cache"))
    assert entries == 3  # one of each transformation: repeated runs are cached
    for cold in ([b], [b], [a, c]):
        assert engine.evict(cold) == len(cold)
        assert await _run(pipeline, use_async, documents) == [a, b, c]
        assert engine.is_warm([a, b, c]) == [True, True, True]


def test_a_cached_run_over_another_store(engine: Engine, passages: Passages, embedding: Any, tmp_path: Path) -> None:
    """The cache lives longer than the store."""
    (text,) = passages(1)
    documents = _documents(one=text)
    pipeline = _pipeline(CacheBlendTransform(engine=engine, ledger=tmp_path / "ledger"), embedding)
    pipeline.run(documents=documents)
    pipeline.persist(str(tmp_path / "pipeline"))
    engine.evict([text])  # as a store that was emptied, or moved
    for ledger in (tmp_path / "ledger", None):
        later = _pipeline(CacheBlendTransform(engine=engine, ledger=ledger), embedding)
        later.load(str(tmp_path / "pipeline"))
        later.run(documents=documents)
        assert engine.is_warm([text]) == [True]
        engine.evict([text])


def test_a_document_that_changes_back(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any
) -> None:
    old, new = passages(2)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS)
    for text, other in [(old, new), (new, old), (old, new), (new, old)]:
        pipeline.run(documents=_documents(one=text))
        assert engine.is_warm([text, other]) == [True, False]


@pytest.mark.parametrize(("cls", "use_async"), [(IngestionPipeline, False), (CacheBlendPipeline, True)])
async def test_upserts(
    engine: Engine,
    transform: CacheBlendTransform,
    passages: Passages,
    embedding: Any,
    cls: type[IngestionPipeline],
    use_async: bool,
) -> None:
    """Only what changed is warmed again, what is gone is evicted, what another document holds stays."""
    kept, changed, shared, new = texts = passages(4)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS, cls)
    await _run(pipeline, use_async, _documents(one=f"{kept}\n\n{changed}\n\n{shared}", two=shared))
    assert engine.is_warm(texts) == [True, True, True, False]
    before = engine.stored_keys()
    documents = _documents(one=f"{kept}\n\n{new}", two=shared)
    assert await _run(pipeline, use_async, documents) == [kept, new]
    assert engine.is_warm(texts) == [True, False, True, True]
    assert engine.stored_keys() - before == set(engine.chunk_keys([new]))
    engine.evict([kept, shared])
    assert await _run(pipeline, use_async, documents) == []  # the pipeline skips both, the transformation heals
    assert engine.is_warm(texts) == [True, False, True, True]


@pytest.mark.parametrize("use_async", [False, True])
async def test_upserts_and_delete(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any, use_async: bool
) -> None:
    a, shared, b = texts = passages(3)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS_AND_DELETE, CacheBlendPipeline)
    await _run(pipeline, use_async, _documents(one=f"{a}\n\n{shared}", two=f"{shared}\n\n{b}"))
    await _run(pipeline, use_async, _documents(two=f"{shared}\n\n{b}"))
    assert engine.is_warm(texts) == [False, True, True]
    await _run(pipeline, use_async, _documents())
    assert engine.is_warm(texts) == [False, False, False]


def test_an_edited_split_or_reembedded_document(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any
) -> None:
    parts = passages(4)
    document = _documents(one="\n\n".join(parts))
    IngestionPipeline(transformations=[SPLITTER, transform, embedding]).run(documents=document)
    stored = engine.stored_keys()
    # Another embedding: the same chunks.
    IngestionPipeline(transformations=[SPLITTER, transform]).run(documents=document)
    assert engine.stored_keys() == stored
    # Split otherwise: other chunks, but for those that come out the same.
    coarse = SentenceSplitter(chunk_size=70, chunk_overlap=0, paragraph_separator="\n\n", tokenizer=str.split)
    nodes = IngestionPipeline(transformations=[coarse, transform]).run(documents=document)
    texts = [node.get_content() for node in nodes]
    assert len(texts) < 4
    assert engine.is_warm(texts) == [True] * len(texts)
    assert engine.is_warm(parts) == [part in texts for part in parts]


def test_a_document_that_comes_in_parts(engine: Engine, transform: CacheBlendTransform, passages: Passages) -> None:
    a, b, c = passages(3)
    nodes = SPLITTER(_documents(one=f"{a}\n\n{b}"))
    for node in nodes:
        transform([node])
    assert engine.is_warm([a, b]) == [True, True]
    transform(SPLITTER(_documents(one=c)))
    assert engine.is_warm([a, b, c]) == [False, False, True]


def test_a_document_too_long_leaves_nothing_and_is_healed(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any
) -> None:
    a, b = passages(2)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS)
    pipeline.transformations = [transform, embedding]
    with pytest.raises(ChunkTooLongError):
        pipeline.run(documents=_documents(one=a, two="word " * engine.context_window))
    assert engine.is_warm([a]) == [False]
    pipeline.run(documents=_documents(one=a, two=b))
    assert engine.is_warm([a, b]) == [True, True]


def test_a_failed_run_is_healed_by_the_next(
    engine: Engine, transform: CacheBlendTransform, passages: Passages, embedding: Any, full_disk: FullDisk
) -> None:
    old, new, other = passages(3)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS)
    pipeline.run(documents=_documents(one=old, two=other))
    engine.evict([other])
    documents = _documents(one=new, two=other)
    with full_disk(), pytest.raises(OSError, match="chunk store"):
        pipeline.run(documents=documents)
    assert engine.is_warm([new, other]) == [False, False]
    pipeline.run(documents=documents)
    assert engine.is_warm([old, new, other]) == [False, True, True]


async def test_event_loop_is_not_blocked(
    real_engine: Engine, passages: Passages, assert_loop_runs: AssertLoopRuns
) -> None:
    transform = CacheBlendTransform(engine=real_engine)
    await assert_loop_runs(transform.acall([TextNode(text=text) for text in passages(4)]))


async def test_a_pipeline_asks_the_ledger_in_threads(passages: Passages, engine: Engine, embedding: Any) -> None:
    asked_in: list[threading.Thread] = []

    class Watched(CacheBlendTransform):
        def _open_ledger(self) -> Ledger:
            asked_in.append(threading.current_thread())
            return super()._open_ledger()

    transform = Watched(engine=engine)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS, CacheBlendPipeline)
    (text,) = passages(1)
    await pipeline.arun(documents=_documents(one=text))
    assert asked_in
    assert threading.current_thread() not in asked_in
    transform.to_dict()  # asked outside of a run, it looks again
    assert asked_in[-1] is threading.current_thread()


async def test_several_at_once(engine: Engine, passages: Passages, tmp_path: Path) -> None:
    texts = passages(6)
    transforms = [CacheBlendTransform(engine=engine, ledger=tmp_path / "new" / "ledger") for _ in texts]
    nodes = [TextNode(text=text) for text in texts]
    await asyncio.gather(*(transform.acall([node]) for transform, node in zip(transforms, nodes, strict=True)))
    assert engine.is_warm(texts) == [True] * 6
    engine.evict(texts)
    transforms[0]([])
    assert engine.is_warm(texts) == [True] * 6


def test_bad_ledger(engine: Engine, passages: Passages, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_text("not a database, but long enough to look like something " * 50)
    with pytest.raises(StoreError, match=str(path)):
        CacheBlendTransform(engine=engine, ledger=path)([TextNode(text=passages(1)[0])])


def test_copies_and_serialisation(engine: Engine, transform: CacheBlendTransform) -> None:
    assert copy.deepcopy(transform).engine is engine
    assert transform.model_copy(deep=True).engine is engine
    data = transform.to_dict()
    json.dumps(data)
    assert data == transform.to_dict()
    assert data["class_name"] == "CacheBlendTransform"
    assert data["state"] != CacheBlendTransform(engine=engine).to_dict()["state"]
    settings = engine.settings
    try:
        engine.settings = None
        with pytest.raises(ConfigError, match="load_engine"):
            pickle.dumps(transform)
    finally:
        engine.settings = settings


@pytest.mark.parametrize(
    "use_async", [pytest.param(False, marks=pytest.mark.slow, id="spawned"), pytest.param(True, id="forked")]
)
async def test_worker_processes(engine: Engine, passages: Passages, embedding: Any, use_async: bool) -> None:
    """Each opens the engine again; what they write down counts here."""
    texts = passages(4)
    transform = CacheBlendTransform(engine=engine)
    pipeline = _pipeline(transform, embedding, DocstoreStrategy.UPSERTS_AND_DELETE, CacheBlendPipeline)
    pipeline.transformations = [transform]  # LlamaIndex pickles a splitter without its settings
    documents = _documents(**{f"d{n}": text for n, text in enumerate(texts[:3])})
    assert await _run(pipeline, use_async, documents, num_workers=2) == texts[:3]
    assert engine.is_warm(texts) == [True, True, True, False]
    await _run(pipeline, use_async, _documents(d0=texts[0], d1=texts[3]))
    assert engine.is_warm(texts) == [True, False, False, True]
