"""Engines whose chunks the vLLM connector keeps, as the doctor examines them: by what any request can ask for."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Sequence
from pathlib import Path

from cacheblend_rag.catalog import FILE_NAME, Catalog
from cacheblend_rag.diagnostics.checks import Check, check_store, describe_model
from cacheblend_rag.diagnostics.comparing import ByTopTokens, Comparison
from cacheblend_rag.diagnostics.connected_exactness import check_exactness
from cacheblend_rag.diagnostics.exactness import check_shift
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.engines.connected import ConnectedEngine
from cacheblend_rag.errors import CacheBlendError

_THROUGH_LAYERS = 5  # rounding adds up through the layers, as in the connector's own probe
_LOOKED_UP = 256  # texts of a catalogue
_BLEND = {"mode": "blend"}


class InProcess:
    """See :class:`~cacheblend_rag.diagnostics.subjects.Subject`: vLLM in this process.

    An engine has one namespace, so what the doctor warms is among the user's chunks while it runs. At the end, it
    removes what was cold before, by its keys: its sample texts, which nobody else has, and passages of the user's
    prompts. Whoever ingests such a passage meanwhile finds it warm, and has to ingest it again afterwards.

    Args:
        engine: Nothing is written to its store but these chunks.
    """

    def __init__(self, engine: ConnectedEngine) -> None:
        self.engine = engine
        self.tag = f"Note {secrets.token_hex(4)}. "
        self._own: dict[str, None] = {}  # keys

    def check_model(self) -> Check:
        """See the protocol. One that is served plainly on purpose can't be blended, either."""
        text = f"{self.tag}This is here to find out whether anything is blended: a note of a few words, and no more."
        known = self.warm([text])
        if known.is_warm([text]) == [True]:
            return Check("model", True, describe_model(self.engine, self._where()))
        reason = known.generate(text, max_tokens=1, blend=_BLEND).stats.reason
        return Check(
            "model", False, f"nothing is blended: {reason}", "serve it without this package, or choose another"
        )

    def check_exactness(self, prompt: str, chunks: Sequence[str]) -> list[Check]:
        """See the protocol. The shift of keys is what the workers measured when they started."""
        checks = check_exactness(self.engine, prompt, chunks)
        errors = self.engine.describe().get("shift_errors")
        if not errors:
            figure = "not measured here: it failed (see the workers' log), or an earlier version runs there"
            return [*checks, Check("keys can be shifted, in every layer", True, figure)]
        return [*checks, check_shift(self.engine, errors, times=_THROUGH_LAYERS)]

    def check_store(self, store: Path | None) -> list[Check]:
        """See the protocol."""
        return check_store(store, self.engine, besides=self._own)

    def warm(self, chunks: Sequence[str]) -> Engine:
        """See the protocol. What was warm before is the user's, and stays; what was cold is cold again in the end."""
        new = [text for text, warm in zip(chunks, self.engine.is_warm(chunks), strict=True) if not warm]
        self._own.update(dict.fromkeys(self.engine.chunk_keys(new)))
        self.engine.warm(new)
        return self.engine

    def comparison(self, engine: Engine) -> Comparison:
        """See the protocol."""
        return ByTopTokens(engine)

    def close(self) -> None:
        """See the protocol."""
        if not self._own:
            return
        try:
            self.engine.evict_keys(list(self._own))
        except CacheBlendError as error:
            raise CacheBlendError(f"the doctor's own chunks could not be removed from the store: {error}") from error
        self._own.clear()

    def _where(self) -> str:
        import vllm
        from vllm.platforms import current_platform

        return f"vLLM {vllm.__version__} on {current_platform.get_device_name() or current_platform.device_type}"


class OnServer(InProcess):
    """The same on a server: the store is its own, and what is known of it here is the catalogue."""

    def check_store(self, store: Path | None) -> list[Check]:
        """See the protocol."""
        held = self.engine.stored_keys() - self._own.keys()
        checks = [Check("store", True, f"the server's: {len(held):,} chunks of this model, primer and namespace")]
        if store is not None and (store / FILE_NAME).exists():
            checks.append(self._check_catalogue(store))
        return [*checks, Check("reading beats prefill", True, "not measured here: the server reads its store")]

    def _check_catalogue(self, store: Path) -> Check:
        with contextlib.closing(Catalog(store, self.engine.scope)) as catalog:
            texts = [text for source in catalog.sources() for text in catalog.texts(source)]
        some = random.Random(0).sample(texts, min(_LOOKED_UP, len(texts)))
        warm = sum(self.engine.is_warm(some))
        advice = f"cacheblend ingest DIR --engine server --base-url URL --model MODEL --store {store}"
        figure = f"{warm:,} of {len(some):,} texts of the catalogue are warm"
        return Check("chunks of this model", warm > 0, figure, "" if warm else advice)

    def _where(self) -> str:
        return f"on a server with version {self.engine.describe()['version']} of the connector"
