"""``conveyor models``: what the server has loaded."""

from typing import Annotated

import typer
from rich.table import Table

from conveyor_client._nouns import ModelInfo, TensorSignature
from conveyor_client.cli._common import (
    AsJson,
    details_table,
    list_table,
    print_json,
    say,
    show,
    size_text,
)
from conveyor_client.cli._connection import Connection, connecting

app = typer.Typer(help="Looks at the models a server has loaded.", no_args_is_help=True)


@app.command("list")
@connecting
def list_models(
    connection: Connection,
    as_json: AsJson = False,
) -> None:
    """Lists the models."""

    async def act() -> None:
        async with connection.client() as client:
            models = [model async for model in client.models()]
        if as_json:
            print_json(models)
            return
        if not models:
            say("no models")
            return
        table = list_table(
            *("model", "version", "input", "output", "layers", "sessions", "slots", "device"),
            whole=("model", "device"),
        )
        for model in models:
            table.add_row(
                model.name,
                str(model.version) + (" (newest)" if model.newest else ""),
                _side(model.input),
                _side(model.output),
                _stack(model),
                str(model.sessions),
                str(model.slots),
                model.device,
            )
        show(table)

    connection.run(act)


@app.command("show")
@connecting
def show_model(
    connection: Connection,
    name: str,
    version: Annotated[int, typer.Option(help="0 means the newest.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Describes one model."""

    async def act() -> None:
        async with connection.client() as client:
            model = await client.model(name, version)
        if as_json:
            print_json(model)
        else:
            show(_details(model))

    connection.run(act)


def _details(model: ModelInfo) -> Table:
    rows = {
        "model": f"{model.name}, version {model.version}",
        "digest": model.digest,
        "description": model.description,
        "input": _side(model.input),
        "input labels": _labels(model.input),
        "output": f"{_side(model.output)}, {model.output_activation or 'no'} activation",
        "output labels": _labels(model.output),
        "memory": _memory(model),
        "embedding": str(model.embedding_size) if model.embedding_size else "none",
        "layers": _stack(model),
        "parameters": f"{model.parameters:,}",
        "carry of a session": size_text(model.carry_bytes),
        "sessions / slots": f"{model.sessions} / {model.slots}",
        "device": model.device,
        "steps in a chunk": f"at most {model.limits.chunk_steps_max}",
        "steps in flight": f"at most {model.limits.steps_in_flight_max}",
        "bytes in a message": f"at most {size_text(model.limits.message_bytes_max)}",
        "idle time": f"{model.limits.idle_seconds_default:g} s,"
        f" at most {model.limits.idle_seconds_max:g} s",
    }
    return details_table(rows)


def _side(side: TensorSignature) -> str:
    if side.is_tokens:
        return f"tokens below {side.vocabulary_size}"
    return f"{side.row_elements} x {side.element_type}"


def _memory(model: ModelInfo) -> str:
    if model.memory is None:
        return "none"
    return f"{_side(model.memory)} in a row, at most {model.limits.memory_rows_max} rows"


def _labels(side: TensorSignature) -> str:
    return " ".join(repr(label)[1:-1] for label in side.labels) or "none"


def _stack(model: ModelInfo) -> str:
    return ", ".join(
        f"{layer.cell} {layer.size}" + (f" -> {layer.projection}" if layer.projection else "")
        for layer in model.layers
    )
