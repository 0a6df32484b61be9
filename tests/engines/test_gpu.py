"""I1 and I7 on a CUDA GPU, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from cacheblend_rag.policies import policy_names

from ..conftest import ARCHITECTURES
from .conftest import Case, open_engine, random_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module", params=[(n, d) for n in ARCHITECTURES for d in ("float32", "bfloat16")], ids=str)
def gpu_case(request: pytest.FixtureRequest, random_models: dict[str, str]) -> Iterator[Case]:
    name, dtype = request.param
    directory = random_models[name]
    engine = open_engine(directory, device="cuda", dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    case = Case(engine, reference.cuda().eval(), [random_text(seed, 130 + 10 * seed) for seed in range(6)])
    engine.warm(case.chunks)
    yield case
    engine.close()


def noise(case: Case, ids: list[int]) -> float:
    """What counts as equal: 1e-4 in float32; in bfloat16 twice what plain prefill shows against itself in pieces."""
    if case.reference.dtype == torch.float32:
        return 1e-4
    whole = case.plain_logits(ids).float()
    tokens = torch.tensor([ids], device="cuda")
    differences = []
    for cut in range(len(ids) // 8, len(ids), len(ids) // 8):
        with torch.inference_mode():
            past = case.reference(tokens[:, :cut], use_cache=True).past_key_values
            pieces = case.reference(tokens[:, cut:], past_key_values=past).logits[0, -1].float()
        differences.append(float((whole - pieces).abs().max()))
    return 2 * max(differences)


@pytest.mark.parametrize("seed", range(3))
def test_i1_ratio_one_is_plain_prefill(gpu_case: Case, seed: int) -> None:
    ids = gpu_case.ids(gpu_case.prompt(seed))
    plain = gpu_case.plain_logits(ids).float()
    allowed = noise(gpu_case, ids)
    assert float((gpu_case.logits(ids, recompute_ratio=1.0) - plain).abs().max()) <= allowed
    assert float((gpu_case.logits(ids, recompute_ratio=0.0) - plain).abs().max()) > allowed


@pytest.mark.parametrize("policy", policy_names())
def test_i7_same_prompt_same_tokens(gpu_case: Case, policy: str) -> None:
    prompt, blend = gpu_case.prompt(4), {"policy": policy, "forced_tokens": 3}
    answers = [gpu_case.engine.generate(prompt, max_tokens=8, blend=blend) for _ in range(3)]
    assert answers[0].stats.decision == "blend"
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids


def test_the_gpu_reuses_what_the_cpu_reuses(random_models: dict[str, str]) -> None:
    """Chunks are placed otherwise there: all layers at once. Grouped heads, many rows with gaps between them."""
    chunks = [random_text(seed, 440 + 10 * seed) for seed in range(4)]
    prompt = "Some text before them.\n\n" + "\n\n".join(chunks) + "\n\nWhat is that about, in a few words?"
    logits = []
    for device in ("cpu", "cuda"):
        with open_engine(random_models["qwen2"], device=device) as engine:
            engine.warm(chunks)
            of_ratios = []
            for ratio in (0.0, 0.6):
                blend = {"mode": "blend", "policy": "random", "recompute_ratio": ratio}
                scores = engine.score(prompt, ["so"], blend=blend)
                assert (scores.stats.decision, scores.stats.faults) == ("blend", 0)
                of_ratios.append(scores.logits[0].cpu())
            logits.append(torch.cat(of_ratios))
    assert float((logits[0] - logits[1]).abs().max()) < 1e-3
