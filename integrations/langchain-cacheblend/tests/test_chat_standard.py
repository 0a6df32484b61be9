"""LangChain's standard suites for chat models, on real small models."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
import torch
from cacheblend_rag import BlendConfig, load_engine
from cacheblend_rag.engines.base import Engine
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from syrupy.assertion import SnapshotAssertion

from langchain_cacheblend import ChatCacheBlend


class _Toggles:
    """Everything but images, audio and files: the models read text."""

    engine: Engine

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCacheBlend

    @property
    def chat_model_params(self) -> dict[str, object]:
        return {"engine": self.engine}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def returns_usage_metadata(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}


class TestUnit(_Toggles, ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _engine(self, chat_engine: Engine) -> None:
        self.engine = chat_engine

    @pytest.mark.xfail(
        reason="to load, 'all' classes are LangChain's own partners'; test_chat_models.py does the same with ours named"
    )
    def test_serdes(self, model: BaseChatModel, snapshot: SnapshotAssertion) -> None:
        super().test_serdes(model, snapshot)

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, object], dict[str, object]]:
        return {"CACHEBLEND_API_KEY": "secret"}, {"engine": self.engine}, {"api_key": "secret"}


class _Integration(_Toggles, ChatModelIntegrationTests):
    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        note = "Anna keeps three grey cats, two dogs and a parrot in the old mill by the river. " * 4
        self.engine.warm([note])
        model = self.chat_model_class(**self.chat_model_params)
        question = f"{note}\n\nWhat does Anna keep?"
        if not stream:
            message = model.invoke(question)
        else:
            chunks = [chunk for chunk in model.stream(question) if isinstance(chunk, AIMessageChunk)]
            message = functools.reduce(lambda whole, chunk: whole + chunk, chunks)
        assert isinstance(message, AIMessage)
        assert message.usage_metadata is not None
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message


class TestIntegration(_Integration):
    """Without what a model of 135 million parameters can't be relied on: the right arguments, JSON that ends."""

    @pytest.fixture(autouse=True)
    def _engine(self, chat_engine: Engine) -> None:
        self.engine = chat_engine

    @property
    def standard_chat_model_params(self) -> dict[str, object]:
        return {**super().standard_chat_model_params, "max_tokens": 16}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return False


@pytest.fixture(scope="module")
def tool_engine() -> Iterator[Engine]:
    path = os.environ.get("CACHEBLEND_TEST_TOOL_MODEL")
    if not path:
        pytest.skip("set CACHEBLEND_TEST_TOOL_MODEL to a small chat model that was trained to call tools")
    torch.set_num_threads(2)
    with load_engine(path, dtype="float32", blend=BlendConfig(mode="blend", min_reused_tokens=0)) as engine:
        yield engine


@pytest.mark.slow
class TestIntegrationWithTools(_Integration):
    @pytest.fixture(autouse=True)
    def _engine(self, tool_engine: Engine) -> None:
        self.engine = tool_engine

    @property
    def chat_model_params(self) -> dict[str, object]:
        # Greedily, models of this size tell the same joke for ever.
        return {"engine": self.engine, "repetition_penalty": 1.1}

    @property
    def structured_output_kwargs(self) -> dict[str, object]:
        return {"max_tokens": 300}

    @pytest.mark.xfail(reason="unless it must call, Qwen2.5-Coder writes calls as ```json, not as its template does")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
