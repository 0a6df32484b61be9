"""Where there is a browser to test with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find_browser() -> str | None:
    """A Chromium of the system, or what ``tools/install_browser.py`` got; None: at most Playwright's own is there."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    installed = Path(sys.prefix, "browser", "chromium")
    return str(installed) if installed.is_file() else None
