"""The `conveyor` command."""

from conveyor_client.cli._app import main

__all__ = ["main"]
