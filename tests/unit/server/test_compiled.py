"""Kernels are compiled all the same where the result cannot be kept for the next process."""

# numba has no types that pyright could read.
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false

from __future__ import annotations

import errno
from typing import Any

import pytest
from numba.core import caching

from conveyor_server.engine.compiled import _compiled


@pytest.mark.parametrize(
    ("holder", "method", "error"),
    [
        ("CacheImpl", "__init__", RuntimeError("no locator available")),
        ("IndexDataCacheFile", "save", OSError(errno.ENOSPC, "No space left on device")),
    ],
    ids=["no folder", "a full disk"],
)
def test_what_cannot_be_kept_is_compiled_all_the_same(
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
