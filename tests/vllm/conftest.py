"""Real vLLM on the CPU, in this process, in float32, with its KV cache poisoned."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Read by vLLM when it is imported. One process: tests reach into scheduler and worker.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)
pytest.importorskip("vllm", reason="vLLM is not installed: run `make vllm`")

from cacheblend_rag import BlendConfig, Generation, policies
from cacheblend_rag.budget import Budget
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.engines.vllm import VllmEngine
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.matching import Segment
from cacheblend_rag.passes import Selection
from cacheblend_rag.store import ChunkStore, MemoryStore
from cacheblend_rag.vllm.forward import PagedForward, run_rows

from ..conftest import policies_to_test

BLEND = BlendConfig(mode="blend")
PRIMER = "Some passages follow.\n\n"
KV_TOKENS = 8192  # four times the longest prompt
# Head size 32 and up is what vLLM's attention takes on CPU.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


@dataclasses.dataclass
class Running:
    """An engine and what it was opened with."""

    engine: VllmEngine
    key: object


@pytest.fixture(autouse=True, scope="session")
def _models_inspected_here() -> Iterator[None]:
    """vLLM looks at each kind of model in a process of its own, which imports all of vLLM again. That is for CUDA."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect(), raising=False)
        yield


class Engines:
    """One engine at a time: vLLM keeps its connector in a global of the process."""

    def __init__(self) -> None:
        self._running: Running | None = None

    def get(self, model: str, store: Path | ChunkStore | None = None, **changes: Any) -> VllmEngine:
        """An engine with these settings: the one that runs, if it has them."""
        key = (model, store, repr(changes))
        if self._running is None or self._running.key != key:
            self.close()
            self._running = Running(open_engine(model, store, **changes), key)
        return self._running.engine

    def close(self) -> None:
        """End the one that runs."""
        if self._running is not None:
            self._running.engine.close()
            self._running = None


