"""The command line of the examples in ``langchain/`` and ``llama_index/``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fetch_models import fetch

_DOCS = Path(__file__).parent / "corpus" / "docs"
_QUESTION = "At what time does the stopped clock of Old Tolvern stand?"


def parse(description: str, *, work: str, asks: bool) -> argparse.Namespace:
    """Options of a script; small models are fetched in place of those not given.

    Args:
        description: What the script does.
        work: Name of its directory under ``.demo``.
        asks: It asks a question. Otherwise it ingests a directory.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if asks:
        parser.add_argument("question", nargs="?", default=_QUESTION)
        parser.add_argument("--passages", type=int, default=8, help="how many to retrieve (default: 8)")
        parser.add_argument("--max-tokens", type=int, default=40, help="most tokens of the answer (default: 40)")
    else:
        parser.add_argument("docs", nargs="?", type=Path, default=_DOCS, help="directory (default: the corpus)")
    parser.add_argument("--model", help="language model: directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--embeddings", help="sentence-transformers model: directory or hub id (default: all-MiniLM-L6-v2)"
    )
    parser.add_argument("--models", type=Path, default=Path(".models"), help="where fetched models are kept")
    parser.add_argument("--work", type=Path, default=Path(".demo", work), help="where index and chunk KV are kept")
    options = parser.parse_args()
    options.model = options.model or str(fetch("smollm2-135m-instruct", options.models / "smollm2-135m-instruct"))
    options.embeddings = options.embeddings or str(fetch("all-minilm-l6-v2", options.models / "all-minilm-l6-v2"))
    return options
