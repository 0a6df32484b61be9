"""What benchmarks of speed share: models of a shape without their weights, random chunks, options, printed tables.

How long a prompt takes hardly depends on what the weights are, so some are made up. The vocabulary is that of bytes: a
letter is a token, and random text has as many tokens as letters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {  # Llama-3.1-8B
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {  # to try a benchmark out on a CPU
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the least that vLLM's attention takes on CPU
    },
}
EOS = 256
PRIMER_LETTERS = 256  # as many tokens as the default primer has with a real vocabulary, about
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends ``make_up_weights`` to workers
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz      ,."))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A text and the ids that it is tokenised to."""

    text: str
    ids: list[int]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model runs and how."""
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="a model of this shape, weights made up")
    parser.add_argument("--model", help="directory or hub id of a model with weights, in place of --shape")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON: further arguments of vLLM")
    parser.add_argument("--memory-bytes", type=int, help="most bytes of chunks kept in memory")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--question-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results are written here as they come")
    parser.add_argument("--plot", type=Path, help="with --plot-from: the picture to draw")
    parser.add_argument("--plot-from", type=Path, metavar="JSON", help="measure nothing, draw these results")


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, those of :func:`add_options` checked."""
    options = parser.parse_args()
    if (options.plot is None) != (options.plot_from is None):
        parser.error("--plot and --plot-from go together")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they belong into the results."""
    import vllm

    left_out = ("json", "plot", "plot_from", "model", "shape")
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    return {"model": title(options), **settings, "vllm": vllm.__version__}


def title(options: argparse.Namespace) -> str:
    """What the model is called in results."""
    return Path(options.model).name if options.model else f"random {options.shape}"


def prepare_model(options: argparse.Namespace, directory: Path) -> tuple[str, dict[str, Any], str | None]:
    """The model to run, made in an empty directory unless the user gave one.

    Returns:
        Its name, arguments of vLLM that it needs, and the primer of its chunks (None: the default one).
    """
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {"gpu_memory_utilization": 0.8 if current_platform.is_cuda() else 0.5}
    if options.model:
        return options.model, arguments, None
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from cacheblend_rag.primer import DEFAULT_PRIMER

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    shape = {"max_position_embeddings": 131072, "dtype": "bfloat16", **SHAPES[options.shape]}
    config = AutoConfig.for_model("llama", bos_token_id=None, eos_token_id=EOS, **shape)
    config.save_pretrained(directory)
    return str(directory), {"load_format": "dummy", **arguments}, DEFAULT_PRIMER[:PRIMER_LETTERS]


def make_up_weights(worker: Any) -> None:
    """Make up weights in a worker, of a size with which attention picks and chooses.

    Those that vLLM makes up are so small that all tokens look alike, and the first ones would be recomputed.
    """
    import torch

    with torch.inference_mode():
        generator = torch.Generator(worker.device).manual_seed(0)
        for name, parameter in worker.get_model().named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def random_chunk(tokenizer: Any, tokens: int, rng: np.random.Generator) -> Chunk:
    """Random words of random letters, as many as give some number of tokens.

    Raises:
        RuntimeError: the tokenizer splits the text otherwise, wherever it is cut.
    """
    for _ in range(100):
        text = "".join(rng.choice(LETTERS, size=8 * tokens))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            return Chunk(text, ids)
    raise RuntimeError(f"found no text that this tokenizer splits into {tokens} tokens")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns, the first one to the left; needs no package beyond Python's own."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        first, *others = (
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        say("  ".join([first, *others]).rstrip())
