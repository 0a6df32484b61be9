"""What the doctor needs of an engine that engines do in different ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cacheblend_rag.diagnostics.checks import Check
from cacheblend_rag.diagnostics.comparing import Comparison
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.engines.connected import ConnectedEngine
from cacheblend_rag.engines.transformers import TransformersEngine


class Subject(Protocol):
    """An engine that is examined.

    Attributes:
        engine: As it was loaded. It knows the chunks in the user's store.
        tag: What the doctor's own chunks begin with, so that nobody else's are the same.
    """

    @property
    def engine(self) -> Engine:
        """See the class."""

    @property
    def tag(self) -> str:
        """See the class."""

    def check_model(self) -> Check:
        """Whether it can be blended, and where it is."""

    def check_exactness(self, prompt: str, chunks: Sequence[str]) -> list[Check]:
        """Whether blending is exact where it has to be: invariants I1 and I2, and the shift of keys in every layer.

        Args:
            prompt: Some prompt.
            chunks: Texts that it holds, at least two, which :meth:`warm` was given.
        """

    def check_store(self, store: Path | None) -> list[Check]:
        """Whether the user's store can be read, and is worth it.

        Args:
            store: Its directory, which can be opened; with a server the catalogue's. None: none is given.
        """

    def warm(self, chunks: Sequence[str]) -> Engine:
        """Warm chunks of the doctor's, and give the engine that knows them. The user's store holds none at the end.

        Raises:
            ChunkTooLongError: one does not fit the context.
        """

    def comparison(self, engine: Engine) -> Comparison:
        """How answers are compared, of :attr:`engine` or of what :meth:`warm` gave."""

    def close(self) -> None:
        """Remove the doctor's own chunks. The engine stays open.

        Raises:
            CacheBlendError: some can't be removed.
        """


def examine(engine: Engine, name: str) -> Subject:
    """An engine as a subject; ``name`` is what :func:`cacheblend_rag.load_engine` calls its kind."""
    from cacheblend_rag.diagnostics.connected import InProcess, OnServer
    from cacheblend_rag.diagnostics.embedded import Embedded

    if name == "transformers":
        assert isinstance(engine, TransformersEngine)
        return Embedded(engine)
    assert isinstance(engine, ConnectedEngine)
    return OnServer(engine) if name == "server" else InProcess(engine)
