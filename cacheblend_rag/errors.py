"""Every error this package raises on purpose: one line that says what is wrong and what to do about it."""


class CacheBlendError(Exception):
    """Base of all errors raised by cacheblend_rag."""


class ConfigError(CacheBlendError, ValueError):
    """A setting is out of its range or unknown."""


class UnsupportedModelError(CacheBlendError):
    """The model can't be blended (sliding window, unusual RoPE, MLA, ...); the message gives the reason."""


class PromptTooLongError(CacheBlendError, ValueError):
    """A prompt, with the tokens to generate, does not fit the model's context."""


class ChunkTooLongError(CacheBlendError, ValueError):
    """A chunk to warm, behind its primer, does not fit the model's context."""


class StoreError(CacheBlendError, OSError):
    """The chunk store can't be opened or written (permissions, full disk, not a store)."""


class EngineMemoryError(CacheBlendError, MemoryError):
    """A device's memory is full; the message names the settings to change. The engine goes on."""


class EngineClosedError(CacheBlendError, RuntimeError):
    """An engine was used after it was closed."""


class ServerError(CacheBlendError, ConnectionError):
    """A vLLM server can't be reached, does not answer in time, breaks off, or fails."""


class AnswerTimeoutError(CacheBlendError, TimeoutError):
    """An answer was not complete within the ``timeout`` of its call; the engine goes on."""


class ServerTimeoutError(ServerError, AnswerTimeoutError):
    """A vLLM server does not answer in time."""


class PolicyError(CacheBlendError):
    """A selection policy returned indices it may not return; the message names the policy."""


class IngestError(CacheBlendError):
    """A corpus can't be ingested (empty, unreadable, not text)."""
