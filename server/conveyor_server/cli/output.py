"""What the commands say about models, and how they end when they fail."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from conveyor_models import Layer, ModelSpec


def input_text(spec: ModelSpec) -> str:
    """As in "7 tokens"."""
    return f"{spec.input.size:,} {spec.input.kind}"


def layer_text(layer: Layer) -> str:
    """As in "lstm 64 -> 24": its cells, and what it projects them to; then its options."""
    projected = f" -> {layer.projection_size}" if layer.projection_size else ""
    options = "".join(f", {key} {value}" for key, value in layer.options.items())
    return f"{layer.cell} {layer.size}{projected}{options}"


def fail(message: str, status: int = 2) -> NoReturn:
    """Says what is wrong, each line with the command's name before it, and exits."""
    for line in message.splitlines():
        typer.echo(f"conveyor-server: {line}", err=True)
    sys.exit(status)
