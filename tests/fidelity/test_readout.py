"""What becomes of logits where the rows of a softmax have to be whole lanes, as on CUDA devices."""

from __future__ import annotations

import pytest
import torch

from conveyor_server.engine.packing import LANE
from conveyor_server.engine.readout import whole_lanes

SIZES = (1, 3, 31, 32, 33, 9_216, 9_217, 9_218, 9_220, 20_001)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_whole_lanes_change_no_probability(function: str, size: int) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 8
    wide = whole_lanes(logits)
    assert wide.is_contiguous()
    assert wide.shape[1] % LANE == 0
    assert wide.shape[1] - size < LANE
    found = getattr(wide, function)(dim=1)
    expected = getattr(logits.double(), function)(dim=1)
    assert torch.isfinite(found[:, :size]).all()
    torch.testing.assert_close(found[:, :size].double(), expected, rtol=1e-5, atol=1e-6)
    behind = found[:, size:]
    assert (behind == (0 if function == "softmax" else -torch.inf)).all()


def test_rows_cut_out_of_wider_ones_become_whole_lanes() -> None:
    wide = torch.randn(4, 64)
    padded = whole_lanes(wide[:, :33])
    assert padded.stride() == (64, 1)
    assert torch.equal(padded[:, :33], wide[:, :33])
    assert torch.isneginf(padded[:, 33:]).all()
