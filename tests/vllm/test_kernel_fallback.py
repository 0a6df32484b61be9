"""Where the kernels can't be had, the engine starts without them and says so once."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cacheblend_rag.vllm import kernel_passes, probe

CUDA = {
    "device": torch.device("cuda"),
    "dtype": torch.bfloat16,
    "is_float8": False,
    "head_dim": 128,
    "is_strided": True,
}


def make_model(**changes: Any) -> Any:
    """As much of a model as is looked at before anything runs."""
    return SimpleNamespace(
        kv=SimpleNamespace(**{**CUDA, **changes}),
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(enforce_eager=True)),
        agree=lambda failed: failed,
        kernel_passes=None,
    )


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "its KV cache is of torch.float64"),
        ({"head_dim": 512}, "its attention heads have 512 dimensions, more than 256"),
        ({"is_strided": False}, "its KV cache is laid out in an unknown way"),
    ],
)
def test_what_the_kernels_can_not_do(changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert probe.probed_kernel_passes(make_model(**changes), 0, "raw") is None
    assert [reason in message for message in warnings_of(caplog)] == [True]


@pytest.mark.parametrize(
    ("capability", "is_float8", "reason"),
    [((7, 5), False, "the GPU is older than Ampere"), ((8, 6), True, "the GPU has no 8-bit floats")],
)
def test_a_gpu_that_is_too_old(
    capability: tuple[int, int],
    is_float8: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert probe.probed_kernel_passes(make_model(is_float8=is_float8), 0, "raw") is None
    assert [reason in message for message in warnings_of(caplog)] == [True]


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 MiB.\nAnd more lines")

    monkeypatch.setattr(kernel_passes, "KernelPasses", full)
    assert probe.probed_kernel_passes(make_model(), 0, "raw") is None
    (message,) = warnings_of(caplog)
    assert message.endswith("CUDA out of memory. Tried to allocate 512 MiB.")


@pytest.mark.parametrize("errors", [{"something differs": (0.9, 1)}, {"something is NaN": (float("nan"), 1)}, None])
def test_kernels_that_give_something_else(
    errors: dict[str, tuple[float, int]] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def try_them(*args: Any) -> dict[str, tuple[float, int]]:
        if errors is None:
            raise RuntimeError("no kernel image is available")
        return errors

    monkeypatch.setattr(
        kernel_passes, "KernelPasses", lambda *args, **options: SimpleNamespace(stream=SimpleNamespace())
    )
    monkeypatch.setattr(probe, "_errors", lambda model: {"fine": (0.0, 1)})
    monkeypatch.setattr(probe, "_kernel_errors", try_them)
    model = make_model()
    assert probe.probed_kernel_passes(model, 0, "raw") is None
    assert model.kernel_passes is None
    assert len(warnings_of(caplog)) == 1


def test_all_ranks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = SimpleNamespace(stream=SimpleNamespace())
    monkeypatch.setattr(kernel_passes, "KernelPasses", lambda *args, **options: passes)
    monkeypatch.setattr(probe, "_errors", lambda model: {})
    monkeypatch.setattr(probe, "_kernel_errors", lambda model, passes, codec: {})
    model = make_model()
    assert probe.probed_kernel_passes(model, 0, "raw") is passes
    asked: list[list[bool]] = []

    def another_rank_fails(failed: list[bool]) -> list[bool]:
        asked.append(failed)
        return [len(asked) == 2]  # it could make them, but they give something else there

    model.agree = another_rank_fails
    assert probe.probed_kernel_passes(model, 0, "raw") is None
    assert asked == [[False], [False]]
