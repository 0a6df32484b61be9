"""Finds out on the loaded model itself whether it can be blended.

What a blend relies on is tested, not looked up by name: a pass over rows with gaps must give what a pass over all rows
gives, and keys shifted by some positions, read from the paged cache and written to it, must be those computed there, in
every layer. It runs before the engine serves anything, in blocks that nobody uses yet; so does what measures how fast
the model prefills.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from cacheblend_rag.blending import blend_passes
from cacheblend_rag.chunks import ChunkKV, ChunkScope, ModelFingerprint
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import UnsupportedModelError
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.matching import Segment
from cacheblend_rag.store.codecs import encode, stored_dtype
from cacheblend_rag.vllm.forward import PagedForward, PromptRows, run_rows, slot_mapping
from cacheblend_rag.vllm.model import PagedModel
from cacheblend_rag.vllm.packing import run_blends

if TYPE_CHECKING:
    from cacheblend_rag.vllm.kernel_passes import KernelPasses

logger = logging.getLogger(__name__)

# Long enough for rows with gaps between them, short enough to cost nothing.
_TOKENS = 24
_SHIFT = 7
# Shares of the largest value, for what one layer computes. Below is rounding; a wrong mask or rotation gives errors
# near 1, through all layers too, where rounding (of quantised activations most) adds up.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_FLOAT8_TOLERANCE = 0.12  # a key is rounded once where it is computed, twice where it is shifted
_THROUGH_LAYERS = 5
_WRONG = 100.0  # far from any key or value
_BEYOND = 1e6  # times the largest key: beyond any error that means something
_PASSES = (32, 128, 512, 2048)  # rows: more gain little
_MOST_SECONDS = 1.0  # that a start waits for them
_MATCHED, _ASKED = 256, 32  # tokens of a short prompt
_GAIN = 0.9


@torch.inference_mode()
def probe(model: PagedModel) -> None:
    """Try what a blend relies on.

    Raises:
        UnsupportedModelError: it can't be blended; the message gives the reason.
    """
    name = type(model.model).__name__
    try:
        errors = _errors(model)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever foreign code does with rows it doesn't expect
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UnsupportedModelError(f"{name} can't be blended: it can't be run on chosen tokens ({reason})") from error
    for what, (miss, share) in errors.items():
        if not miss < share * _tolerance(model):  # NaN too
            raise UnsupportedModelError(f"{name} can't be blended: {what} (error {miss:.1%})")


@torch.inference_mode()
def measure_shift(model: PagedModel) -> tuple[float, ...]:
    """How far shifted keys are from those computed there, in each layer, as a share of the layer's largest key.

    Returns:
        Finite numbers, which JSON can carry: a million where a key is NaN. Empty if it can't be told: nothing depends
        on it but what the doctor shows.
    """
    try:
        moved = _computed_at(model, _SHIFT)
        shifted = _shifted(model, _computed_at(model, 0), _text(model)[2])
        return tuple(_share(one[0], other[0]) for one, other in zip(shifted, moved, strict=True))
    except Exception:  # out of memory, perhaps
        logger.warning("the shift of keys could not be measured: the doctor will not show it", exc_info=True)
        return ()


def _computed_at(model: PagedModel, first: int) -> torch.Tensor:
    """The KV of the text as the model computes it where its first token is at some position.

    Raises:
        RuntimeError: on some rank it could not be computed: none goes on to the next pass, where all take part.
    """
    fault: Exception | None = None
    try:
        token_ids, places, block_ids = _text(model)
        run_rows(model, token_ids, places, places + first, torch.tensor(block_ids, device=model.kv.device))
        kv = PagedForward(model, token_ids, block_ids, 0).read(0, _TOKENS)
    except Exception as error:
        fault = error
    if any(model.agree([fault is not None])):
        raise RuntimeError("the KV of a text could not be computed") from fault
    return kv


def _share(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest value, which may be 0; always finite."""
    miss = float((got.float() - expected.float()).abs().max())
    share = miss / max(float(expected.float().abs().max()), torch.finfo(torch.float32).tiny)
    return share if share < _BEYOND else _BEYOND  # NaN too


