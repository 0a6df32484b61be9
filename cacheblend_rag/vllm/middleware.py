"""Answers 400 to requests with settings that can't be understood; a KV connector could only prefill them plainly.

Used by ``cacheblend serve``, which passes it to vLLM's own ``--middleware``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.vllm.settings import RequestParams

NUM_LAYERS_VARIABLE = "CACHEBLEND_NUM_LAYERS"
"""Environment variable in which ``cacheblend serve`` tells how many layers the model has."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class CheckParams:
    """ASGI middleware.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._num_layers = int(os.environ[NUM_LAYERS_VARIABLE])

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Look at the body of a POST that names our settings, and pass it on if they are good."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        error = self._error(b"".join(message.get("body", b"") for message in messages))
        if error is not None:
            await _refuse(send, error)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    def _error(self, body: bytes) -> str | None:
        if b"cacheblend" not in body:
            return None
        try:
            request = json.loads(body)
        except ValueError:
            return None  # vLLM's to refuse
        try:
            RequestParams.parse(
                request.get("kv_transfer_params") if isinstance(request, dict) else None,
                BlendConfig(),
                self._num_layers,
            )
        except ConfigError as error:
            return str(error)
        return None


async def _refuse(send: Send, error: str) -> None:
    details = {"message": error, "type": "BadRequestError", "param": "kv_transfer_params", "code": 400}
    body = json.dumps({"error": details}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
