"""The servers of the integration tests, with few models, as many of them are started."""

from pathlib import Path
from typing import Final

import pytest

from tests.integration.bundles import MODELS, add_model
from tests.integration.conftest import rows, start_server

__all__ = ["rows", "start_server"]

SERVED: Final = ("tiny", "broad", "heavy", "words")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    folder = tmp_path_factory.mktemp("repository")
    for name in SERVED:
        add_model(folder, name, MODELS[name])
    return folder
