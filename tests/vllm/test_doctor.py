"""``cacheblend doctor`` on vLLM in this process: figures where all is well, checks that fail where something is wrong,
and nothing left behind. tests/vllm/test_server_invariants.py has it on a server."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from cacheblend_rag.budget import Budget
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.cli import app
from cacheblend_rag.cli import engine as options
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.diagnostics import comparing, connected_exactness, sweep
from cacheblend_rag.diagnostics.checks import Check
from cacheblend_rag.diagnostics.comparing import ByTopTokens
from cacheblend_rag.diagnostics.connected import InProcess
from cacheblend_rag.diagnostics.exactness import check_shift
from cacheblend_rag.diagnostics.prompts import sample_prompt, sample_prompts
from cacheblend_rag.diagnostics.sweep import settings_to_try
from cacheblend_rag.errors import StoreError
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.vllm import probe as probing
from cacheblend_rag.vllm.costs import DiskCosts
from cacheblend_rag.vllm.messages import FoundAtStart
from cacheblend_rag.vllm.model import PagedModel

from .conftest import CHUNKS, WIDE, Case, connectors, forget_prefixes, recorded_logits

I1, SHIFT = "ratio 1 is full prefill", "keys can be shifted, in every layer"
I2 = "exact KV gives exact answers, behind the primer"


@pytest.fixture
def subject(case: Case) -> Iterator[InProcess]:
    with contextlib.closing(InProcess(case.engine)) as subject:
        yield subject


def exactness(subject: InProcess, chunks: list[str] | None = None) -> dict[str, Check]:
    """What is found with some chunks; short ones unless others are given, to save time."""
    chunks = chunks or [f"{subject.tag}{text}" for text in CHUNKS[:2]]
    prompt = "Read these notes.\n" + "\n".join(chunks) + "\nQuestion: what comes next, and why?\nAnswer:"
    subject.warm(chunks)
    return {check.name: check for check in subject.check_exactness(prompt, chunks)}


def test_what_is_exact(subject: InProcess) -> None:
    model = subject.check_model()
    assert model.ok and "4 layers, float32, vLLM " in model.figure
    checks = exactness(subject, sample_prompt(subject, 0)[1])
    assert list(checks) == [I1, I2, SHIFT]
    for check in checks.values():
        assert check.ok and not check.advice, check
        assert "not measured" not in check.figure
    assert len(subject.engine.describe()["shift_errors"]) == subject.engine.num_layers
    assert 0 < max(subject.engine.describe()["shift_errors"]) < 1e-3


def damage(case: Case, monkeypatch: pytest.MonkeyPatch, how: Callable[[ChunkKV], ChunkKV]) -> None:
    """Let the workers read other chunks than were stored."""
    store = connectors(case.engine)[1]._worker._store
    get = store.get

    def damaged(key: str) -> ChunkKV | None:
        chunk = get(key)
        return None if chunk is None else how(chunk)

    monkeypatch.setattr(store, "get", damaged)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda chunk: dataclasses.replace(chunk, kv=chunk.kv.roll(1, dims=0)), id="of other layers"),
        pytest.param(lambda chunk: dataclasses.replace(chunk, start=chunk.start + 3), id="shifted wrongly"),
    ],
)
def test_a_chunk_that_is_read_wrongly_is_seen(
    case: Case, subject: InProcess, how: Callable[[ChunkKV], ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(case, monkeypatch, how)
    checks = exactness(subject)
    assert not checks[I2].ok
    assert checks[I2].advice.startswith("this model is not blended exactly")
    assert checks[I1].ok  # there nothing is left of what was read


def test_a_chunk_that_is_not_read_is_no_evidence(subject: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    behind_primer = connected_exactness._behind_primer

    def behind_another(*args: Any) -> tuple[list[int], int]:
        ids, chunk_tokens = behind_primer(*args)
        return [ids[0] + 1, *ids[1:]], chunk_tokens  # its chunks are recomputed as all chunks are

    monkeypatch.setattr(connected_exactness, "_behind_primer", behind_another)
    check = exactness(subject)[I2]
    assert check.ok
    assert check.figure.startswith("not measured")


def test_tokens_that_are_not_recomputed_are_seen(subject: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Budget.of

    def less(matched: int, config: BlendConfig) -> Budget:
        return original(matched, dataclasses.replace(config, recompute_ratio=0.3))

    monkeypatch.setattr(Budget, "of", less)
    assert not exactness(subject)[I1].ok


def test_keys_that_can_not_be_shifted_are_seen(case: Case, subject: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    half = connectors(case.engine)[0]._scheduler
    monkeypatch.setattr(half, "_shift_errors", [0.0, 0.7, 0.0, 0.0])
    checks = exactness(subject)
    assert not checks[SHIFT].ok and "in layer 1" in checks[SHIFT].figure
    monkeypatch.setattr(half, "_shift_errors", [])  # as an earlier version, which tells nothing
    assert exactness(subject)[SHIFT].figure.startswith("not measured here")


@pytest.fixture
def paged(case: Case) -> Iterator[PagedModel]:
    """The model as the worker measures it at start, in blocks that nobody uses yet."""
    yield connectors(case.engine)[1]._worker._model
    forget_prefixes(case.engine)


def test_a_layer_without_keys_has_an_error_of_zero(paged: PagedModel) -> None:
    """Not NaN, which is no JSON."""
    attention = paged.model.model.layers[1].self_attn

    def no_keys(_: Any, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        output[0][:, attention.q_size : attention.q_size + attention.kv_size] = 0
        return output

    with attention.qkv_proj.register_forward_hook(no_keys):
        errors = probing.measure_shift(paged)
    assert errors[1] == 0
    assert all(0 < error < 1e-3 for layer, error in enumerate(errors) if layer != 1)
    json.dumps(errors, allow_nan=False)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e38])
def test_a_broken_shift_is_told_in_finite_numbers(
    case: Case, paged: PagedModel, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = probing._shifted

    def broken(*args: Any) -> torch.Tensor:
        kv = shift(*args)
        kv[2, 0] = wrong
        return kv

    monkeypatch.setattr(probing, "_shifted", broken)
    errors = probing.measure_shift(paged)
    json.dumps(errors, allow_nan=False)
    check = check_shift(case.engine, errors, times=5)
    assert not check.ok and "in layer 2" in check.figure


@pytest.mark.parametrize("step", ["run_rows", "_shifted"])
def test_a_start_does_not_fail_for_the_shift(
    paged: PagedModel, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probing, step, fail)
    with caplog.at_level(logging.WARNING, logger="cacheblend_rag"):
        assert probing.measure_shift(paged) == ()
    assert "the shift of keys could not be measured" in caplog.text and "out of memory" in caplog.text


def test_no_rank_goes_on_alone(paged: PagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the second pass, where it would wait for the one that failed."""
    passes: list[Any] = []
    run_rows = probing.run_rows
    monkeypatch.setattr(probing, "run_rows", lambda *args: passes.append(args) or run_rows(*args))
    monkeypatch.setattr(paged, "agree", lambda failed: [True] * len(failed))  # another one did
    assert probing.measure_shift(paged) == ()
    assert len(passes) == 1


