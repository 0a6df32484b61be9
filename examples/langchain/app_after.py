"""Ask the index that ingest.py made, through a retrieval chain.

    python examples/langchain/app_after.py ["question"]

app_before.py does it without CacheBlend, app_after.py with it: their difference is what an application has to change.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from langchain_cacheblend import CacheBlendRetriever, ChatCacheBlend
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_community.vectorstores import FAISS
from langchain_core.prompts import ChatPromptTemplate
from langchain_huggingface import HuggingFaceEmbeddings
from options import parse

options = parse(__doc__, work="langchain", asks=True)

model = ChatCacheBlend(model=options.model, store=options.work / "kv", max_tokens=options.max_tokens)
embeddings = HuggingFaceEmbeddings(model_name=options.embeddings)
# The index is one we wrote ourselves.
store = FAISS.load_local(str(options.work / "index"), embeddings, allow_dangerous_deserialization=True)
retriever = store.as_retriever(search_kwargs={"k": options.passages})
retriever = CacheBlendRetriever(retriever=retriever, engine=model.engine)

prompt = ChatPromptTemplate(
    [
        ("system", "Answer the question from the passages, in a few words.\n\n{context}"),
        ("human", "{input}"),
    ]
)
chain = create_retrieval_chain(retriever, create_stuff_documents_chain(model, prompt))

started = time.perf_counter()
waited = 0.0
for piece in chain.stream({"input": options.question}):
    if text := piece.get("answer"):
        waited = waited or time.perf_counter() - started
        print(text, end="", flush=True)
print(f"\n[first words after {waited:.2f} s]")
