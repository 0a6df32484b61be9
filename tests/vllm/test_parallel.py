"""I5: tensor-parallel ranks choose the same tokens, and answer as one rank does. Data parallel, quantised weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cacheblend_rag import load_engine
from cacheblend_rag.engines.vllm import VllmEngine

from .conftest import BLEND, CHUNKS, WIDE, Case, Engines, connectors, forget_prefixes, open_engine
from .servers import SERVE, serving

POLICIES = ["hkvd", "query_aware"]
ASKED: list[tuple[str, Any]] = [(policy, ratio) for policy in POLICIES for ratio in (0.0, 0.15, 0.5, 1.0)]
ASKED += [(policy, 0.15) for policy in ("hkvd_kv", "hybrid", "random")]
ASKED += [(policy, "auto") for policy in ("hkvd", "query_aware", "hybrid")]
NO_ANSWERS = {"choices", "stored", "kept", "plain", "prefetched", "opened before", "opened after", "with a loss"}


def rank_choices(worker: Any) -> list[list[int]]:
    """What this rank has chosen so far: runs in each worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    known = get_kv_transfer_group()._worker._choices._known
    return [choice.positions.tolist() for choice in known.values()]


def answers(model: str, store: str, ranks: int, dtype: str) -> dict[str, Any]:
    """Answers of an engine with so many ranks, and what each rank chose."""
    engine = VllmEngine(
        model,
        store=store,
        blend=BLEND,
        dtype=dtype,
        device="auto",
        primer="Some passages follow.\n\n",
        namespace="test",
        codec="raw",
        chat_template=None,
        engine_args={"enforce_eager": True, "max_model_len": 2048, "tensor_parallel_size": ranks, "block_size": 32},
    )
    warmed = engine.warm(CHUNKS)
    case = Case(engine, CHUNKS)
    found: dict[str, Any] = {"stored": warmed.stored}
    found["kept"] = engine._thread.engine.collective_rpc(heads_in_memory)
    found["plain"] = []
    for seed, (policy, ratio) in enumerate(ASKED):
        blend = {"policy": policy, "recompute_ratio": ratio}
        answer = engine.generate(case.prompt(seed), max_tokens=6, logprobs=4, blend=blend)
        stats = answer.stats
        found[f"{policy} {ratio}"] = {
            "token_ids": answer.token_ids,
            "logprobs": [[*sorted(entry.items())] for entry in answer.logprobs or []],
            "stats": [stats.decision, stats.reused_tokens, stats.recomputed_tokens, stats.faults],
        }
        plain = engine.generate(case.prompt(seed), max_tokens=1, logprobs=4, blend={"mode": "off"})
        found["plain"].append([*sorted((plain.logprobs or [{}])[0].items())])
    found["choices"] = engine._thread.engine.collective_rpc(rank_choices)
    found["opened before"] = engine._thread.engine.collective_rpc(opened_gpus)
    found["prefetched"] = prefetched_chunks(engine)
    found["opened after"] = engine._thread.engine.collective_rpc(opened_gpus)
    found["with a loss"] = with_a_loss(case)
    engine.close()
    return found


def with_a_loss(case: Case) -> dict[str, Any]:
    """Answers when the last rank can't read a chunk that the others can, and what each rank chose."""
    inner = case.engine._thread.engine
    inner.collective_rpc(lose_first_read_on_the_last_rank)
    stats = [
        case.engine.generate(case.prompt(30 + n), max_tokens=2, blend={"policy": policy}).stats
        for n, policy in enumerate(POLICIES)
    ]
    return {
        "decisions": [one.decision for one in stats],
        "faults": [one.faults for one in stats],
        "choices": inner.collective_rpc(rank_choices),
    }


def prefetched_chunks(engine: VllmEngine) -> list[list[int]]:
    """The KV heads of each chunk that each rank has in memory after a prefetch."""
    engine._thread.engine.collective_rpc(empty_memory)
    engine.prefetch(CHUNKS)
    deadline = time.monotonic() + 30
    while True:
        time.sleep(2)  # workers must not be asked while the request that prefetches is on its way to them
        heads: list[list[int]] = engine._thread.engine.collective_rpc(heads_in_memory)
        if min(map(len, heads)) == len(CHUNKS) or time.monotonic() > deadline:
            return heads


def empty_memory(worker: Any) -> None:
    """This rank has to read every chunk from disk: runs in each worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    get_kv_transfer_group()._worker._store.memory.close()


def heads_in_memory(worker: Any) -> list[int]:
    """The KV heads of each chunk in this rank's memory: runs in each worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    memory = get_kv_transfer_group()._worker._store.memory
    return [memory.get(entry.key).kv.shape[3] for entry in list(memory.entries())]


