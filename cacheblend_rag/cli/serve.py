"""``cacheblend serve``."""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Annotated, Any

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import print_note
from cacheblend_rag.errors import ConfigError


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")],
    store: options.Store,
    namespace: options.Namespace = "default",
    primer: options.Primer = None,
    codec: options.Codec = "raw",
    ratio: options.Ratio = 0.15,
    policy: Annotated[str, typer.Option(help="How tokens are chosen for that.")] = "query_aware",
    forced_tokens: Annotated[
        int, typer.Option(help="First tokens of each run of a chunk that are among them in any case.")
    ] = 0,
    mode: Annotated[
        str, typer.Option(help="auto: blend where it pays; blend: wherever a chunk is known; off: never.")
    ] = "auto",
    min_reused_tokens: Annotated[int, typer.Option(help="With auto: below that, prefill plainly.")] = 512,
    memory_gib: Annotated[float, typer.Option(min=0, help="Chunks kept in memory besides, in GiB.")] = 1.0,
    gpu_gib: Annotated[float, typer.Option(min=0, help="Chunks kept in each GPU's memory too, in GiB.")] = 0.0,
    max_gib: Annotated[float | None, typer.Option(min=0, help="Most GiB of the store; no limit unless given.")] = None,
    on_unsupported: Annotated[
        str, typer.Option(help="A model that can't be blended: refuse to start, or prefill plainly.")
    ] = "refuse",
) -> None:
    """Serve a model with vLLM's OpenAI-compatible server, blending for every client.

    Further options are vLLM's own: --host, --port, --max-model-len, --tensor-parallel-size, ...
    """
    from cacheblend_rag.engines.model_files import resolve_model
    from cacheblend_rag.primer import DEFAULT_PRIMER
    from cacheblend_rag.store import open_store
    from cacheblend_rag.vllm.compat import check_version
    from cacheblend_rag.vllm.middleware import NUM_LAYERS_VARIABLE, CheckParams
    from cacheblend_rag.vllm.plugin import CONNECTOR_CONFIG
    from cacheblend_rag.vllm.settings import ConnectorSettings
    from cacheblend_rag.vllm.support import check_supported

    check_version()
    settings = ConnectorSettings.parse(
        {
            "store": str(store),
            "memory_bytes": int(memory_gib * 2**30),
            "gpu_bytes": int(gpu_gib * 2**30),
            "max_bytes": None if max_gib is None else int(max_gib * 2**30),
            "namespace": namespace,
            "primer": DEFAULT_PRIMER if primer is None else options.read_text(primer),
            "codec": codec,
            "blend": {
                "recompute_ratio": ratio,
                "policy": policy,
                "forced_tokens": forced_tokens,
                "mode": mode,
                "min_reused_tokens": min_reused_tokens,
            },
            "on_unsupported": on_unsupported,
        }
    )
    transfer = {**CONNECTOR_CONFIG, "kv_connector_extra_config": settings.to_extra_config()}
    arguments = ["--model", model, "--kv-transfer-config", json.dumps(transfer)]
    arguments += ["--middleware", f"{CheckParams.__module__}.{CheckParams.__name__}"]
    if not any(argument.startswith("--prefix-caching-hash-algo") for argument in context.args):
        arguments += ["--prefix-caching-hash-algo", "xxhash"]
    arguments += context.args
    if model.startswith((".", "/", "~")):
        resolve_model(model)  # a missing directory is a hub id to vLLM
    # Before vLLM's processes start: what is wrong is said in one line then, not in a hundred.
    vllm_config = _parse(arguments)
    if settings.on_unsupported == "refuse":
        check_supported(vllm_config)
    open_store(store, memory_bytes=0).close()
    os.environ[NUM_LAYERS_VARIABLE] = str(vllm_config.model_config.hf_text_config.num_hidden_layers)
    print_note(f"serving {model} with chunks of {store}, namespace {namespace}")
    sys.argv = ["cacheblend serve", *arguments]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def _parse(arguments: list[str]) -> Any:
    """VLLM's configuration.

    Raises:
        ConfigError: vLLM finds no such model, or refuses an argument's value.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cacheblend_rag.vllm.compat import server_arguments
    from cacheblend_rag.vllm.plugin import register

    register()
    parsed = server_arguments()(FlexibleArgumentParser()).parse_args(arguments)
    try:
        return EngineArgs.from_cli_args(parsed).create_engine_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"vLLM can't serve {parsed.model!r}: {' '.join(str(error).split())}") from error
