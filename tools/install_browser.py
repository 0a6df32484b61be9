"""Gets a Chromium for the test of the dashboard, without root: Playwright's own, or the one in an npm package.

Where neither can be had the test is skipped: this says so, and does not fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153"
# It unpacks itself into the directory for temporary files.
UNPACK = "import chromium from '@sparticuz/chromium'; await chromium.executablePath();"


def main() -> None:
    """Install one, unless the system has one."""
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    if not install_from_playwright() and not install_from_npm():
        print("no browser can be had: the test of the dashboard in a browser will be skipped")


def install_from_playwright() -> bool:
    """From Playwright's servers, into the user's cache."""
    command = [sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]
    return subprocess.run(command, capture_output=True).returncode == 0


def install_from_npm() -> bool:
    """From npm's registry, into the virtual environment."""
    if not shutil.which("npm") or not shutil.which("node"):
        return False
    where = Path(sys.prefix, "browser")
    where.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(where)}
    for command in (
        ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(where), PACKAGE],
        ["node", "--input-type=module", "--eval", UNPACK],
    ):
        if subprocess.run(command, cwd=where, env=environment).returncode:
            return False
    shutil.rmtree(where / "node_modules")
    return (where / "chromium").is_file()


if __name__ == "__main__":
    main()
