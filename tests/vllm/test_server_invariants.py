"""I1, I2, I3, I6 and I7 on ``cacheblend serve`` in a process of its own, over HTTP, with a model of every kind; and
``cacheblend doctor``, which checks some of that, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from cacheblend_rag import Generation, load_engine
from cacheblend_rag.catalog import Catalog
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.cli import app
from cacheblend_rag.diagnostics import comparing, sweep
from cacheblend_rag.diagnostics.connected import OnServer
from cacheblend_rag.diagnostics.sweep import settings_to_try
from cacheblend_rag.engines.server import ServerEngine
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.matching import Segment
from cacheblend_rag.store import open_store

from .conftest import CHUNKS, MOE, PRIMER, WIDE, Case, Engines
from .servers import SERVE, serving

TOLERANCE = 1e-4  # largest absolute difference of log-probabilities, float32
TOP = 20  # log-probabilities that are compared at each token
# A server's start costs most. That real weights and every architecture are blended rightly is tested in process.
MODELS = ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("smollm2", "qwen2", "moe"))]


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, make_model: Callable[..., str]) -> str:
    if request.param == "smollm2":
        path: str = request.getfixturevalue("smollm2")
        return path
    return make_model(request.param, **WIDE, **(MOE if request.param == "moe" else {}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, directory: str) -> Path:
    return tmp_path_factory.mktemp("store") / "kv"


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, directory: str, store: Path, engines: Engines
) -> Iterator[ServerEngine]:
    engines.close()
    folder = tmp_path_factory.mktemp("served")
    (folder / "primer.txt").write_text(PRIMER)
    # No chunks in memory: what is on disk is what is read.
    options = ["--store", str(store), "--memory-gib", "0", "--primer", str(folder / "primer.txt"), "--mode", "blend"]
    options += ["--served-model-name", "model", "--max-model-len", "2048", "--max-logprobs", str(TOP)]
    with (
        serving([*SERVE, directory, *options], folder / "serve.log") as url,
        load_engine("model", engine="server", base_url=url) as engine,
    ):
        assert isinstance(engine, ServerEngine)
        yield engine


@pytest.fixture
def case(engine: ServerEngine) -> Case:
    engine.warm(CHUNKS)
    return Case(engine, CHUNKS)  # type: ignore[arg-type]  # only its texts are used


def answer(case: Case, prompt: str, **blend: object) -> Generation:
    return case.engine.generate(prompt, max_tokens=6, logprobs=TOP, blend=blend)


def difference(mine: Generation, theirs: Generation) -> float:
    """Between the log-probabilities of the first token."""
    assert mine.logprobs is not None and theirs.logprobs is not None
    shared = mine.logprobs[0].keys() & theirs.logprobs[0].keys()
    assert len(shared) >= TOP // 2 or mine.token_ids != theirs.token_ids
    return max((abs(mine.logprobs[0][token] - theirs.logprobs[0][token]) for token in shared), default=float("inf"))


@pytest.mark.parametrize("seed", range(2))
def test_i1_and_i3(case: Case, seed: int) -> None:
    prompt = case.prompt(seed)
    reused = answer(case, prompt, recompute_ratio=0.0)
    exact = answer(case, prompt, recompute_ratio=1.0)
    plain = answer(case, prompt, mode="off")
    assert (exact.stats.decision, plain.stats.decision) == ("blend", "prefill")
    assert difference(exact, plain) < TOLERANCE
    assert difference(reused, plain) > 50 * TOLERANCE
    assert exact.token_ids == plain.token_ids


@pytest.mark.parametrize("shift", [0, 97])
def test_i2_exact_kv_gives_exact_answers(case: Case, directory: str, store: Path, shift: int) -> None:
    """Another process puts KV into the store that transformers computed for the very prompt."""
    prompt = case.prompt(7 + shift)  # never asked before: nothing of it is in the prefix cache
    case.engine.evict(CHUNKS)
    segments = put_exact_kv(case, directory, store, prompt, shift)
    assert len(segments) == 4
    try:
        plain = answer(case, prompt, mode="off")
        for policy in ("hkvd", "query_aware"):
            for ratio in (0.0, 0.1, 0.5):
                blended = answer(case, prompt, policy=policy, recompute_ratio=ratio)
                assert blended.stats.decision == "blend"
                assert blended.stats.segments == 4
                assert difference(blended, plain) < 5 * TOLERANCE, (policy, ratio)  # two implementations
    finally:
        case.engine.evict(CHUNKS)


def put_exact_kv(case: Case, directory: str, store: Path, prompt: str, shift: int) -> list[Segment]:
    """Store the prompt's own KV under its chunks' names; its matches."""
    ids = np.asarray(case.engine._tokenize(prompt), np.int32)  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        positions = torch.arange(shift, shift + len(ids))[None]
        cache = model(torch.from_numpy(ids).long()[None], position_ids=positions, use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    kv = torch.stack(layers).transpose(2, 3)  # [layers, 2, tokens, kv_heads, head_dim]
    opened = open_store(store, memory_bytes=0)
    try:
        library = ChunkLibrary(opened, case.engine.scope)
        # Chunks as they would be found, with KV that does not matter yet.
        for text in CHUNKS:
            chunk_ids = np.asarray(case.engine._tokenize(text), np.int32)  # type: ignore[attr-defined]
            blank = kv.new_zeros(*kv.shape[:2], len(chunk_ids), *kv.shape[3:])
            opened.put(ChunkKV(case.engine.scope.key(chunk_ids), case.engine.scope, chunk_ids, 0, blank))
        segments = library.match(ids)
        for segment in segments:
            chunk_ids = opened.ids(segment.key)
            assert chunk_ids is not None
            first = segment.start - segment.offset
            own = torch.zeros(*kv.shape[:2], len(chunk_ids), *kv.shape[3:])
            own[:, :, segment.offset : segment.offset + segment.length] = kv[:, :, segment.start : segment.end]
            opened.delete(segment.key)
            opened.put(ChunkKV(segment.key, case.engine.scope, chunk_ids, first + shift, own))
    finally:
        opened.close()
    return segments


@pytest.mark.parametrize("damage", ["bit flipped", "cut short", "gone"])
def test_i6_a_bad_chunk_is_a_miss(case: Case, store: Path, damage: str) -> None:
    prompt = case.prompt({"bit flipped": 20, "cut short": 21, "gone": 22}[damage])
    bad = next(text for text in CHUNKS if text[30:60] in prompt)
    case.engine.evict([bad])
    expected = answer(case, prompt)
    case.engine.warm([bad])
    key = case.engine.scope.key(np.asarray(case.engine._tokenize(bad), np.int32))  # type: ignore[attr-defined]
    file = next((store / "chunks").rglob(f"{key}.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.unlink()
    if damage != "gone":
        file.write_bytes(bytes(data if damage == "bit flipped" else data[: len(data) // 2]))
    broken = answer(case, prompt)
    assert (broken.token_ids, broken.stats.segments) == (expected.token_ids, expected.stats.segments)
    assert difference(broken, expected) < TOLERANCE
    healthy = case.engine.warm(CHUNKS)
    assert healthy.stored == 1
    assert answer(case, prompt).stats.segments == expected.stats.segments + 1


def test_i7_same_prompt_same_tokens_and_side_by_side_as_alone(case: Case) -> None:
    prompts = [case.prompt(seed) for seed in range(10, 14)]
    alone = [answer(case, prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: answer(case, prompt), prompts * 2))
    for mine, theirs in zip(together, alone * 2, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert difference(mine, theirs) < TOLERANCE


# The doctor


@pytest.fixture
def ask(case: Case, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs it on this server; not for long."""
    monkeypatch.setattr(sweep, "settings_to_try", lambda *args: settings_to_try(*args)[:2])
    monkeypatch.setattr(comparing, "ANSWER_TOKENS", 4)
    url = case.engine._base_url  # type: ignore[attr-defined]

    def run(*arguments: object) -> Result:
        told = (
            "doctor",
            "--engine",
            "server",
            "--base-url",
            url,
            "--model",
            "model",
            "--count",
            1,
            "--json",
            *arguments,
        )
        return CliRunner().invoke(app, [str(argument) for argument in told])

    return run