@torch.inference_mode()
def probed_kernel_passes(model: PagedModel, gpu_bytes: int, codec: str) -> KernelPasses | None:
    """The fast way to run scattered rows, if every rank can have it and it gives what the simple way gives.

    Ranks would not choose the same tokens if some had it and some not: their number is rounded to what a graph holds.

    Args:
        model: On a GPU.
        gpu_bytes: Most bytes of chunks that are kept in the GPU's memory.
        codec: How chunk KV is kept.
    """
    try:
        from cacheblend_rag.vllm.kernel_passes import make_kernel_passes  # needs Triton
    except ImportError as error:
        logger.warning("blending runs without its own GPU kernels: %s", error)
        return None
    passes = make_kernel_passes(model, gpu_bytes)
    if any(model.agree([passes is None])) or passes is None:
        return None
    fault = _kernel_fault(model, passes, codec)
    if fault:
        logger.warning("blending runs without its own GPU kernels: %s", fault)
    return None if any(model.agree([bool(fault)])) else passes


@torch.inference_mode()
def measure_prefill(model: PagedModel) -> float | None:
    """What plain prefill takes at least, in seconds a token; None if it can't be told.

    Passes grow as long as that makes a token cheaper: short ones wait for the weights, or for the host. Attention over
    a long prompt comes on top.
    """
    longest = min((model.kv.num_blocks - 1) * model.kv.block_size, model.max_rows, len(model.cos_sin))
    seconds, since = float("inf"), time.perf_counter()
    for rows in _PASSES:
        before, failed = seconds, False
        try:
            seconds = min(seconds, _pass_seconds(model, min(rows, longest)) / min(rows, longest))
        except Exception:  # out of memory, perhaps: nothing depends on it but how long requests wait for disks
            logger.debug("prefill could not be timed", exc_info=True)
            failed = True
        is_over = time.perf_counter() - since > _MOST_SECONDS or seconds > before * _GAIN
        failed, is_over = model.agree([failed, is_over])
        if failed:
            return None
        if is_over:
            break
    return seconds


@torch.inference_mode()
def measure_blend(model: PagedModel, prefill_seconds: float) -> float | None:
    """What a blend takes beside the tokens that it computes, in seconds; None if it can't be told.

    A short prompt is blended by the default policy: its passes wait for the weights, or for the host. The last row's
    pass, which plain prefill does not need, counts too.

    Args:
        model: As it will blend.
        prefill_seconds: See :func:`measure_prefill`.
    """
    tokens = _MATCHED + _ASKED
    if any(model.agree([tokens * prefill_seconds > _MOST_SECONDS])):
        return 0.0  # next to what tokens take, it is nothing
    if tokens > min((model.kv.num_blocks - 1) * model.kv.block_size, model.max_rows, len(model.cos_sin)):
        return None
    kv = model.kv
    scope = ChunkScope("probe", ModelFingerprint("", "", "", "", ""), ())
    zeros = torch.zeros(
        (len(model.layers), 2, _MATCHED, kv.num_kv_heads, kv.head_dim), dtype=stored_dtype("raw", kv.dtype)
    )
    chunk = ChunkKV("timed", scope, np.zeros(_MATCHED, np.int32), 0, zeros)
    if model.kernel_passes is not None:
        model.kernel_passes.stream.pinned.pin(chunk)  # before the clock starts, as chunks are when they come to memory
    took = []
    for _ in range(3):  # the first one may have to choose kernels
        started = time.perf_counter()
        computed = 0
        try:
            computed = _blend_once(model, chunk)
        except Exception:  # nothing depends on it but which short prompts are blended
            logger.debug("a blend could not be timed", exc_info=True)
        if any(model.agree([not computed])):
            return None
        took.append(time.perf_counter() - started)
    return max(0.0, min(took) - computed * prefill_seconds)


