"""A transformation of an ingestion pipeline that warms what comes through."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cacheblend_rag.engines.base import Engine
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.storage.docstore import BaseDocumentStore

from llama_index.llms.cacheblend.engines import HoldsEngine, obtain_engine, split_settings
from llama_index.llms.cacheblend.ledger import DocumentChunks, Ledger

STATES: ContextVar[Mapping[int, list[object]]] = ContextVar("cacheblend_states", default=MappingProxyType({}))
"""States of transformations by ``id()``, found out ahead: an event loop that asks ``to_dict`` can't wait for files."""


class CacheBlendTransform(HoldsEngine, TransformComponent):
    """Warms the nodes that pass, exactly as prompts will hold them: with the metadata that the model is shown.

    It belongs behind everything that changes a node's text or metadata, so right before the embedding::

        IngestionPipeline(transformations=[SentenceSplitter(), CacheBlendTransform(engine=llm.engine), embedding])

    It remembers which chunks belong to which document. When a document comes again, only what changed is warmed, and
    what it no longer has is evicted, unless another document has it too.

    A pipeline's cache skips transformations whose input it knows. It does not skip this one when a chunk has been
    evicted meanwhile, or the chunk store is another one: then all chunks that were lost are warmed again, those of
    documents too that the pipeline skips as unchanged.

    With ``num_workers`` the pipeline runs it in other processes. There the engine is opened again from its settings,
    which must name a store that all can open.

    Attributes:
        ledger: The file that remembers.
    """

    ledger: str

    def __init__(
        self, *, engine: Engine | str = "transformers", ledger: str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        """Load the engine, or take the one given.

        Args:
            engine: An engine, or the kind to load: ``"transformers"``, ``"vllm"``, or ``"server"`` with ``base_url``.
            ledger: The file that remembers which chunks belong to which document, one for each document store; to be
                kept as long as that. None: remembered for as long as this object lives.
            settings: Further arguments of ``cacheblend_rag.load_engine``.

        Raises:
            ConfigError: an unknown or a bad setting, or one that an engine that exists can't take any more.
            UnsupportedModelError: the model can't be blended.
            StoreError: the chunk store can't be opened.
            ServerError: the server can't be reached.
        """
        load, _ = split_settings(settings, [])
        engine = obtain_engine("CacheBlendTransform", engine, load)
        home = None if ledger else tempfile.mkdtemp(prefix="cacheblend-")
        super().__init__(engine, ledger=os.fspath(ledger or Path(str(home), "ledger.sqlite")))
        if home:
            weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised data."""
        return "CacheBlendTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What a pipeline's cache keys on: it changes with everything that may have made a chunk cold."""
        return {**super().to_dict(**kwargs), "state": STATES.get().get(id(self)) or self.find_state()}

    def find_state(self) -> list[object]:
        """What changes with everything that may have made a chunk cold.

        Raises:
            StoreError: the ledger or the chunk store can't be read.
        """
        with self._open_ledger() as ledger:
            lost = sorted(ledger.lost(self.engine.stored_keys()))
            digest = hashlib.blake2b("".join(lost).encode(), digest_size=16).hexdigest()
            return [self.engine.scope.digest, ledger.id, ledger.generation, digest]

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Warm nodes and return them as they are. Without nodes, only chunks that were lost are warmed again.

        Raises:
            ChunkTooLongError: a node does not fit the model's context. Nothing was warmed.
            StoreError: the chunk store can't be written. The next call goes on from there.
        """
        engine = self.engine
        documents = self._documents(nodes)
        own = {key: text for document in documents.values() for key, text in document.texts.items()}
        with self._open_ledger() as ledger:
            lost = ledger.lost(engine.stored_keys())
            if self._ref.is_copy:  # others are at work beside this one: what seems lost may be what they are warming
                lost = {key: text for key, text in lost.items() if key in own}
            replaced = ledger.replaced(documents)
            engine.evict_keys(replaced)
            for key in replaced:
                lost.pop(key, None)
            engine.warm(list({**own, **lost}.values()))
            # Recorded is what is there: a store that is too small must not be filled over and over.
            stored = engine.stored_keys()
            for document in documents.values():
                document.texts = {key: text for key, text in document.texts.items() if key in stored}
            ledger.record(documents)
            if lost:
                ledger.found_again(lost, stored)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Like calling it; the engine runs in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def evict_removed(self, docstore: BaseDocumentStore) -> int:
        """Evict the chunks of documents that a document store no longer has; returns how many were there.

        :class:`CacheBlendPipeline` does so after each run.

        Args:
            docstore: Knows all documents whose nodes came through here.

        Raises:
            StoreError: the chunk store can't be written. Another call goes on from there.
        """
        with self._open_ledger() as ledger:
            gone = [name for name in ledger.documents() if not _has(docstore, name)]
            evicted = self.engine.evict_keys(ledger.exclusive(gone))
            ledger.forget(gone)
        return evicted

    def _open_ledger(self) -> Ledger:
        return Ledger(self.ledger, self.engine.scope.digest)

    def _documents(self, nodes: Sequence[BaseNode]) -> dict[str, DocumentChunks]:
        """The nodes' chunks, by document."""
        texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        *keys, no_tokens = self.engine.chunk_keys([*texts, ""])
        ids = {node.node_id for node in nodes}
        documents: dict[str, DocumentChunks] = {}
        for node, key, text in zip(nodes, keys, texts, strict=True):
            document = documents.setdefault(node.ref_doc_id or node.node_id, DocumentChunks({}, complete=True))
            # A neighbour that isn't here: these nodes are a part of their document.
            document.complete &= all(
                other is None or other.node_id in ids for other in (node.prev_node, node.next_node)
            )
            if key != no_tokens:
                document.texts[key] = text
        return documents


def _has(docstore: BaseDocumentStore, document: str) -> bool:
    return (
        docstore.get_document_hash(document) is not None
        or docstore.get_ref_doc_info(document) is not None
        or docstore.document_exists(document)
    )
