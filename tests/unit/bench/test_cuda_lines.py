"""The CUDA lines of the bench, as far as a CPU can run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import contenders, cuda
from bench.contenders import Contender

CPU = torch.device("cpu")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_engine_and_the_module_beside_it_compute_the_same(cell: str, steps: int) -> None:
    x = contenders.random_input(steps, 5, 17)
    with torch.no_grad():
        found = cuda.contenders(cell, 17, x, CPU)
        (line,) = contenders.measure(
            "a line", found, 5 * steps, rounds=2, seconds=0.001, by_clock=True
        )
    assert (line.subject, line.comparator) == ("conveyor", f"nn.{cell.upper()}")
    assert len(line.subject_rounds) == len(line.comparator_rounds) == 2
    assert line.ratio > 0


def test_a_comparator_that_computes_something_else_is_refused() -> None:
    x = contenders.random_input(2, 5, 17)
    with torch.no_grad():
        found = cuda.contenders("lstm", 17, x, CPU)
        off = Contender("off", found[1].run, lambda y: y.numpy() + np.float32(0.001))
        with pytest.raises(AssertionError, match="off"):
            contenders.measure("a line", [found[0], off], 10, rounds=1, seconds=0.001)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_bench_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "cuda"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 1
    assert "there is no CUDA device to measure" in done.stderr
    assert "Traceback" not in done.stderr
