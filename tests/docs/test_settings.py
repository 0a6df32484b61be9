"""The tables of settings name what there is, with the defaults that it has."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

from cacheblend_rag import BlendConfig, load_engine
from cacheblend_rag.primer import DEFAULT_PRIMER
from cacheblend_rag.vllm.settings import ConnectorSettings

from .conftest import DOCS, ROOT, table_below

SETTINGS = DOCS / "settings.md"
BLEND_DEFAULTS = {field.name: field.default for field in dataclasses.fields(BlendConfig)}


def literals(rows: dict[str, list[str]]) -> dict[str, Any]:
    """The column of defaults."""
    return {name: ast.literal_eval(cells[0].strip("`")) for name, cells in rows.items()}


def test_table_of_blend_config() -> None:
    assert literals(table_below(SETTINGS, "BlendConfig")) == BLEND_DEFAULTS


def test_table_of_load_engine() -> None:
    rows = table_below(SETTINGS, "load_engine")
    parameters = inspect.signature(load_engine).parameters

    assert list(rows) == list(parameters)
    assert rows.pop("model")[0] == ""  # there is no default
    assert literals(rows) == {name: parameters[name].default for name in rows}


def test_names_of_the_reference_code_map_to_names_of_ours() -> None:
    ours = {there: cells[0] for there, cells in table_below(SETTINGS, "Names of the CacheBlend reference code").items()}

    assert {"recomp_ratio", "check_layers", "suffix_len", "imp_indices", "old_kvs"} <= set(ours)
    assert "recompute_ratio" in BLEND_DEFAULTS and ours["recomp_ratio"].startswith("`recompute_ratio`")
    assert "check_layers" in BLEND_DEFAULTS and ours["check_layers"].startswith("`check_layers`")
    assert "out.trace.recomputed" in ours["imp_indices"]


def test_table_of_the_readme() -> None:
    assert literals(table_below(ROOT / "README.md", "In Python")) == BLEND_DEFAULTS


def test_table_of_the_vllm_connector() -> None:
    rows = table_below(DOCS / "vllm.md", "Three ways")
    fields = {field.name for field in dataclasses.fields(ConnectorSettings)}

    assert set(rows) == fields
    defaults = ConnectorSettings()
    assert (rows["memory_bytes"][0], defaults.memory_bytes) == ("1 GiB, no limit", 1 << 30)
    assert (rows["max_bytes"][0], defaults.max_bytes) == ("1 GiB, no limit", None)
    assert (rows["store"][0], defaults.store) == ("a temporary directory", None)
    assert (rows["primer"][0], defaults.primer) == ("a passage", DEFAULT_PRIMER)
    assert (rows["blend"][0], defaults.blend) == ("`{}`", BlendConfig())
    plain = {name: rows[name] for name in ("gpu_bytes", "namespace", "codec", "on_unsupported")}
    assert literals(plain) == {name: getattr(defaults, name) for name in plain}
