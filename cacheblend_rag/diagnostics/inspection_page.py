"""One prompt as a web page: its text, each token coloured by its deviation and marked if it was recomputed."""

from __future__ import annotations

import html
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cacheblend_rag.diagnostics.inspection import Inspection

_BINS, _WIDTH, _HEIGHT = 40, 800, 160


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page: one file that needs nothing else.

    Raises:
        OSError: the file can't be written.
    """
    path.write_text(page(inspection), "utf-8")


def page(inspection: Inspection) -> str:
    """The page as HTML. Whatever is in prompt and answer is shown as text."""
    stats = inspection.answer.stats
    held, most = inspection.held
    facts = {
        "prompt": f"{stats.prompt_tokens:,} tokens: {stats.reused_tokens:,} reused, {stats.recomputed_tokens:,} "
        f"recomputed, {stats.missed_tokens:,} missed, {stats.prefix_tokens:,} of an exact prefix",
        "chosen by": stats.policy or "the ratio: there was nothing to choose",
        "deviation": f"the recomputed tokens hold {held:.0%}; as many could hold {most:.0%}",
        "answer": inspection.answer.text.strip(),
    }
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
    template = Template(resources.files(__package__).joinpath("inspection.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape(f"A blend by {inspection.model}"),
        rows=rows,
        histogram=_histogram(inspection),
        tokens=_tokens(inspection),
    )


def _histogram(inspection: Inspection) -> str:
    logs = np.log10(np.maximum(inspection.relative**2, 1e-6))
    bins = np.linspace(logs.min(), max(logs.max(), logs.min() + 1e-3), _BINS + 1)
    all_of_them, _ = np.histogram(logs, bins)
    recomputed, _ = np.histogram(logs[inspection.is_recomputed], bins)
    unit, width = (_HEIGHT - 20) / max(int(all_of_them.max()), 1), _WIDTH / _BINS
    bars = []
    for number, (count, chosen) in enumerate(zip(all_of_them.tolist(), recomputed.tolist(), strict=True)):
        left, tall = number * width, _HEIGHT - 20
        for kind, bottom, top in (("recomputed", 0, chosen), ("reused", chosen, count)):
            if top > bottom:
                bars.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{tall - unit * top:.1f}" width="{width - 1:.1f}" '
                    f'height="{unit * (top - bottom):.1f}"><title>{top - bottom} {kind}</title></rect>'
                )
    ends = [f'<text x="0" y="{_HEIGHT - 4}">{10 ** bins[0]:.2g}</text>']
    ends.append(f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{10 ** bins[-1]:.2g} times the mean</text>')
    label = "Tokens by squared deviation: recomputed (blue) below reused (orange)"
    return (
        f'<svg class="bars" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%">'
        f"<title>{label}</title>{''.join(bars + ends)}</svg>"
    )


def _tokens(inspection: Inspection) -> str:
    relative = inspection.relative
    ranks = np.empty(len(relative))
    ranks[np.argsort(relative, kind="stable")] = np.arange(len(relative)) / max(len(relative) - 1, 1)
    at = {int(position): n for n, position in enumerate(inspection.positions)}
    prefix = inspection.answer.stats.prefix_tokens
    spans = []
    for position, piece in enumerate(inspection.pieces):
        text = html.escape(piece)
        n = at.get(position)
        if n is None:
            kind = "exact" if position < prefix else "missed"
            spans.append(f'<span class="{kind}" title="{position}: {kind}">{text}</span>')
            continue
        kind = "recomputed" if inspection.is_recomputed[n] else "reused"
        read = "" if inspection.read is None else f", the question reads {inspection.read[n]:.3g}"
        title = f"{position}: {kind}, deviation {relative[n]:.2f} times the mean{read}"
        shade = f"background:rgb(230 159 0 / {ranks[n] ** 3:.2f})"  # the upper third stands out
        spans.append(f'<span class="{kind}" style="{shade}" title="{title}">{text}</span>')
    return "".join(spans)
