"""What must not be logged or written down: keys, tokens, headers, passwords."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

_SECRET = re.compile(
    r"(^|_)(key|apikey|token|secret|password|passwd|auth|authorization|cookies?|credentials?|headers|query)$",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name may hold a secret."""
    return _SECRET.search(name) is not None


def without_credentials(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
