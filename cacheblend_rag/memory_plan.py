"""What an engine will need of a device's memory, before it needs it, and errors that say which setting to change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cacheblend_rag.errors import EngineMemoryError

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_MARGIN = 256 << 20  # of a GPU: memory is not taken to the last byte
_CPU_FULL = "can't allocate memory"  # what torch's CPU allocator says: its error has no class of its own


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the embedded engine needs, in bytes.

    Attributes:
        weights: Of the model.
        token: KV of one token, of all layers.
        context_window: Tokens of the longest prompt with its answer; as much KV as that is held for each answer.
        chunks: Most chunk KV that the store keeps in the host's memory.
        free: What is free on the device now, the weights being there; None if the system doesn't tell.
        on_host: Whether the device is the CPU.
    """

    weights: int
    token: int
    context_window: int
    chunks: int
    free: int | None
    on_host: bool

    @property
    def longest_prompt(self) -> int | None:
        """Tokens that fit; None if that isn't known."""
        if self.free is None:
            return None
        return min(self.context_window, max(self.free - self.chunks * self.on_host, 0) // self.token)

    def __str__(self) -> str:
        free = "" if self.free is None else f", {gigabytes(self.free)} free"
        if self.longest_prompt is not None and self.longest_prompt < self.context_window:
            free += f": enough for one prompt of {self.longest_prompt:,} tokens"
        longest = f"{gigabytes(self.token * self.context_window)} for {self.context_window:,}"
        return (
            f"weights {gigabytes(self.weights)}, KV {self.token:,} bytes a token ({longest}), "
            f"chunks up to {gigabytes(self.chunks)} of the host's memory{free}"
        )


def weight_bytes(directory: Path, dtype: torch.dtype) -> int | None:
    """Bytes of a model's weights as a dtype, by the headers of its safetensors files; None if these don't tell."""
    index, elements = directory / "model.safetensors.index.json", 0
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for name in names:
            header = _read_header(directory / name)
            elements += sum(math.prod(told["shape"]) for tensor, told in header.items() if tensor != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError):  # another format, or damaged: loading it will tell
        return None
    return elements * dtype.itemsize or None


def _read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: the length of some JSON, and the JSON."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is not whole")
        header: dict[str, Any] = json.loads(opened.read(length))
        return header


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None if the system doesn't tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what was freed
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    told = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(told["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, LookupError):  # no container, or none with a limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        of_files = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Pages of files count as used, and make room when it is needed.
        used -= int(of_files["active_file"]) + int(of_files["inactive_file"])
        free = min(free, limit - used)
    return free


@contextlib.contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into an error that says what to do.

    Args:
        what: What is being done.
        advice: What to change.

    Raises:
        EngineMemoryError: there was not enough memory, on a GPU or on the host.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_FULL in str(error)
        if not is_memory:
            raise
        raise EngineMemoryError(f"out of memory {what}: {advice}") from error


def room_for_chunks(wanted: int, free: int, total: int, utilization: float) -> int:
    """How many bytes of chunks a vLLM worker may keep on its GPU.

    vLLM has planned for a share of the GPU, and has not yet taken all of it: what a step needs comes and goes.

    Args:
        wanted: The setting ``gpu_bytes``.
        free: Bytes that are free on the GPU, vLLM's weights and KV cache being there.
        total: Bytes of the GPU.
        utilization: vLLM's ``gpu_memory_utilization``.
    """
    still_to_come = max(utilization * total - (total - free), 0)
    return min(wanted, max(int(free - still_to_come) - _MARGIN, 0))


def gigabytes(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
