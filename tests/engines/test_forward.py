"""What a partial pass leaves behind."""

from __future__ import annotations

import numpy as np
import torch

from .conftest import Case


def test_only_rows_that_follow_without_a_gap_become_exact(case: Case) -> None:
    ids = np.arange(60, dtype=np.int32)
    forward = case.engine._reader._forward(ids, case.engine._loaded.empty_kv(60))
    with torch.inference_mode():
        forward.recompute(torch.arange(10))
        assert forward.exact_tokens == 10
        forward.recompute(torch.cat([torch.arange(12, 20), torch.arange(10, 11)]).sort().values)
        assert forward.exact_tokens == 11
        forward.recompute(torch.arange(11, 20))
        assert forward.exact_tokens == 20
        rows = torch.cat([torch.arange(20, 25), torch.arange(26, 60)])
        forward._kv[:, :, 25] = 0.5
        forward.question_attention(rows, torch.ones(9), range(1, forward.num_layers), rows[:0])
        assert forward.exact_tokens == 25
        forward.deviations(torch.arange(25, 60), 1)
        assert forward.exact_tokens == 25


def test_the_question_sees_what_has_kv(case: Case) -> None:
    """As the untouched model does that is given these tokens only, at their positions."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, case.reference.config.vocab_size, (600,), generator=generator)
    unread = torch.cat([torch.arange(128, 256), torch.arange(384, 512)])
    seen = torch.arange(600)[~torch.isin(torch.arange(600), unread)]
    rows = torch.cat([torch.arange(260, 270), torch.arange(520, 525), torch.arange(570, 600)])
    weights, layers = torch.rand(20, generator=generator), range(1, case.engine.num_layers)
    forward = case.engine._reader._forward(ids.numpy().astype(np.int32), case.engine._loaded.empty_kv(600))
    with torch.inference_mode():
        expected = case.reference(ids[seen][None], position_ids=seen[None], output_attentions=True, use_cache=True)
        others = torch.isin(seen, rows, invert=True)
        for layer, cached in zip(forward._kv, expected.past_key_values.layers, strict=True):
            for kv, theirs in zip(layer, (cached.keys, cached.values), strict=True):
                kv[seen[others]] = theirs[0].transpose(0, 1)[others]
        found = forward.question_attention(rows, weights, layers, unread)
    given = torch.zeros(len(seen))
    for layer in layers:
        attention, norms = expected.attentions[layer][0], expected.past_key_values.layers[layer].values[0].norm(dim=-1)
        norms = norms.repeat_interleave(len(attention) // len(norms), dim=0)
        given += (attention[:, -20:] * weights[:, None] * norms[:, None]).mean(dim=0).sum(dim=0) / len(layers)
    assert ((found[seen] - given).abs().max() / given.max()) < 1e-5
    assert found[unread].count_nonzero() == 0
    for layer, cached in zip(forward._kv, expected.past_key_values.layers, strict=True):
        written = layer[0][rows]
        assert (written - cached.keys[0].transpose(0, 1)[~others]).abs().max() < 1e-3
    assert forward._kv[:, :, unread].isnan().all()
