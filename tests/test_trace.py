"""What is told of a blend goes over the wire and comes back."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.trace import BlendTrace, Measured

pairs = st.dictionaries(st.integers(0, 10**6), st.floats(0, 2.0**90, width=32))
measured = pairs.map(
    lambda found: Measured(np.array(sorted(found), np.int64), np.array(list(found.values()), np.float32))
)
traces = st.builds(
    BlendTrace,
    st.lists(st.integers(0, 10**6), unique=True).map(lambda chosen: np.array(sorted(chosen), np.int64)),
    st.dictionaries(st.integers(0, 99), measured, max_size=3),
    st.none() | measured,
)


@given(traces)
def test_as_json_and_back(trace: BlendTrace) -> None:
    again = BlendTrace.from_dict(json.loads(json.dumps(trace.to_dict(), allow_nan=False)))
    assert again.recomputed.dtype == np.int64
    assert again.recomputed.tolist() == trace.recomputed.tolist()
    assert list(again.deviations) == list(trace.deviations)
    assert (again.read is None) == (trace.read is None)
    for mine, theirs in [
        *((again.deviations[layer], trace.deviations[layer]) for layer in trace.deviations),
        *([(again.read, trace.read)] if again.read is not None and trace.read is not None else []),
    ]:
        assert mine.positions.dtype == np.int64
        assert mine.values.dtype == np.float32
        assert mine.positions.tolist() == theirs.positions.tolist()
        assert mine.values.tolist() == theirs.values.tolist()


def test_what_is_not_finite_is_json_all_the_same() -> None:
    odd = BlendTrace(np.arange(2), {}, Measured(np.arange(3), np.array([np.nan, 1, np.inf], np.float32)))
    text = json.dumps(odd.to_dict(), allow_nan=False)
    again = BlendTrace.from_dict(json.loads(text)).read
    assert again is not None
    assert np.isfinite(again.values).tolist() == [False, True, False]


def test_the_range_of_what_was_chosen() -> None:
    early, late = (Measured(np.arange(2, 8), np.arange(6, dtype=np.float32) + add) for add in (0, 10))
    chosen = np.array([0, 3, 7])  # the first one was not measured
    assert BlendTrace(chosen, {4: late, 1: early}, None).score_range == (11, 15)
    assert BlendTrace(chosen, {}, late).score_range == (11, 15)
    assert BlendTrace(chosen, {1: early}, late).score_range == ()  # it went by neither alone
    assert BlendTrace(chosen, {}, None).score_range == ()
    assert BlendTrace(chosen[:1], {1: early}, None).score_range == ()
