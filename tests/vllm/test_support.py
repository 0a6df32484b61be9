"""What can't be blended is refused at start with the reason, or served plainly; settings are checked."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_rag import (
    BlendConfig,
    CacheBlendError,
    ConfigError,
    Generation,
    UnsupportedModelError,
    load_engine,
)
from cacheblend_rag.vllm import compat, messages, support
from cacheblend_rag.vllm import probe as probing
from cacheblend_rag.vllm.scheduler_half import SchedulerHalf
from cacheblend_rag.vllm.settings import ConnectorSettings, RequestParams

from .conftest import CHUNKS, PRIMER, WIDE, Case, Engines, connectors, forget_prefixes, open_engine

MLA: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 4,
}


def reason(model: str, **engine_args: Any) -> str | None:
    """Why a configuration is refused; no engine is started."""
    from vllm import EngineArgs

    settings = {"enforce_eager": True, "max_model_len": 1024, "skip_tokenizer_init": True, **engine_args}
    return support.unsupported_reason(EngineArgs(model, **settings).create_engine_config())


def test_ordinary_models_pass(make_model: Callable[..., str]) -> None:
    assert reason(make_model("qwen2", use_sliding_window=False, sliding_window=128)) is None
    assert reason(make_model("mistral", sliding_window=1024)) is None  # no shorter than a prompt and its answer


@pytest.mark.parametrize(
    ("name", "changes", "engine_args", "words"),
    [
        ("mistral", {"sliding_window": 128}, {}, "sliding window of 128"),
        ("mla", MLA, {}, "MLA"),
        ("llama", {"model_type": "llama"}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ("llama", {"model_type": "llama"}, {"enable_lora": True}, "LoRA"),
        ("llama", {"model_type": "llama"}, {"kv_cache_dtype": "fp8_e5m2"}, "KV cache of fp8_e5m2"),
        (
            "llama",
            {"model_type": "llama"},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
    ],
)
def test_refused_with_the_reason(
    make_model: Callable[..., str], name: str, changes: dict[str, Any], engine_args: dict[str, Any], words: str
) -> None:
    found = reason(make_model(name, **WIDE, **changes), **engine_args)
    assert found is not None and words in found


def test_hybrid_models_are_refused(make_model: Callable[..., str]) -> None:
    changes = {
        "model_type": "falcon_h1",
        "mamba_d_ssm": 64,
        "mamba_n_heads": 2,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "head_dim": 32,
    }
    found = reason(make_model("falcon_h1", **WIDE, **changes))
    assert found is not None and "hybrid" in found


def test_load_engine_says_why(make_model: Callable[..., str], engines: Engines) -> None:
    engines.close()
    with pytest.raises(UnsupportedModelError, match="sliding window of 128"):
        open_engine(make_model("mistral", **WIDE, sliding_window=128))


def test_other_attention_backends_are_refused(model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engines.close()
    monkeypatch.setattr("cacheblend_rag.vllm.model.ATTENTION_BACKENDS", ("FLASH_ATTN",))
    with pytest.raises(UnsupportedModelError, match="backend CPU_ATTN is not tested: start vLLM with"):
        open_engine(model)


def test_a_step_is_as_long_as_on_vllms_server(model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's defaults depend on who asks, and on a big GPU those of nobody in particular are a quarter of these."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    engines.close()
    batch_defaults = {UsageContext.OPENAI_API_SERVER: 8192}, {UsageContext.OPENAI_API_SERVER: 1024}
    monkeypatch.setattr(EngineArgs, "get_batch_defaults", lambda self, world_size: batch_defaults)
    seen = []

    def refuse(config: Any, **kwargs: Any) -> None:
        seen.append((config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs))
        raise RuntimeError("seen enough")

    monkeypatch.setattr(LLMEngine, "from_vllm_config", refuse)
    for engine_args in ({}, {"max_num_batched_tokens": 512, "max_num_seqs": 4}):
        with pytest.raises(CacheBlendError, match="seen enough"):
            open_engine(model, engine_args=engine_args)
    assert seen == [(8192, 1024), (512, 4)]


def test_what_only_the_loaded_model_shows_is_refused_too(
    make_model: Callable[..., str], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.close()
    monkeypatch.setattr("cacheblend_rag.vllm.support.unsupported_reason", lambda config: None)
    with pytest.raises(UnsupportedModelError, match="sliding window of 128 tokens"):
        open_engine(make_model("mistral", **WIDE, sliding_window=128))


@pytest.mark.parametrize("refusal", ["", "it has a strange attention"])
@pytest.mark.parametrize("ours", [{"mode": "blend"}, {"warm": True}, {"evict": True}, {"describe": True}])
def test_prompts_of_embeddings_are_served_plainly(
    model: str, engines: Engines, ours: dict[str, Any], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    engine = engines.get(model, engine_args={"enable_prompt_embeds": True})
    monkeypatch.setattr(connectors(engine)[0]._scheduler, "refusal", refusal)
    params = SamplingParams(max_tokens=2, temperature=0, extra_args={"kv_transfer_params": {"cacheblend": ours}})
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, WIDE["hidden_size"], generator=generator)
    told: list[Any] = []

    def ask(inner: Any) -> None:
        inner.add_request(f"embeds-{ours}-{refusal}", {"prompt_embeds": embeddings}, params)
        while not told:
            told.extend(output for output in inner.step() if output.finished)

    engine._thread._commands.put(ask)
    assert engine.generate("And this?", max_tokens=2).token_ids
    assert len(told[0].outputs[0].token_ids) == 2
    assert connectors(engine)[0].faults.total() == 0
    answer = told[0].kv_transfer_params["cacheblend"]
    if "mode" in ours:
        assert (answer["prompt_tokens"], answer["reused_tokens"]) == (40, 0)
    else:
        assert "not made of token ids" in answer["error"]


@pytest.fixture(scope="module")
def plain_answer(model: str, engines: Engines) -> Generation:
    return engines.get(model).generate("Read. " + CHUNKS[0] + " What?", max_tokens=6, blend={"mode": "off"})


@pytest.mark.parametrize("found_by", ["config", "probe"])
def test_served_plainly_where_asked(
    model: str, plain_answer: Generation, engines: Engines, found_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.close()

    def refuse(*args: Any) -> None:
        raise UnsupportedModelError("it has a strange attention")

    target = "cacheblend_rag.vllm.connector." + ("check_supported" if found_by == "config" else "probe")
    monkeypatch.setattr(target, refuse)
    with open_engine(model, engine_args={"on_unsupported": "prefill"}) as engine:
        if found_by == "probe":  # on the ranks of a pipeline, say
            half = connectors(engine)[0]._scheduler
            refusal, half.refusal = messages.FoundAtStart(half.refusal), ""
            connectors(engine)[0].set_xfer_handshake_metadata_pp_aware({(0, 0): refusal, (1, 0): refusal})
        assert engine.warm(CHUNKS).stored == 0
        answer = engine.generate("Read. " + CHUNKS[0] + " What?", max_tokens=6)
        assert answer.token_ids == plain_answer.token_ids
        assert answer.stats.decision == "prefill"
        assert "strange attention" in answer.stats.reason


def test_prefill_is_timed_at_start(model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what the model's rotation and the cache hold. A start does not fail for it."""
    engine = engines.get(model)
    paged = connectors(engine)[1]._worker._model
    tried: list[int] = []
    monkeypatch.setattr(paged, "cos_sin", paged.cos_sin[:200])
    monkeypatch.setattr(probing, "_pass_seconds", lambda _, rows: tried.append(rows) or rows**0.5)
    assert probing.measure_prefill(paged) == 200**-0.5
    assert tried == [32, 128, 200, 200]

    tried.clear()
    monkeypatch.setattr(probing, "_pass_seconds", lambda _, rows: tried.append(rows) or 1e-3 * rows)
    assert probing.measure_prefill(paged) == 1e-3
    assert tried == [32, 128]  # a longer pass makes a token no cheaper

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probing, "_pass_seconds", fail)
    assert probing.measure_prefill(paged) is None