def test_the_doctor_of_a_server(case: Case, ask: Callable[..., Result], tmp_path: Path) -> None:
    before = case.engine.stored_keys()
    result = ask("--max-kl", 100)
    found = json.loads(result.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    wrong = [name for name, check in checks.items() if not check["ok"]]
    assert set(wrong) <= {"the first token comes sooner"}  # a model of a millisecond
    assert result.exit_code == bool(wrong)
    assert "on a server with version" in checks["model"]["figure"]
    for name in ("ratio 1 is full prefill", "exact KV gives exact answers, behind the primer"):
        assert "log-probabilities differ by" in checks[name]["figure"]
    assert checks["keys can be shifted, in every layer"]["figure"].startswith("error ")
    assert checks["store"]["figure"].startswith(f"the server's: {len(before)} chunks")
    assert found["settings"][0]["kl_per_token"] > 0
    assert case.engine.stored_keys() == before


def test_the_doctor_and_a_catalogue(case: Case, ask: Callable[..., Result], tmp_path: Path) -> None:
    """Prompts are made from its texts; those that the server does not have are told."""
    with Catalog(tmp_path, case.engine.scope) as catalog:
        catalog.begin("a.txt", CHUNKS)
        catalog.finish("a.txt", "digest")
    case.engine.evict(CHUNKS[:2])
    result = ask("--store", tmp_path, "--max-kl", 100)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["chunks of this model"]["figure"] == "4 of 6 texts of the catalogue are warm"
    assert checks["known chunks are in the prompts"]["ok"]
    assert "sample text" not in result.stderr
    case.engine.evict(CHUNKS)
    store, chunks, _ = OnServer(case.engine).check_store(tmp_path)  # type: ignore[arg-type]  # it is one
    assert store.figure.startswith("the server's: 0 chunks")
    assert not chunks.ok and "--engine server" in chunks.advice