def open_engine(model: str, store: Path | ChunkStore | None = None, **changes: Any) -> VllmEngine:
    """An engine in float32; ``engine_args`` are added to eager mode and a short context."""
    engine_args = {"enforce_eager": True, "max_model_len": 2048, **changes.pop("engine_args", {})}
    if not torch.cuda.is_available():  # a small KV cache: all of it is poisoned again and again
        engine_args.setdefault("num_gpu_blocks_override", KV_TOKENS // engine_args.get("block_size", 128))
    settings: dict[str, Any] = {
        "blend": BLEND,
        "dtype": "float32",
        "device": "auto",
        "primer": PRIMER,
        "namespace": "test",
        "codec": "raw",
        "chat_template": None,
        **changes,
    }
    engine = VllmEngine(
        model, store=str(store) if isinstance(store, Path) else store, engine_args=engine_args, **settings
    )
    poison(engine)
    connectors(engine)[0]._scheduler._overhead = 0  # a matter of timing: what is blended must not depend on it
    return engine


def runner(engine: VllmEngine) -> Any:
    """The model runner of an engine in this process."""
    return engine._thread.engine.model_executor.driver_worker.worker.model_runner


def scheduler(engine: VllmEngine) -> Any:
    """The scheduler of an engine in this process."""
    return engine._thread.engine.engine_core.engine_core.scheduler


def connectors(engine: VllmEngine) -> tuple[Any, Any]:
    """The connector in the scheduler, and that in the worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return scheduler(engine).connector, get_kv_transfer_group()


def poison(engine: VllmEngine) -> None:
    """Make every slot that is read before it is written show. Not with NaN: vLLM's kernel multiplies what lies behind
    the end of a block by zero."""
    for cache in runner(engine).kv_caches:
        if cache.element_size() == 1:  # 8-bit floats: their largest
            cache.view(torch.uint8)[1:].fill_(0x7E)
        else:
            cache[1:].fill_(1e4)


def forget_prefixes(engine: VllmEngine) -> None:
    """Empty vLLM's prefix cache, and poison what was in it."""
    assert scheduler(engine).reset_prefix_cache()
    poison(engine)


def together(engine: VllmEngine, requests: list[tuple[str | list[int], dict[str, Any]]]) -> list[Generation]:
    """Answers to prompts with their arguments, all of which are there before vLLM takes its next step."""
    go = threading.Event()
    engine._thread._commands.put(lambda inner: go.wait())
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = []
        for prompt, arguments in requests:
            waiting = len(engine._thread._requests)
            futures.append(pool.submit(engine.generate, prompt, **arguments))
            while len(engine._thread._requests) == waiting:  # one after the other: the order counts
                time.sleep(0.001)
        go.set()
        return [future.result() for future in futures]


@dataclasses.dataclass
class Case:
    """An engine and the texts that are warm."""

    engine: VllmEngine
    chunks: list[str]
    passages: int = 4  # in a prompt

    def prompt(self, seed: int, *, chunks: int | None = None) -> str:
        """Some of the chunks in random order, the second without its head, with something around each of them."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.chunks))[: chunks or self.passages]
        passages = [self.chunks[n][25 if i == 1 else 0 :] for i, n in enumerate(order)]
        parts = [f"Passage {i}: {text}\n\n" for i, text in enumerate(passages)]
        return (
            "Read these passages, then answer.\n"
            + "".join(parts)
            + f"Question {seed}: what comes next, and why?\nAnswer:"
        )

    @property
    def policies(self) -> list[str]:
        """Policies that are tested on this model."""
        return policies_to_test(self.engine.num_layers)

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt."""
        return self.engine._prompt_ids(prompt)

    def logits(self, prompt: str | list[int], **blend: Any) -> torch.Tensor:
        """Logits of the first token, float32 ``[vocabulary]``, with nothing in the prefix cache."""
        forget_prefixes(self.engine)
        with recorded_logits(self.engine) as logits:
            answer = self.engine.generate(prompt, max_tokens=1, blend=blend)
        assert "blending failed" not in answer.stats.reason
        return logits[-1][0]  # of the last step: those before it end within the prompt


def alone(case: Case, prompts: list[str], **settings: Any) -> list[Generation]:
    """Each prompt by itself, with nothing in the prefix cache."""
    answers = []
    for prompt in prompts:
        forget_prefixes(case.engine)
        answers.append(case.engine.generate(prompt, **settings))
    forget_prefixes(case.engine)
    return answers


def assert_alike(answers: list[Generation], expected: list[Generation], tolerance: float = 1e-4) -> None:
    """The same tokens, with the same log-probabilities."""
    for answer, other in zip(answers, expected, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.logprobs is not None and other.logprobs is not None
        for a, b in zip(answer.logprobs, other.logprobs, strict=True):
            assert all(abs(a[token] - b[token]) < tolerance for token in a.keys() & b.keys())


@contextlib.contextmanager
def recorded_logits(engine: VllmEngine) -> Iterator[list[torch.Tensor]]:
    """The logits of every step of the engine."""
    model = runner(engine).model
    found: list[torch.Tensor] = []
    compute = model.compute_logits

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = compute(*args, **kwargs)
        found.append(logits.float().clone())
        return logits

    model.compute_logits = record
    try:
        yield found
    finally:
        del model.compute_logits


class _RandomChoice:
    """A policy that chooses anything it may."""

    reads_question = True
    adapts = False

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def cost(self, *args: object) -> float:
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        yield from ()
        order = torch.randperm(len(layout.matched), generator=self._generator)[: budget.ceiling]
        return "random", layout.matched[order].sort().values


@pytest.fixture
def random_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three policies of that kind, by the side of ours."""
    for seed in range(3):
        monkeypatch.setitem(policies._POLICIES, f"random{seed}", _RandomChoice(seed))


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Everything that policies choose."""
    found: list[torch.Tensor] = []
    for policy in list(policies._POLICIES.values()):

        def select(*args: Any, original: Any = policy.select) -> Selection:
            name, chosen = yield from original(*args)
            found.append(chosen)
            return name, chosen

        monkeypatch.setattr(policy, "select", select)
    return found


@torch.inference_mode()
def run_moved(engine: VllmEngine, ids: list[int], shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and KV of some tokens by the engine's own model when they stand at ``shift ..``, with nothing
    before them."""
    model = connectors(engine)[1]._worker._model
    blocks = torch.arange(1, 2 + len(ids) // model.kv.block_size)
    forward = PagedForward(model, torch.tensor(ids), blocks.tolist(), 0)
    hidden = []
    for places in torch.arange(len(ids), device=model.kv.device).split(model.max_rows):
        hidden.append(run_rows(model, forward._token_ids[places], places, places + shift, forward.block_ids))
    return torch.cat(hidden), forward.read(0, len(ids))


def computed_kv(engine: VllmEngine, ids: list[int], shift: int) -> torch.Tensor:
    """The KV of some tokens when they stand at ``shift ..``."""
    return run_moved(engine, ids, shift)[1].cpu()


@torch.inference_mode()
def moved_logits(engine: VllmEngine, ids: list[int], shift: int) -> torch.Tensor:
    """The logits after some tokens when all of them stand ``shift`` positions later."""
    hidden = run_moved(engine, ids, shift)[0]
    logits: torch.Tensor = runner(engine).model.compute_logits(hidden[-1:])[0].float()
    return logits


def inject_exact_kv(engine: VllmEngine, ids: list[int], shift: int, monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """Let the workers read KV captured from the very prompt, all of it moved, in place of the chunks'; its matches."""
    scheduler_side, worker_side = connectors(engine)
    library = scheduler_side._scheduler._library
    segments: list[Segment] = library.match(np.asarray(ids, np.int32))
    kv = computed_kv(engine, ids, shift)
    store = MemoryStore(1 << 34)
    for segment in segments:
        chunk_ids = library.store.ids(segment.key)
        first = segment.start - segment.offset
        exact = kv[:, :, first : first + len(chunk_ids)].contiguous()
        store.put(ChunkKV(segment.key, engine.scope, chunk_ids, first + shift, exact))
    worker = worker_side._worker
    monkeypatch.setattr(worker, "_store", store)
    monkeypatch.setattr(worker._meter, "_store", store)
    if (passes := worker._model.kernel_passes) is not None:  # which keeps chunks by their keys
        kept = passes.stream._resident
        forgotten = type(kept)(kept._device)
        forgotten.max_bytes = kept.max_bytes
        monkeypatch.setattr(passes.stream, "_resident", forgotten)
    return segments


def random_text(seed: int, length: int) -> str:
    """Random words of random letters."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz      ,."), size=length)
    return "".join(letters)


CHUNKS = [random_text(seed, 130 + 10 * seed) for seed in range(6)]


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Opens engines, one at a time."""
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def model(make_model: Callable[..., str]) -> str:
    """A small random Llama."""
    return make_model("llama3-scaled", **WIDE)


@pytest.fixture
def case(engines: Engines, model: str) -> Case:
    """The small random Llama, six chunks warm, nothing in the prefix cache."""
    engine = engines.get(model)
    engine.warm(CHUNKS)
    forget_prefixes(engine)
    return Case(engine, CHUNKS)
