"""Load a directory, split, warm, embed, and index in FAISS. A second run does it for what changed, and no more.

    python examples/llama_index/ingest.py [DIRECTORY]

Text, Markdown, HTML and PDF files. app_before.py and app_after.py ask the index.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import faiss
from llama_index.core import Document, SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.llms.cacheblend import CacheBlendTransform
from llama_index.readers.file import HTMLTagReader
from llama_index.vector_stores.faiss import FaissVectorStore
from options import parse
from rich.progress import track

from cacheblend_rag import load_engine

SUFFIXES = [".txt", ".md", ".html", ".htm", ".pdf"]


def main() -> None:
    """Command line."""
    options = parse(__doc__, work="llama_index", asks=False)
    embedding = HuggingFaceEmbedding(model_name=options.embeddings)
    engine = load_engine(options.model, store=options.work / "kv")
    before = engine.stored_keys()
    documents = load(options.docs)

    # An ordinary pipeline: only the transformation is ours.
    warming = CacheBlendTransform(engine=engine, ledger=options.work / "ledger.sqlite")
    splitter = SentenceSplitter(chunk_size=256, chunk_overlap=0)
    pipeline = IngestionPipeline(transformations=[splitter, warming, embedding])
    kept = options.work / "pipeline"
    if kept.exists():
        pipeline.load(str(kept))
    # One by one, because the pipeline's cache knows a run by all that goes into it.
    shown = track(documents, description="Warming and embedding")
    nodes = [node for document in shown for node in pipeline.run(documents=[document])]
    pipeline.persist(str(kept))
    present = SimpleDocumentStore()
    present.add_documents(documents)
    warming.evict_removed(present)

    # FAISS can't replace nodes: it is filled anew. Embeddings of documents that did not change were in the cache.
    vectors = FaissVectorStore(faiss.IndexFlatL2(len(embedding.get_text_embedding("?"))))
    storage = StorageContext.from_defaults(vector_store=vectors)
    VectorStoreIndex(nodes, storage_context=storage, embed_model=embedding)
    storage.persist(str(options.work / "index"))

    warm = engine.stored_keys()
    print(f"{len(nodes)} chunks of {len(documents)} documents indexed")
    print(f"{len(warm)} warm: {len(warm - before)} warmed now, {len(before - warm)} evicted")
    engine.close()


def load(directory: Path) -> list[Document]:
    """Documents of all files that can be read: one a file, or one a page."""
    directory = directory.resolve()
    html = HTMLTagReader(tag="body")
    reader = SimpleDirectoryReader(
        directory,
        recursive=True,
        filename_as_id=True,
        required_exts=SUFFIXES,
        file_extractor={".html": html, ".htm": html},
        # The model is shown this: the name within the directory is the same when the directory has moved.
        file_metadata=lambda path: {"source": Path(path).relative_to(directory).as_posix()},
    )
    return reader.load_data()


if __name__ == "__main__":
    main()
