"""Kernels are compiled all the same where their cache is of no use."""

# numba has no types that pyright could read.
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false

from __future__ import annotations

import errno
import pickle
from typing import Any

import pytest
from numba.core import caching

from conveyor_server.engine.compiled import _compiled


@pytest.mark.parametrize(
    ("holder", "method", "error"),
    [
        ("CacheImpl", "__init__", RuntimeError("no locator available")),
        ("IndexDataCacheFile", "save", OSError(errno.ENOSPC, "No space left on device")),
        ("IndexDataCacheFile", "load", pickle.UnpicklingError("pickle data was truncated")),
    ],
    ids=["no folder", "a full disk", "a damaged file"],
)
def test_without_a_cache_kernels_are_compiled_all_the_same(
    holder: str, method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Exception] = []

    def fail(*_: Any) -> None:
        met.append(error)
        raise error

    def twice(x: float) -> float:
        return 2 * x

    monkeypatch.setattr(getattr(caching, holder), method, fail)
    assert _compiled("float64(float64)")(twice)(21.0) == 42.0
    assert met
