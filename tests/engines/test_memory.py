"""What an engine says of memory before it needs it, and when there is none."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cacheblend_rag
from cacheblend_rag import memory_plan
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_model import LoadedModel
from cacheblend_rag.errors import CacheBlendError, EngineMemoryError
from cacheblend_rag.memory_plan import MemoryPlan, explained, free_bytes, room_for_chunks, weight_bytes
from cacheblend_rag.store import open_store

from .conftest import Case, open_engine, random_text

CHUNKS = [random_text(seed, 150) for seed in range(4)]
CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture(scope="module")
def directory(random_models: dict[str, str]) -> str:
    return random_models["llama3-scaled"]


@pytest.fixture(scope="module")
def engine(directory: str) -> Iterator[TransformersEngine]:
    with open_engine(directory) as engine:
        engine.warm(CHUNKS)
        yield engine


def prompt(seed: int) -> str:
    return Case.prompt(Case(None, None, CHUNKS), seed)  # type: ignore[arg-type]


def test_weights_are_known_before_they_are_loaded(engine: TransformersEngine, directory: str, tmp_path: Path) -> None:
    loaded = sum(tensor.numel() for tensor in engine._loaded.model.state_dict().values())
    tied = engine._loaded.model.get_output_embeddings().weight is engine._loaded.model.get_input_embeddings().weight
    assert not tied  # or they are one tensor in the file
    assert weight_bytes(Path(directory), torch.float32) == 4 * loaded
    assert weight_bytes(Path(directory), torch.bfloat16) == 2 * loaded
    shutil.copytree(directory, tmp_path / "model")
    save_file({"all": torch.zeros(9)}, tmp_path / "model" / "consolidated.safetensors")  # the same once more
    assert weight_bytes(tmp_path / "model", torch.float32) == 4 * loaded


def test_weights_in_several_files(tmp_path: Path) -> None:
    for number in range(3):
        save_file({f"w{number}": torch.zeros(10, number + 1)}, tmp_path / f"model-{number}.safetensors")
    names = {f"w{number}": f"model-{number}.safetensors" for number in (0, 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert weight_bytes(tmp_path, torch.float16) == 2 * (10 + 20)


@pytest.mark.parametrize(
    "content", [None, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x08" + 7 * b"\0" + b"{}"]
)
def test_files_that_do_not_tell(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert weight_bytes(tmp_path, torch.float16) is None


def test_a_model_that_may_not_fit_is_told_of(
    directory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cacheblend_rag.engines.transformers_model.free_bytes", lambda device: 1000)
    open_engine(directory).close()
    told = r"the weights of .* take [\d.]+ MB as float32, and 0.0 MB are free on cpu: free some there, or change device"
    assert re.search(told, caplog.text)
    caplog.clear()
    open_engine(directory, engine_args={"low_cpu_mem_usage": True}).close()  # such as device_map: more than one device
    assert "are free on" not in caplog.text


def test_loading_without_room_is_one_clear_line(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(
        EngineMemoryError, match=r"out of memory loading '.*' on cpu: free some there, or change device"
    ):
        cacheblend_rag.load_engine(directory, dtype="float32", device="cpu")


def test_the_plan_is_told_at_start(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cacheblend_rag.engines.transformers_model.free_bytes", lambda device: 50 * 10**6)
    store = open_store(tmp_path, memory_bytes=40 * 10**6)
    with caplog.at_level(logging.INFO, "cacheblend_rag"), open_engine(directory, store=store) as engine:
        model, layers = engine._loaded.model, engine.num_layers
        token = 2 * layers * model.config.num_key_value_heads * model.config.head_dim * 4
        (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory on cpu")]
        assert f"KV {token:,} bytes a token" in line
        assert "chunks up to 40.0 MB of the host's memory, 50.0 MB free" in line
        plan = engine._loaded.plan_memory(40 * 10**6)
        assert plan.weights == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        kv = engine._loaded.empty_kv(7)
        assert plan.token * 7 == kv.nbytes


def test_the_longest_prompt_that_fits() -> None:
    plan = MemoryPlan(weights=GB, token=10**5, context_window=10**6, chunks=2 * GB, free=5 * GB, on_host=True)
    assert plan.longest_prompt == 30_000
    assert "enough for one prompt of 30,000 tokens" in str(plan)
    on_gpu = MemoryPlan(GB, 10**5, 10**6, 2 * GB, 5 * GB, on_host=False)
    assert on_gpu.longest_prompt == 50_000  # chunks are elsewhere
    short = MemoryPlan(GB, 10**5, 1000, 2 * GB, 5 * GB, on_host=True)
    assert short.longest_prompt == 1000
    assert "enough" not in str(short)
    assert MemoryPlan(GB, 10**5, 1000, 6 * GB, 5 * GB, on_host=True).longest_prompt == 0
    assert MemoryPlan(GB, 10**5, 1000, 6 * GB, None, on_host=True).longest_prompt is None


def test_free_memory_is_what_a_container_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:        50 kB\nSwapTotal: 0 kB\n")
    monkeypatch.setattr(memory_plan, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory_plan, "_CGROUP", tmp_path)
    assert free_bytes(CPU) == 50 * 1024
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 50 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 500\ninactive_file 1500\n")
    assert free_bytes(CPU) == 9000  # what files have in memory is given back when it is needed
    monkeypatch.setattr(memory_plan, "_MEMINFO", tmp_path / "none")
    assert free_bytes(CPU) is None


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError("Unable to allocate 3.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("something else"), False),
    ],
)
def test_only_memory_errors_are_explained(error: Exception, is_memory: bool) -> None:
    with pytest.raises(EngineMemoryError if is_memory else type(error)) as raised, explained("reading", "do this"):
        raise error
    if is_memory:
        assert str(raised.value) == "out of memory reading: do this"
        assert isinstance(raised.value, CacheBlendError)
    else:
        assert raised.value is error


def test_out_of_memory_is_one_clear_line_and_the_engine_goes_on(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: LoadedModel, tokens: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "empty_kv", full)
        with pytest.raises(
            EngineMemoryError, match=r"out of memory reading a prompt of \d+ tokens: shorten the prompt"
        ):
            engine.generate(prompt(0), max_tokens=1)
        with pytest.raises(EngineMemoryError, match=r"out of memory prefilling a chunk of \d+ tokens: split it"):
            engine.warm(["a chunk that is new"])
    assert engine.generate(prompt(0), max_tokens=1).stats.decision == "blend"


def test_a_blend_without_room_is_prefilled(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the error is gone: what it holds of the blend would not leave room for prefill, either."""
    plain, held = LoadedModel.empty_kv, list[Any]()

    def full_once(self: LoadedModel, tokens: int) -> torch.Tensor:
        if not held:
            held.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert sys.exc_info() == (None, None, None)
        return plain(self, tokens)

    monkeypatch.setattr(LoadedModel, "empty_kv", full_once)
    answer = engine.generate(prompt(1), max_tokens=2)
    assert (answer.stats.decision, answer.stats.reason) == ("prefill", "blending failed, see the log")
    monkeypatch.undo()
    assert answer.token_ids == engine.generate(prompt(1), max_tokens=2, blend={"mode": "off"}).token_ids


def test_what_vllm_leaves_on_a_gpu() -> None:
    margin = 256 << 20
    # 80 of which vLLM has planned for 72 and taken 60: 12 of what is free are still to come.
    assert room_for_chunks(20 * GB, free=20 * GB, total=80 * GB, utilization=0.9) == 8 * GB - margin
    assert room_for_chunks(5 * GB, free=20 * GB, total=80 * GB, utilization=0.9) == 5 * GB
    # It has taken all that it planned for, and others some.
    assert room_for_chunks(20 * GB, free=6 * GB, total=80 * GB, utilization=0.9) == 6 * GB - margin
    assert room_for_chunks(20 * GB, free=6 * GB, total=80 * GB, utilization=1.0) == 0
