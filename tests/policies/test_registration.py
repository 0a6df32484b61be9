"""Policies of other packages: registered in the process, or found by their entry points."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheblend_rag import BlendConfig, ConfigError, policies
from cacheblend_rag.blending import blend
from cacheblend_rag.budget import Budget
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.passes import Selection
from cacheblend_rag.policies import get_policy, policy_names, register_policy

from .conftest import FakeForward, make_layout

TAILS = """
class Tails:
    reads_question = False
    adapts = False

    def cost(self, layout, config, num_layers):
        return 0

    def select(self, layout, budget, config, num_layers):
        yield from ()
        return "tails", layout.matched[-budget.ceiling :]

tails = Tails()
"""


class _Tails:
    """The last tokens."""

    reads_question = False
    adapts = False

    def cost(self, *args: object) -> float:
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        yield from ()
        return "tails", layout.matched[-budget.ceiling :]


_NO_COST = type("NoCost", (), {"select": print, "reads_question": False, "adapts": False})()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays registered."""
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    policies._installed.cache_clear()
    yield
    policies._installed.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Puts a package with a module and entry points on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, source: str, entry_points: str) -> None:
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cacheblend_rag.policies]\n{entry_points}\n")

    return install


def test_a_registered_policy_is_used() -> None:
    register_policy("tails", _Tails())
    assert "tails" in policy_names()
    layout = make_layout([(3, 20)])
    result = blend(FakeForward(layout), layout, BlendConfig(policy="tails", recompute_ratio=0.1))
    assert (result.policy, result.recomputed.tolist()) == ("tails", [21, 22])


@pytest.mark.parametrize("name", ["hkvd", "tails", "installed"])
def test_a_name_is_given_once(name: str, install: Callable[[str, str, str], None]) -> None:
    install("one_more", TAILS, "installed = one_more:tails")
    register_policy("tails", _Tails())
    with pytest.raises(ConfigError, match=f"'{name}' already"):
        register_policy(name, _Tails())


@pytest.mark.parametrize(
    "policy", [_Tails, None, torch.topk, type("NoField", (), {"select": print})(), _NO_COST], ids=str
)
def test_what_is_no_policy_is_refused(policy: object) -> None:
    with pytest.raises(ConfigError, match="'mine' must be an object"):
        register_policy("mine", policy)  # type: ignore[arg-type]
    assert "mine" not in policy_names()


def test_installed_policies_are_found(install: Callable[[str, str, str], None]) -> None:
    install("tails_of_chunks", TAILS, "tails = tails_of_chunks:tails\nhkvd = tails_of_chunks:tails")
    assert policy_names() == sorted([*policies._BUILT_IN, "tails"])
    assert "tails_of_chunks" not in sys.modules  # not before it is asked for
    layout = make_layout([(3, 20)])
    result = blend(FakeForward(layout), layout, BlendConfig(policy="tails", recompute_ratio=0.1))
    assert (result.policy, result.recomputed.tolist()) == ("tails", [21, 22])
    assert not policies.is_built_in("tails")
    assert type(get_policy("hkvd")).__name__ == "HKVD"  # ours stay ours


def test_another_process_finds_them(install: Callable[[str, str, str], None], tmp_path: Path) -> None:
    install("for_workers", TAILS, "tails = for_workers:tails")
    code = (
        f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]}\n"
        "from cacheblend_rag import BlendConfig; print(BlendConfig(policy='tails').policy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "tails"


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("raise RuntimeError('no licence\\nfound')", "broken:tails", "can't be loaded: no licence"),
        ("import not_there_at_all", "broken:tails", "can't be loaded: No module named 'not_there_at_all'"),
        (TAILS, "broken:heads", "can't be loaded: .*heads"),
        (TAILS, "broken:Tails", "must be an object"),
        ("tails = 3", "broken:tails", "must be an object"),
    ],
)
def test_a_broken_package_is_one_clear_line(
    install: Callable[[str, str, str], None], source: str, target: str, reason: str
) -> None:
    install("broken", source, f"tails = {target}")
    sys.modules.pop("broken", None)
    assert "tails" in policy_names()
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"policy 'tails' .*{reason}") as error:
            BlendConfig(policy="tails")
        assert "\n" not in str(error.value)
    assert BlendConfig(policy="hkvd").policy == "hkvd"


def test_two_packages_with_one_name(install: Callable[[str, str, str], None]) -> None:
    install("tails_one", TAILS, "tails = tails_one:tails")
    install("tails_two", TAILS, "tails = tails_two:tails")
    with pytest.raises(ConfigError, match=r"several packages: tails_\w+:tails, tails_\w+:tails"):
        get_policy("tails")


def test_the_documented_one_works() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    source = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(source, names)
    register_policy("late_deviation", names["late_deviation"])
    layout = make_layout([(3, 20), (2, 20)], prefix=17)
    deviations = torch.arange(layout.length).float()
    result = blend(
        FakeForward(layout, deviations=deviations), layout, BlendConfig(policy="late_deviation", forced_tokens=1)
    )
    assert result.policy == "late_deviation"
    assert result.recomputed.tolist() == [20, 42, 58, 59, 60, 61]


def test_an_unknown_name_lists_the_known(install: Callable[[str, str, str], None]) -> None:
    install("tails_listed", TAILS, "tails = tails_listed:tails")
    with pytest.raises(ConfigError) as error:
        BlendConfig(policy="best")
    assert str(error.value) == (
        "unknown policy 'best': known are chunk_heads, hkvd, hkvd_kv, hybrid, none, query_aware, random, tails"
    )
