"""``cacheblend inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.asking import messages, retrieve, what_store_lacks
from cacheblend_rag.cli.console import print_json, print_note, working
from cacheblend_rag.cli.tracing import trace_as_text


def inspect(
    model: options.Model,
    store: options.Store,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask the corpus.")] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the prompt, its tokens coloured, as a page.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Draw a histogram and a map of the deviations (.png or .svg)."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Most passages to retrieve.")] = 6,
    ratio: options.Ratio = 0.15,
    policy: Annotated[str, typer.Option(help="How tokens are chosen for that.")] = "query_aware",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 32,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The whole prompt, instead of a question and retrieval; - is stdin."),
    ] = None,
    namespace: options.Namespace = "default",
    primer: options.Primer = None,
    codec: options.Codec = "raw",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Show which tokens of a prompt a blend recomputes, and how far each one's known KV is from full prefill's.

    The model runs in this process, and reads the prompt twice: by blending, and by full prefill.
    """
    if (question is None) == (prompt_file is None):
        raise typer.BadParameter("give either a QUESTION or --prompt-file")
    for path in filter(None, (page, picture)):
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent}")
    from cacheblend_rag import BlendConfig
    from cacheblend_rag.diagnostics.inspection import inspect_prompt
    from cacheblend_rag.diagnostics.inspection_page import write_page
    from cacheblend_rag.diagnostics.pictures import check_matplotlib, check_picture_name

    if picture is not None:
        check_picture_name(picture)
        check_matplotlib()
    prompt = None if prompt_file is None else options.read_text(prompt_file)
    options.require_store(store)
    with options.open_engine(
        model,
        store,
        engine="transformers",
        base_url=None,
        namespace=namespace,
        codec=codec,
        primer=primer,
        dtype=dtype,
        device=device,
        blend=BlendConfig(recompute_ratio=ratio, policy=policy),
    ) as loaded:
        from cacheblend_rag.engines.transformers import TransformersEngine

        assert isinstance(loaded, TransformersEngine)
        if prompt is None:
            assert question is not None  # one of both is given
            prompt = loaded.render_chat(messages(question, retrieve(loaded, "transformers", store, question, top_k)))
        if lacking := what_store_lacks(loaded, "transformers", store):
            print_note(f"note: {lacking}")
        with working("reading the prompt twice"):
            found = inspect_prompt(loaded, prompt, max_tokens=max_tokens)
    if page is not None:
        write_page(found, page)
    if picture is not None:
        from cacheblend_rag.diagnostics.inspection_plot import plot_inspection

        plot_inspection(found, picture)
    held, most = found.held
    if json:
        assert found.answer.trace is not None
        print_json(
            {
                "answer": found.answer.text,
                "stats": found.answer.stats.to_dict(),
                "trace": found.answer.trace.to_dict(),
                "deviation": {"held_by_recomputed": held, "most_that_as_many_hold": most},
            }
        )
        return
    typer.echo(trace_as_text(found.answer).lstrip("\n"))
    typer.echo(f"  they hold {held:.1%} of the deviation from full prefill; as many could hold {most:.1%}")
    for path in filter(None, (page, picture)):
        typer.echo(f"written to {path}")
