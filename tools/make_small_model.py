"""Makes the model that most tests run on: SmolLM2's tokenizer and chat template, and few random weights in float32.

    python tools/make_small_model.py SMOLLM2 DIRECTORY

It answers nothing that makes sense, in a hundredth of the time.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Heads of a size that vLLM takes on CPU, and attention that is far from uniform: wrong KV must show.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
}


def make_small_model(source: Path, directory: Path) -> None:
    """Write a model.

    Args:
        source: Directory of a Llama model, such as SmolLM2.
        directory: Where to; not there yet.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, dtype="float32", **SIZES))
    with tempfile.TemporaryDirectory(dir=directory.parent) as work:  # all of it or nothing
        made = Path(work, "model")
        model.save_pretrained(made)
        for file in source.iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                shutil.copy(file, made)
        made.rename(directory)


if __name__ == "__main__":
    make_small_model(Path(sys.argv[1]), Path(sys.argv[2]))
