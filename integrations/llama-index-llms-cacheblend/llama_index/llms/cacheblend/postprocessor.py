"""A postprocessor that makes retrieved nodes ready for the prompt that will hold them."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ChunkTooLongError, ConfigError
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from llama_index.llms.cacheblend.engines import HoldsEngine, obtain_engine, split_settings

logger = logging.getLogger(__name__)

OnMiss = Literal["warm", "ignore"]


class CacheBlendPostprocessor(HoldsEngine, BaseNodePostprocessor):
    """Begins to read the KV of retrieved nodes from disk, and warms nodes that are cold.

    To be put last, where it is known which nodes the prompt will hold. They are returned as they are, but for their
    order with ``best_last``. Whatever goes wrong here is logged as a warning: a query never fails because of warming.

    Attributes:
        on_miss: ``"warm"`` warms what is cold, so that the next prompt with it reuses it; ``"ignore"`` leaves it cold.
        best_last: Return the nodes in reverse, so that the retriever's first is next to a question that follows them.
            A blend is nearer to full prefill that way (see the project's docs/quality.md). Postprocessors that rank
            again belong before this one.
    """

    on_miss: OnMiss = "warm"
    best_last: bool = False

    def __init__(
        self,
        *,
        engine: Engine | str = "transformers",
        on_miss: OnMiss = "warm",
        best_last: bool = False,
        **settings: Any,
    ) -> None:
        """Load the engine, or take the one given.

        Args:
            engine: An engine, or the kind to load: ``"transformers"``, ``"vllm"``, or ``"server"`` with ``base_url``.
            on_miss: What to do about nodes that are cold.
            best_last: Whether the nodes are returned in reverse.
            settings: Further arguments of ``cacheblend_rag.load_engine``, and ``callback_manager``.

        Raises:
            ConfigError: an unknown or a bad setting, or one that an engine that exists can't take any more.
            UnsupportedModelError: the model can't be blended.
            StoreError: the chunk store can't be opened.
            ServerError: the server can't be reached.
        """
        if on_miss not in get_args(OnMiss):
            raise ConfigError(f"on_miss must be one of {', '.join(get_args(OnMiss))}, not {on_miss!r}")
        load, fields = split_settings(settings, ["callback_manager"])
        loaded = obtain_engine("CacheBlendPostprocessor", engine, load)
        super().__init__(loaded, on_miss=on_miss, best_last=best_last, **fields)

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised data."""
        return "CacheBlendPostprocessor"

    # The asynchronous method of the base class runs this one in a thread.
    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        try:
            self._make_ready([node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes])
        except Exception as error:  # the answer does not depend on warming, so nothing that goes wrong there may
            logger.warning("Nodes may stay cold, warming them failed: %s", error)
        return nodes[::-1] if self.best_last else nodes

    def _make_ready(self, texts: list[str]) -> None:
        warm = self.engine.is_warm(texts)
        self.engine.prefetch([text for text, is_warm in zip(texts, warm, strict=True) if is_warm])
        cold = [text for text, is_warm in zip(texts, warm, strict=True) if not is_warm]
        if self.on_miss == "ignore" or not cold:
            return
        try:
            self.engine.warm(cold)
        except ChunkTooLongError:
            for text in cold:  # one is too long: not a reason to leave the others cold
                try:
                    self.engine.warm([text])
                except ChunkTooLongError as error:
                    logger.warning("A node stays cold: %s", error)