def opened_gpus(worker: Any) -> list[int]:
    """The GPUs that this rank has a context on, which takes memory there: runs in each worker."""
    return [number for number in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(number)]


def lose_first_read_on_the_last_rank(worker: Any) -> None:
    """One rank can't read a chunk that the others can."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    half = get_kv_transfer_group()._worker
    if half._model.is_first_rank:
        return
    read, lost = half._read, []

    def failing(key: str, reads: Any) -> Any:
        if not lost or key in lost:
            lost.append(key)
            return None
        return read(key, reads)

    half._read = failing


def in_a_process(model: str, store: Path, ranks: int, dtype: str) -> dict[str, Any]:
    """Several ranks are several processes: a client of them, too."""
    code = (
        "import json, sys\n"
        "from tests.vllm import test_parallel\n"
        "if __name__ == '__main__':\n"
        "    print('RESULT' + json.dumps(test_parallel.answers(*json.loads(sys.argv[1]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([model, str(store), ranks, dtype])],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers what they chose
            "VLLM_CPU_OMP_THREADS_BIND": "0|1" if ranks == 2 else "auto",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT"))
    return result


@pytest.fixture(scope="module")
def even_heads(make_model: Callable[..., str]) -> str:
    return make_model("qwen3", **WIDE)


@pytest.fixture(scope="module")
def one_rank(even_heads: str, tmp_path_factory: pytest.TempPathFactory, engines: Engines) -> dict[str, Any]:
    engines.close()
    return json.loads(json.dumps(answers(even_heads, str(tmp_path_factory.mktemp("one") / "store"), 1, "float32")))


@pytest.fixture(scope="module")
def two_ranks(even_heads: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_process(even_heads, tmp_path_factory.mktemp("two") / "store", 2, "float32")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.timeout(600)
class TestTensorParallel:
    def test_ranks_choose_the_same_tokens(self, two_ranks: dict[str, Any]) -> None:
        first, second = two_ranks["choices"]
        assert first == second
        assert max(map(len, first)) > 200

    def test_two_ranks_answer_as_one(self, one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
        """Each stored its chunks itself: saving gathers the heads of both ranks."""
        assert one_rank["stored"] == two_ranks["stored"] == len(CHUNKS)
        for name in one_rank.keys() - NO_ANSWERS:
            one, two = one_rank[name], two_ranks[name]
            assert one["stats"] == two["stats"]
            assert one["stats"][0] == "blend"
            for a, b in zip(one["logprobs"], two["logprobs"], strict=True):
                mine, theirs = dict(map(tuple, a)), dict(map(tuple, b))
                gap = max(abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys())
                assert gap < 1e-3, name  # a token within 1e-4 of a tie may have been chosen instead of another
            assert one["token_ids"] == two["token_ids"]
        mine, theirs = one_rank["choices"][0], two_ranks["choices"][0]
        assert all(len(set(a) ^ set(b)) <= 2 for a, b in zip(mine, theirs, strict=True))

    def test_all_ranks_prefetch(self, two_ranks: dict[str, Any]) -> None:
        """Each its own heads: one of two."""
        assert two_ranks["kept"] == [[1] * len(CHUNKS)] * 2  # what one warms, all have in memory
        assert two_ranks["prefetched"] == [[1] * len(CHUNKS)] * 2

    def test_a_chunk_that_one_rank_can_not_read_is_lost_to_both(self, two_ranks: dict[str, Any]) -> None:
        """Ranks that went on with different chunks would wait for each other for ever."""
        broken = two_ranks["with a loss"]
        assert broken["decisions"] == ["blend", "blend"]
        assert max(broken["faults"]) == 1
        first, second = broken["choices"]
        assert first == second
        assert len(first) > len(two_ranks["choices"][0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.timeout(900)
def test_two_gpus_answer_as_one(even_heads: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the kernels."""
    one, two = (
        in_a_process(even_heads, tmp_path_factory.mktemp("gpus") / "store", ranks, "bfloat16") for ranks in (1, 2)
    )
    first, second = two["choices"]
    assert first == second
    assert max(map(len, first)) > 200
    assert one["stored"] == two["stored"] == len(CHUNKS)
    assert two["kept"] == [[1] * len(CHUNKS)] * 2
    # In bfloat16, two ranks add up otherwise than one does.
    noise = max(map(difference, one["plain"], two["plain"]))
    for name in one.keys() - NO_ANSWERS:
        assert one[name]["stats"] == two[name]["stats"]
        assert one[name]["stats"][0] == "blend"
        apart = difference(one[name]["logprobs"][0], two[name]["logprobs"][0])
        print(f"{name}: {apart:.2e} apart, plain prefill {noise:.2e}")
        assert apart <= 2 * noise, name
    assert two["prefetched"] == [[1] * len(CHUNKS)] * 2
    assert two["opened after"] == two["opened before"]  # the threads that prefetch keep to their rank's GPU
    assert two["with a loss"]["decisions"] == ["blend", "blend"]


