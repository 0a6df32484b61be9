"""Shows what our loggers say, where the user asks for it: nothing is set up otherwise."""

from __future__ import annotations

import logging

from cacheblend_rag.errors import ConfigError

LEVEL_VARIABLE = "CACHEBLEND_LOG_LEVEL"
"""Environment variable that names the level; processes that vLLM starts have it too."""

_LEVELS = ("debug", "info", "warning", "error")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: str) -> None:
    """Have our loggers write what is at least of a level to stderr.

    ``debug`` has a line for every prompt: what was decided and why, how many tokens were chosen from how many, the
    range of their scores, the seconds of each part. On a GPU, it makes the host wait for the scores.

    Raises:
        ConfigError: there is no such level.
    """
    if level.lower() not in _LEVELS:
        raise ConfigError(f"the log level must be one of {', '.join(_LEVELS)}, not {level!r}")
    ours = logging.getLogger("cacheblend_rag")
    ours.setLevel(level.upper())
    if not ours.handlers:  # once a process
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        ours.addHandler(handler)
        ours.propagate = False
