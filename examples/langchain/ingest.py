"""Load a directory, split, embed, index in FAISS, and warm. A second run does it for what changed, and no more.

    python examples/langchain/ingest.py [DIRECTORY]

Text, Markdown, HTML and PDF files. app_before.py and app_after.py ask the index.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import faiss
from langchain_cacheblend import CacheBlendVectorStore
from langchain_classic.indexes import SQLRecordManager
from langchain_community.docstore import InMemoryDocstore
from langchain_community.document_loaders import BSHTMLLoader, PyPDFLoader, TextLoader
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.indexing import index
from langchain_huggingface import HuggingFaceEmbeddings
from langchain_text_splitters import RecursiveCharacterTextSplitter
from options import parse
from rich.progress import track

from cacheblend_rag import load_engine

TEXT = functools.partial(TextLoader, encoding="utf-8")
HTML = functools.partial(BSHTMLLoader, bs_kwargs={"features": "html.parser"}, get_text_separator="\n")
LOADERS = {".txt": TEXT, ".md": TEXT, ".html": HTML, ".htm": HTML, ".pdf": PyPDFLoader}


def main() -> None:
    """Command line."""
    options = parse(__doc__, work="langchain", asks=False)
    embeddings = HuggingFaceEmbeddings(model_name=options.embeddings)
    engine = load_engine(options.model, store=options.work / "kv")
    before = engine.stored_keys()
    faiss_store, records = open_index(options.work / "index", embeddings)
    chunks = RecursiveCharacterTextSplitter(chunk_size=1200, chunk_overlap=0).split_documents(load(options.docs))

    # An ordinary index() on an ordinary store: only the wrapper is ours.
    store = CacheBlendVectorStore(faiss_store, engine)
    shown = track(chunks, description="Indexing and warming")
    done = index(shown, records, store, cleanup="full", key_encoder="blake2b", batch_size=8)
    store.save_local(str(options.work / "index"))
    store.repair()  # in case chunk KV was lost since the last run

    warm = engine.stored_keys()
    print(f"{len(chunks)} chunks: {done['num_added']} indexed now, {done['num_deleted']} removed from the index")
    print(f"{len(warm)} warm: {len(warm - before)} warmed now, {len(before - warm)} evicted")
    engine.close()


def load(directory: Path) -> list[Document]:
    """Documents of all files that can be read: one a file, or one a page."""
    documents = []
    for path in sorted(directory.rglob("*")):
        if loader := LOADERS.get(path.suffix):
            for document in loader(str(path)).lazy_load():
                # The name within the directory: a document is the same when the directory has moved.
                document.metadata["source"] = path.relative_to(directory).as_posix()
                documents.append(document)
    return documents


def open_index(directory: Path, embeddings: HuggingFaceEmbeddings) -> tuple[FAISS, SQLRecordManager]:
    """The index of the last run, or an empty one, and the record of what is in it."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "index.faiss").exists():
        # The index is one we wrote ourselves.
        store = FAISS.load_local(str(directory), embeddings, allow_dangerous_deserialization=True)
    else:
        store = FAISS(embeddings, faiss.IndexFlatL2(len(embeddings.embed_query("?"))), InMemoryDocstore(), {})
    records = SQLRecordManager("documents", db_url=f"sqlite:///{directory / 'records.sqlite'}")
    records.create_schema()
    # If a run was cut short before it saved the index, its records are ahead: what differs is done again.
    recorded, indexed = set(records.list_keys()), set(store.index_to_docstore_id.values())
    records.delete_keys(list(recorded - indexed))
    if indexed - recorded:
        store.delete(list(indexed - recorded))
    return store, records


if __name__ == "__main__":
    main()