def _blend_once(model: PagedModel, chunk: ChunkKV) -> int:
    """Blend a chunk and a question behind it; returns how many rows that ran."""
    tokens = len(chunk.ids) + _ASKED
    vocabulary = model.vllm_config.model_config.get_vocab_size()
    token_ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    block_ids = list(range(1, -(-tokens // model.kv.block_size) + 1))
    segment = Segment(0, len(chunk.ids), chunk.key, 0)
    pieces, passes = [(chunk, segment)], model.kernel_passes
    fault: Exception | None = None
    try:
        forward = PagedForward(model, token_ids, block_ids, 0)
        if passes is None or not passes.stream.place([(pieces, forward.block_ids)]):
            forward.place(pieces)
    except Exception as error:  # out of memory, perhaps: then no rank goes on to where all take part
        fault = error
    if any(model.agree([fault is not None])):
        raise RuntimeError("cached KV could not be put in place") from fault
    layout = PromptLayout.build(tokens, [segment])
    (end,) = run_blends(model, [(forward, blend_passes(forward, layout, BlendConfig(mode="blend")))])
    if isinstance(end, Exception):
        raise end
    if passes is not None:
        passes.stream.wait_for_all()
    last = torch.tensor([tokens - 1], device=model.kv.device)
    run_rows(model, token_ids.to(model.kv.device)[last], last, last, forward.block_ids)[-1].cpu()
    return 2 * _ASKED + len(end.recomputed)


def _pass_seconds(model: PagedModel, rows: int) -> float:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.vllm_config.model_config.get_vocab_size()
    token_ids = torch.randint(vocabulary, (rows,), generator=generator).to(model.kv.device)
    places = torch.arange(rows, device=model.kv.device)
    block_ids = torch.arange(1, -(-rows // model.kv.block_size) + 1, device=model.kv.device)
    took = []
    for _ in range(2):  # the first one may have to choose kernels
        started = time.perf_counter()
        run_rows(model, token_ids, places, places, block_ids)[-1].cpu()
        took.append(time.perf_counter() - started)
    return min(took)


def _kernel_fault(model: PagedModel, passes: KernelPasses, codec: str) -> str:
    """What is wrong with the kernels; empty if nothing is."""
    model.kernel_passes = passes
    try:
        errors = _errors(model)
        by_kernels = _kernel_errors(model, passes, codec)
    except Exception as error:  # the engine starts without them then
        logger.debug("trying the kernels failed", exc_info=True)
        return f"trying them failed ({(str(error) or repr(error)).splitlines()[0]})"
    finally:
        model.kernel_passes = None
    # What a codec rounds is in none of the others.
    coarse = _tolerance(model) if codec == "raw" else max(_tolerance(model), _FLOAT8_TOLERANCE)
    for found, tolerance in ((errors, _tolerance(model)), (by_kernels, coarse)):
        for what, (miss, share) in found.items():
            if not miss < share * tolerance:
                return f"with them, {what} (error {miss:.1%})"
    return ""


def _kernel_errors(model: PagedModel, passes: KernelPasses, codec: str) -> dict[str, tuple[float, int]]:
    """As :func:`_errors`: every third row of a text, in all layers, by each of the kernels.

    The other rows are on their way to the cache when the pass begins, and what is there until they come is wrong; so is
    what comes for the rows of the pass. A pass that did not wait for each layer, or for which one came too late, shows.
    """
    device, kv = model.kv.device, model.kv
    if not passes.stream.takes_float8:  # such chunks are placed without the kernels
        codec = "raw"
    errors = {}
    for rows in (_TOKENS // 3, 2 * passes.most_watched):
        tokens = min(3 * rows, (kv.num_blocks - 1) * kv.block_size, model.max_rows)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.vllm_config.model_config.get_vocab_size()
        token_ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        block_ids = torch.arange(1, -(-tokens // kv.block_size) + 1, device=device)
        places = torch.arange(tokens, device=device)
        run_rows(model, token_ids, places, places, block_ids)
        forward = PagedForward(model, token_ids, block_ids.tolist(), 0)
        whole = forward.read(0, tokens)
        some = places[1::3]
        coming = whole.clone()
        coming[:, :, some] = _WRONG
        scope = ChunkScope("probe", ModelFingerprint("", "", "", "", ""), ())
        encoded, scales = encode(coming.cpu(), codec)
        chunk = ChunkKV(f"probe-{tokens}", scope, np.zeros(tokens, np.int32), 0, encoded, scales)
        wrong = torch.full((tokens, kv.num_kv_heads, kv.head_dim), _WRONG, dtype=kv.dtype, device=device)
        for layer in range(len(model.layers)):
            kv.write(layer, wrong, wrong, slot_mapping(places, block_ids, kv.block_size))
        passes.stream.pinned.pin(chunk)  # here, or it would take so long that nothing is left to wait for
        pieces = [(chunk, Segment(0, tokens, chunk.key, 0))]
        if not passes.stream.place([(pieces, forward.block_ids)]):
            raise RuntimeError("the staging buffer is too small")
        passes.recompute([PromptRows(token_ids, places, some, block_ids)])
        miss = _relative(forward.read(0, tokens)[:, :, 1::3], whole[:, :, 1::3])
        errors[f"a pass over {len(some)} of {tokens} tokens changes what it computes"] = (miss, _THROUGH_LAYERS)
    return errors


def _errors(model: PagedModel) -> dict[str, tuple[float, int]]:
    """What may be wrong, by how much it is, and how many times the tolerance it may be."""
    token_ids, places, block_ids = _text(model)
    forward = PagedForward(model, token_ids, block_ids, 0)
    table = torch.tensor(block_ids, device=model.kv.device)

    moved_hidden = run_rows(model, token_ids, places, places + _SHIFT, table)
    moved = forward.read(0, _TOKENS)
    hidden = run_rows(model, token_ids, places, places, table)
    kv = forward.read(0, _TOKENS)
    some = places[1::2]
    gaps = run_rows(model, token_ids[some], some, some, table)

    shifted = _shifted(model, kv, block_ids)
    return {
        "its keys can't be shifted to other positions": (_relative(shifted[0, 0], moved[0, 0]), 1),
        "a pass over some tokens changes what it computes": (_relative(gaps, hidden[1::2]), _THROUGH_LAYERS),
        "what it computes depends on absolute positions": (_relative(moved_hidden, hidden), _THROUGH_LAYERS),
        "keys of deeper layers can't be shifted": (_relative(shifted, moved), _THROUGH_LAYERS),
    }


def _text(model: PagedModel) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens of some text, int64 ``[tokens]``, their places, and blocks with room for twice as many."""
    device = model.kv.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.vllm_config.model_config.get_vocab_size()
    token_ids = torch.randint(vocabulary, (_TOKENS,), generator=generator).to(device)
    blocks = -(-2 * _TOKENS // model.kv.block_size)
    return token_ids, torch.arange(_TOKENS, device=device), list(range(1, blocks + 1))  # block 0 is the null block


def _shifted(model: PagedModel, kv: torch.Tensor, block_ids: list[int]) -> torch.Tensor:
    """The KV of the text as a chunk is put some positions further on."""
    scope = ChunkScope("probe", ModelFingerprint("", "", "", "", ""), ())
    chunk = ChunkKV("", scope, np.zeros(_TOKENS, np.int32), 0, kv.cpu())
    later = PagedForward(model, torch.zeros(2 * _TOKENS, dtype=torch.int64), block_ids, 0)
    later.place([(chunk, Segment(_SHIFT, _TOKENS, "", 0))])
    return later.read(_SHIFT, _SHIFT + _TOKENS)


def _tolerance(model: PagedModel) -> float:
    return _FLOAT8_TOLERANCE if model.kv.is_float8 else _TOLERANCE[model.kv.dtype]


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
