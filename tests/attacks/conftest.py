"""The servers of the integration tests."""

from tests.integration.conftest import _one_thread, repository, rows, start_server

__all__ = ["_one_thread", "repository", "rows", "start_server"]
