"""What ``--trace`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cacheblend_rag.stats import Generation


def trace_as_text(answer: Generation) -> str:
    """Where the time to the first token went, and what was recomputed of which chunk."""
    from cacheblend_rag.diagnostics.timeline import parts_of

    stats, trace = answer.stats, answer.trace
    if not stats.ttft:
        return f"\n{stats.reason}"
    lines = ["", "time to the first token"]
    for part, seconds in parts_of(stats).items():
        lines.append(f"  {part.replace('_', ' '):<12}{1000 * seconds:>10.1f} ms {seconds / stats.ttft:>6.1%}")
    lines.append(f"  {'in all':<12}{1000 * stats.ttft:>10.1f} ms")
    if trace is None:
        why = "the engine told nothing" if stats.decision == "blend" else "nothing was blended"
        return "\n".join([*lines, "", "recomputed", f"  {why}"])
    scores = " to ".join(f"{score:.3g}" for score in trace.score_range)
    matched = stats.reused_tokens + stats.recomputed_tokens
    lines += ["", "recomputed", f"  {stats.recomputed_tokens:,} of {matched:,} matched tokens"]
    lines[-1] += f" ({stats.recomputed_tokens / matched:.1%})" if matched else ""
    lines[-1] += f" by {stats.policy}, scores {scores}" if scores else ""
    for segment in answer.segments:
        chosen = int(((trace.recomputed >= segment.start) & (trace.recomputed < segment.end)).sum())
        where = f"{segment.start:,} to {segment.end - 1:,}"
        lines.append(f"  {chosen:>6,} of {segment.length:,} at {where}, chunk {segment.key[:12]}")
    return "\n".join(lines)