@pytest.mark.parametrize("version", ["0.25.1", "0.9.2"])
def test_an_old_vllm_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ConfigError, match=r"install 0\.26 to 0\.32"):
        compat.check_version()


@pytest.mark.parametrize("version", ["0.33.0", "1.0", "dev"])
def test_a_newer_vllm_warns(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.warns(UserWarning, match=r"0\.26 to 0\.32"):
        compat.check_version()


@pytest.mark.parametrize("version", ["0.26.0", "0.29.1", "0.32.0"])
def test_supported_versions_are_silent(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_version()


@pytest.mark.parametrize(
    "bad",
    [
        {"stroe": "x"},
        {"store": 3},
        {"memory_bytes": -1},
        {"gpu_bytes": -1},
        {"memory_bytes": "1G"},
        {"max_bytes": 1.5},
        {"primer": 7},
        {"blend": []},
        {"blend": {"ratio": 0.1}},
        {"blend": {"recompute_ratio": 2}},
        {"blend": {"ratio_range": None}},
        {"on_unsupported": "crash"},
    ],
    ids=str,
)
def test_bad_connector_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ConnectorSettings.parse(bad)


def test_connector_settings_survive_json() -> None:
    for blend in (
        {"recompute_ratio": 0.3, "question_layers": [1, 2]},
        {"recompute_ratio": "auto", "ratio_range": [0.1, 0.4]},
    ):
        settings = ConnectorSettings.parse({"store": "kv", "primer": PRIMER, "blend": blend})
        assert ConnectorSettings.parse(json.loads(json.dumps(settings.to_extra_config()))) == settings


@pytest.mark.parametrize(
    "bad",
    [
        "blend",
        {"recompute_ratio": 2},
        {"recompute_ratio": [1]},
        {"recompute_ratio": "most"},
        {"ratio_range": [0.5, 0.1]},
        {"policy": "best"},
        {"policy": {}},
        {"check_layers": 1},
        {"check_layers": [9]},
        {"check_layers": "1"},
        {"question_layers": [1, 5]},
        {"question_layers": [2, 1]},
        {"question_layers": 2},
        {"mode": None},
        {"unknown": 1},
        {"warm": 1},
        {"warm": True, "evict": True},
        {"report": ""},
        {"lookup": "key"},
        {"prefetch": [1]},
        {"evict_keys": ["k"] * 257},
        {"list_keys": -1},
        {"list_keys": 0, "lookup": ["k"]},
        {"id": 5},
        {"uncounted": 1},
    ],
    ids=str,
)
def test_bad_request_params(bad: Any) -> None:
    with pytest.raises(ConfigError):
        RequestParams.parse({"cacheblend": bad}, BlendConfig(), num_layers=4)


def test_what_a_request_leaves_to_the_model_is_the_profiles() -> None:
    defaults = BlendConfig(question_layers=(1, 3))
    for ours, layers in (({}, (1, 3)), ({"question_layers": None}, (1, 3)), ({"question_layers": [0, 2]}, (0, 2))):
        parsed = RequestParams.parse({"cacheblend": ours}, defaults, num_layers=4)
        assert parsed.blend.question_layers == layers


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}, "text", {"cacheblend": None}], ids=str)
def test_params_of_others_are_left_alone(params: Any) -> None:
    assert RequestParams.parse(params, BlendConfig(), num_layers=4) == RequestParams()


