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
        forward.question_attention(rows, rows[-9:], range(1, forward.num_layers))
        assert forward.exact_tokens == 25
        forward.deviations(torch.arange(25, 60), 1)
        assert forward.exact_tokens == 25