def test_its_own_chunks_do_not_count(case: Case, subject: InProcess) -> None:
    """Or a store without any of the user's would pass."""
    directory = connectors(case.engine)[0]._scheduler._library.store.disk.directory
    users = len(case.engine.stored_keys())
    subject.warm([f"{subject.tag}A note that the doctor wrote."])
    store, chunks, reading = subject.check_store(directory)
    assert (store.ok, chunks.ok, chunks.figure) == (True, True, f"{users} of {users}")
    assert "GB/s" in reading.figure
    case.engine.evict_keys(list(case.engine.stored_keys() - subject._own.keys()))
    _, chunks = subject.check_store(directory)
    assert not chunks.ok and chunks.figure == "none of 0"


def test_the_worst_rank_counts(case: Case) -> None:
    half = copy.copy(connectors(case.engine)[0]._scheduler)
    half.costs = DiskCosts()
    half.note_start([FoundAtStart("", shift_errors=errors) for errors in ((0.1, 0.2), (0.3, 0.1))])
    assert half._describe()["shift_errors"] == [0.3, 0.2]
    half.note_start([FoundAtStart("it can't be blended"), FoundAtStart("", shift_errors=(0.3, 0.1))])
    assert half._describe()["shift_errors"] == []


def test_where_nothing_is_blended_nothing_is_measured(
    case: Case, subject: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is served plainly on purpose."""
    monkeypatch.setattr(connectors(case.engine)[0]._scheduler, "refusal", "it has a strange attention")
    model = subject.check_model()
    assert not model.ok
    assert model.figure == "nothing is blended: it has a strange attention"
    (check,) = [check for name, check in exactness(subject).items() if name != SHIFT]
    assert check.ok and check.figure == "not measured: it has a strange attention"


def test_the_divergence_is_a_bound_of_the_true_one(case: Case) -> None:
    prompt, blend = case.prompt(3), {"mode": "blend", "recompute_ratio": 0.1}
    expected = ByTopTokens(case.engine).expect(prompt)
    near, far = expected.compare({"mode": "blend", "recompute_ratio": 1.0}), expected.compare(blend)
    assert near.kl < 1e-6 and near.agreement == 1
    assert far.kl > 1e-3
    ids, tokens = case.ids(prompt), expected.answer.token_ids
    assert expected.answer.token_ids == case.engine.generate(prompt, max_tokens=16, blend={"mode": "off"}).token_ids
    true, same = [], 0
    for count in range(len(tokens)):
        logprobs = []
        for settings in ({"mode": "off"}, blend):
            with recorded_logits(case.engine) as logits:
                case.engine.generate([*ids, *tokens[:count]], max_tokens=1, blend=settings)
            logprobs.append(logits[-1][0].double().log_softmax(-1))
        full, blended = logprobs
        true.append(float((full.exp() * (full - blended)).sum()))
        same += int(full.argmax() == blended.argmax())
    assert 0.3 < far.kl / (sum(true) / len(true)) <= 1 + 1e-6
    assert far.agreement == same / len(tokens)


def test_what_is_timed_is_read_anew(subject: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time, although vLLM remembers prompts; and compared is what it read of the very prompt."""
    engine, timed = subject.engine, list[BlendStats]()
    unread = ByTopTokens.unread

    def noted(self: ByTopTokens, prompt: str) -> str:
        monkeypatch.setattr(engine, "_observers", (lambda stats: timed.append(stats),))
        return unread(self, prompt)

    monkeypatch.setattr(ByTopTokens, "unread", noted)
    monkeypatch.setattr(comparing, "ANSWER_TOKENS", 4)
    asked = sample_prompts(subject, 1)
    settings = settings_to_try(engine.blend, engine.num_layers)[:2]
    found = sweep.sweep(asked, settings, lambda done, total: None, warm=subject.warm)
    full = [stats for stats in timed if stats.reason == "mode is off" and stats.prompt_tokens > 1000]
    assert [(stats.prefix_tokens, stats.decision) for stats in full[:2]] == [(0, "prefill")] * 2
    for setting in found.settings:
        (stats,) = setting.stats
        assert (stats.decision, stats.prefix_tokens) == ("blend", 0)
        assert stats.reused_tokens > 500
        assert setting.kl[0] > 0
    assert found.kl_is_bound
    assert found.answers[0][0] != ""


# The command


@pytest.fixture
def ask(case: Case, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command on the engine that runs here."""
    monkeypatch.setattr(sweep, "settings_to_try", lambda *args: settings_to_try(*args)[:2])
    monkeypatch.setattr(comparing, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(options, "open_engine", lambda *args, **kwargs: contextlib.nullcontext(case.engine))

    def run(*arguments: object) -> Result:
        told = ("doctor", "--engine", "vllm", "--model", "here", "--count", 1, "--max-kl", 100, *arguments)
        return CliRunner().invoke(app, [str(argument) for argument in told])

    return run


def test_the_command(case: Case, ask: Callable[..., Result]) -> None:
    before = case.engine.stored_keys()
    result = ask("--json")
    found = json.loads(result.stdout)
    assert list(found) == ["checks", "kl_is_lower_bound", "settings", "answers", "verdict"]
    checks = {check["name"]: check for check in found["checks"]}
    assert all(list(check) == ["name", "ok", "figure", "advice"] for check in checks.values())
    wrong = [name for name, check in checks.items() if not check["ok"]]
    assert set(wrong) <= {"the first token comes sooner"}  # a model of a millisecond
    assert result.exit_code == bool(wrong)
    assert {"versions", "model", I1, I2, SHIFT, "the question is found"} < checks.keys()
    assert checks["answers are near full prefill's"]["figure"].startswith("KL at least ")
    assert found["kl_is_lower_bound"]
    assert [setting["name"] for setting in found["settings"]] == ["query_aware 15%", "query_aware 5%"]
    assert "soonest and near enough: query_aware" in found["verdict"]
    assert case.engine.stored_keys() == before  # nothing of it is left


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes long and is tested above."""
    monkeypatch.setattr(InProcess, "check_exactness", lambda *args: [])


@pytest.mark.usefixtures("quick")
def test_prompts_of_ones_own(case: Case, ask: Callable[..., Result], tmp_path: Path) -> None:
    """Whole prompts are not warmed; passages are, and those that were warm before stay."""
    before = case.engine.stored_keys()
    cold = "Nobody has warmed this passage, which is about a lighthouse keeper and his four goats on the roof. " * 2
    path = tmp_path / "prompts.jsonl"
    asked = [{"prompt": case.prompt(1)}, {"question": "Who keeps goats?", "passages": [CHUNKS[0], cold]}]
    path.write_text("\n".join(map(json.dumps, asked)))
    found = json.loads(ask("--prompts", path, "--json", "--policy", "hkvd", "--ratio", 0.5).stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["known chunks are in the prompts"]["ok"]
    assert "6 runs of chunks" in checks["known chunks are in the prompts"]["figure"]
    assert found["settings"][0]["name"] == "hkvd 50%"
    assert len(found["answers"]) == 2
    assert case.engine.stored_keys() == before
    path.write_text(json.dumps({"prompt": cold}))
    result = ask("--prompts", path, "--json")
    last = json.loads(result.stdout)["checks"][-1]
    assert (last["name"], last["ok"], result.exit_code) == ("known chunks are in the prompts", False, 1)
    path.write_text(json.dumps({"prompt": cold * 20}))
    last = json.loads(ask("--prompts", path, "--json").stdout)["checks"][-1]
    assert (last["name"], last["ok"]) == ("prompts", False)
    assert "the model's context is 2048" in last["figure"]
    assert case.engine.stored_keys() == before


@pytest.mark.usefixtures("quick")
def test_nothing_is_left_behind_by_a_failure(
    case: Case, ask: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = case.engine.stored_keys()

    def fail(*args: Any, **options: Any) -> None:
        assert len(case.engine.stored_keys()) > len(before)
        raise StoreError("the disk is full")

    monkeypatch.setattr(sweep, "sweep", fail)
    result = ask()
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: the disk is full")
    assert case.engine.stored_keys() == before

    def stuck(keys: object) -> int:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(case.engine, "evict_keys", stuck)
        said = ask().stderr.splitlines()[-1]
    assert said == "error: the doctor's own chunks could not be removed from the store: the disk is full"
    case.engine.evict_keys(list(case.engine.stored_keys() - before))


def test_a_model_that_vllm_can_not_blend(make_model: Callable[..., str]) -> None:
    model = make_model("mistral", **WIDE, sliding_window=128)
    result = CliRunner().invoke(app, ["doctor", "--engine", "vllm", "--model", model, "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [check["name"] for check in found["checks"]] == ["versions", "model"]
    assert "its sliding window of 128 tokens is shorter than max_model_len" in found["checks"][1]["figure"]
    assert found["checks"][1]["advice"].startswith("serve it without this package")
    assert len(found["checks"][1]["figure"].splitlines()) == 1