def test_bad_arguments_of_load_engine(model: str, engines: Engines) -> None:
    engines.close()
    for arguments, words in (
        ({"device": "cuda:7"}, "device"),
        ({"engine_args": {"max_model_length": 7}}, "max_model_length"),
        ({"engine_args": {"on_unsupported": "x"}}, "on_unsupported"),
        ({"base_url": "http://localhost:1"}, "base_url"),
        ({"dtype": "float7"}, "float7"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_engine(model, engine="vllm", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no hub model"):
        load_engine("no/such-model", engine="vllm")
    with pytest.raises(ConfigError, match="check_layers"):
        load_engine(model, engine="vllm", blend=BlendConfig(check_layers=(7,)), engine_args={"enforce_eager": True})


def test_a_blend_is_timed_at_start(model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tokens that plain prefill would take as long for. A start does not fail for it."""
    told: list[Any] = []
    note_start = SchedulerHalf.note_start
    monkeypatch.setattr(SchedulerHalf, "note_start", lambda half, found: told.append(found) or note_start(half, found))
    engine = engines.get(model, namespace="timed")
    worker = connectors(engine)[1]
    found = worker._found
    assert found.prefill_seconds > 0
    assert found.blend_seconds >= 0
    assert told[-1] == [found]

    paged = worker._worker._model
    times = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0])  # the second is the shortest
    monkeypatch.setattr(probing, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    computed = 2 * 32 + int(0.15 * 256)
    assert probing.measure_blend(paged, 1e-3) == pytest.approx(2.0 - computed * 1e-3)
    monkeypatch.undo()
    assert probing.measure_blend(paged, 0.1) == 0.0  # tokens take so long that nothing else counts
    forget_prefixes(engine)  # what was blended stood in blocks that nobody had

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probing, "_blend_once", fail)
    assert probing.measure_blend(paged, 1e-3) is None
    monkeypatch.setattr(paged, "cos_sin", paged.cos_sin[:100])
    assert probing.measure_blend(paged, 1e-3) is None


def test_short_prompts_are_prefilled_where_a_blend_takes_longer(
    model: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.get(model)
    engine.warm(CHUNKS)
    half = connectors(engine)[0]._scheduler
    prompt = Case(engine, CHUNKS).prompt(0)
    half.note_start([messages.FoundAtStart("", 1e-3, 0.0)])
    auto = {"mode": "auto", "min_reused_tokens": 10}
    assert engine.generate(prompt, max_tokens=1, blend=auto).stats.decision == "blend"
    forget_prefixes(engine)
    half.note_start([messages.FoundAtStart("", 1e-4), messages.FoundAtStart("", 1e-3, 0.9999)])
    stats = engine.generate(prompt, max_tokens=1, blend=auto).stats
    assert stats.decision == "prefill"
    assert stats.reason.endswith("a blend takes as long as prefill of 1000")
    assert engine.generate(prompt, max_tokens=1, blend={"mode": "blend"}).stats.decision == "blend"
    half.note_start([])