def difference(mine: list[list[Any]], theirs: list[list[Any]]) -> float:
    """Between log-probabilities of a token, for those that both have."""
    first, second = (dict(map(tuple, entries)) for entries in (mine, theirs))
    assert first.keys() & second.keys()
    return max(abs(first[token] - second[token]) for token in first.keys() & second.keys())


def quantised(model: str, folder: Path) -> str:
    """The same model with its linear layers in int8, a scale a row, as compressed-tensors stores them."""
    tensors = load_file(Path(model) / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            packed[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
            packed[name.replace("weight", "weight_scale")] = scale
        else:
            packed[name] = weight
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    for file in Path(model).iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_text(file.read_text())
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "strategy": "channel", "dynamic": False},
                "input_activations": {**scheme, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_data_parallel_ranks_share_a_store(engines: Engines, model: str, tmp_path: Path) -> None:
    """Each rank warms some of the chunks, and both blend with all of them."""
    engines.close()
    options = ["--store", str(tmp_path / "store"), "--mode", "blend", "--served-model-name", "model"]
    options += ["--max-model-len", "2048", "--data-parallel-size", "2"]
    texts = ["Read.\n" + "\n".join(CHUNKS[(n + k) % 6] for k in range(4)) + f"\nQuestion {n}?" for n in range(12)]
    with (
        serving([*SERVE, model, *options], tmp_path / "log", seconds=200) as url,
        load_engine("model", engine="server", base_url=url) as engine,
    ):
        assert engine.warm(CHUNKS).stored == len(CHUNKS)
        plain = engine.generate(texts, max_tokens=4, blend={"mode": "off"})
        answers = engine.generate(texts, max_tokens=4)
        exact = engine.generate(texts, max_tokens=4, blend={"recompute_ratio": 1.0})
        assert engine.warm(CHUNKS).already_there == len(CHUNKS)
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=30) as response:
            metrics = response.read().decode()
    assert [answer.stats.segments for answer in answers] == [4] * 12
    assert [answer.token_ids for answer in exact] == [answer.token_ids for answer in plain]
    for name in ('requests_total{decision="blend",', "warmed_chunks_total{"):
        counts = {line.rsplit(" ", 1)[1] for line in metrics.splitlines() if line.startswith(f"vllm:cacheblend_{name}")}
        assert len(re.findall(re.escape(f"vllm:cacheblend_{name}") + 'engine="[01]"', metrics)) == 2
        assert "0.0" not in counts


def test_quantised_weights(engines: Engines, make_model: Callable[..., str], tmp_path: Path) -> None:
    """W8A8 linear layers: ratio 1 is plain prefill; chunks are never those of the unquantised model."""
    engines.close()
    plain_model = make_model("llama3-scaled", **WIDE)
    store = tmp_path / "store"
    with open_engine(plain_model, store, dtype="bfloat16") as engine:
        unquantised = engine.scope
        engine.warm(CHUNKS)
    (tmp_path / "int8").mkdir()
    with open_engine(quantised(plain_model, tmp_path / "int8"), store, dtype="bfloat16") as engine:
        layers = connectors(engine)[1]._worker._model.model.model.layers
        assert "CompressedTensors" in type(layers[0].self_attn.qkv_proj.quant_method).__name__
        assert engine.scope != unquantised
        case = Case(engine, CHUNKS)
        assert engine.generate(case.prompt(0), max_tokens=2).stats.decision == "prefill"
        assert engine.warm(CHUNKS).stored == len(CHUNKS)
        for seed in range(3):
            prompt = case.prompt(seed)
            plain = case.logits(prompt, mode="off")
            # bfloat16 and int8 activations: twice what plain prefill shows against itself in other slices.
            noise = float((case.logits(case.ids(prompt), mode="blend", recompute_ratio=1.0) - plain).abs().max())
            reuse = float((case.logits(prompt, recompute_ratio=0.0) - plain).abs().max())
            assert noise < 0.05 * float(plain.abs().max())
            assert reuse > 3 * noise
        forget_prefixes(engine)
        assert engine.generate(case.prompt(0), max_tokens=4).stats.decision == "blend"
