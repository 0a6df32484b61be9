"""Ask the index that ingest.py made, through a query engine.

    python examples/llama_index/app_after.py ["question"]

app_before.py does it without CacheBlend, app_after.py with it: their difference is what an application has to change.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from llama_index.core import StorageContext, load_index_from_storage
from llama_index.core.postprocessor import LongContextReorder
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.llms.cacheblend import CacheBlendLLM, CacheBlendPostprocessor
from llama_index.vector_stores.faiss import FaissVectorStore
from options import parse

options = parse(__doc__, work="llama_index", asks=True)

llm = CacheBlendLLM(model=options.model, store=options.work / "kv", max_tokens=options.max_tokens)
embedding = HuggingFaceEmbedding(model_name=options.embeddings)
directory = str(options.work / "index")
vectors = FaissVectorStore.from_persist_dir(directory)
storage = StorageContext.from_defaults(vector_store=vectors, persist_dir=directory)
index = load_index_from_storage(storage, embed_model=embedding)
postprocessors = [LongContextReorder(), CacheBlendPostprocessor(engine=llm.engine)]
query_engine = index.as_query_engine(
    llm=llm, similarity_top_k=options.passages, node_postprocessors=postprocessors, streaming=True
)

started = time.perf_counter()
waited = 0.0
for text in query_engine.query(options.question).response_gen:
    waited = waited or time.perf_counter() - started
    print(text, end="", flush=True)
print(f"\n[first words after {waited:.2f} s]")
