"""Whether an index and the chunk store hold the same texts, and making it so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cacheblend_rag.engines.base import Engine
from cacheblend_rag.stats import WarmReport
from langchain_core.documents import Document

from langchain_cacheblend.warming import warm_what_fits


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What an index and the chunk store disagree on.

    Attributes:
        documents: How many documents were looked at.
        cold: Those whose text is not stored: a prompt that holds one prefills it.
        unknown: Keys of stored chunks whose text none of the documents has. They may be another index's: what counts
            as stored is all that the engine's namespace, model and primer have in its store.
    """

    documents: int
    cold: list[Document]
    unknown: list[str]


@dataclasses.dataclass(frozen=True)
class RepairReport(VerifyReport):
    """What a repair found, and what it did.

    Attributes:
        warmed: What was warmed.
        too_long: Cold documents that do not fit the model's context, so that they stay cold.
        evicted: How many unknown chunks were evicted.
    """

    warmed: WarmReport
    too_long: list[Document]
    evicted: int


def compare(engine: Engine, documents: Sequence[Document]) -> VerifyReport:
    """Compare the documents of an index with the chunks of an engine."""
    texts = list(dict.fromkeys(document.page_content for document in documents))
    cold = {text for text, warm in zip(texts, engine.is_warm(texts), strict=True) if not warm}
    unknown = engine.stored_keys() - set(engine.chunk_keys(texts))
    return VerifyReport(
        len(documents), [document for document in documents if document.page_content in cold], sorted(unknown)
    )


def repair(engine: Engine, found: VerifyReport, *, evict_unknown: bool) -> RepairReport:
    """Warm what is cold; evict what is unknown only if asked to.

    Raises:
        StoreError: the chunk store can't be written; what was done before stays done.
    """
    warmed, too_long = warm_what_fits(engine, [document.page_content for document in found.cold])
    evicted = engine.evict_keys(found.unknown) if evict_unknown else 0
    return RepairReport(
        found.documents,
        found.cold,
        found.unknown,
        warmed,
        [document for document in found.cold if document.page_content in set(too_long)],
        evicted,
    )
