"""What our loggers say: nothing at import, one line when an engine starts, and for debugging one for each prompt."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from .conftest import Case, open_engine


def test_nothing_is_said_or_set_up_at_import() -> None:
    code = (
        "import logging; logging.basicConfig(level=1); import cacheblend_rag, cacheblend_rag.cli; "
        "ours = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith('cacheblend_rag')]; "
        "assert not any(getattr(log, 'handlers', None) or getattr(log, 'level', 0) for log in ours)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, [line for line in done.stderr.splitlines() if "cacheblend" in line]) == ("", [])


def test_the_start_is_told(random_models: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    directory = random_models["llama3-scaled"]
    with caplog.at_level(logging.INFO, "cacheblend_rag"), open_engine(directory):
        pass
    line, costs, memory = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert directory in line
    assert "policy query_aware, recompute_ratio 0.15" in line
    assert "MemoryStore" in line
    assert costs == "beside its tokens, a blend takes next to nothing"
    assert memory.startswith("memory on cpu: weights ")


def test_a_line_for_each_prompt(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    prompt = case.prompt(3)
    case.engine.generate(prompt, max_tokens=1)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "cacheblend_rag"):
        blended = case.engine.generate(prompt, max_tokens=2)
        case.engine.generate(prompt, max_tokens=2, blend={"mode": "off"})
    assert blended.trace is None
    stats = blended.stats
    matched = stats.reused_tokens + stats.recomputed_tokens
    line, plain = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"blend ({stats.reason}): {stats.recomputed_tokens} of {matched} matched tokens recomputed")
    low, high = map(float, re.search(r"by query_aware, scores (\S+) to (\S+),", line).groups())  # type: ignore[union-attr]
    assert 0 < low < high
    assert f"{stats.missed_tokens} missed" in line
    assert re.search(r"match \d+\.\d ms, load \d+\.\d ms, select \d+\.\d ms, recompute \d+\.\d ms", line)
    assert plain.startswith("prefill (mode is off): 0 of 0 matched tokens recomputed, ")


@pytest.mark.parametrize("said", ["option", "variable"])
def test_a_bad_level_is_one_clear_line(said: str) -> None:
    command = [sys.executable, "-m", "cacheblend_rag.cli"]
    command += ["--log-level", "loud"] if said == "option" else []
    environment = os.environ | ({"CACHEBLEND_LOG_LEVEL": "loud"} if said == "variable" else {})
    done = subprocess.run(
        [*command, "store", "ls", "--store", "nowhere"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: the log level must be one of debug, info, warning, error, not 'loud'\n"
