"""`conveyor-server models import`: a model of another framework becomes a bundle."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conveyor_server.cli.output import fail, input_text, layer_text

if TYPE_CHECKING:
    from conveyor_models import Bundle
    from conveyor_models.importers import ImportedModel


def import_model(
    file: Annotated[
        Path,
        typer.Argument(
            help="State dict (.safetensors, .pt, .pth, .bin, .ckpt), .onnx, .keras or .h5 of Keras."
        ),
    ],
    name: Annotated[str, typer.Option(help="What the model is called here.")],
    into: Annotated[Path, typer.Option(help="The model repository; made if it is not there.")],
    version: Annotated[
        int | None,
        typer.Option(min=1, help="To NAME/VERSION/; without it to NAME/, as version 1."),
    ] = None,
    description: Annotated[str, typer.Option(help="For model.toml.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="A bundle that is there gives way.")
    ] = False,
    cell: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODULE=]KIND",
            help="State dict: rnn-tanh or rnn-relu, which shapes do not tell; may be repeated.",
        ),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            metavar="A,B,C",
            help="State dict: the modules from the input to the output, every one or the recurrent"
            " ones alone. Heads side by side: A,B+C.",
        ),
    ] = "",
    between: Annotated[
        str | None,
        typer.Option(
            help="State dict: none, if nothing that computes lies between the modules of --order."
            " Dropout is nothing, a ReLU is not.",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(help="State dict: the module that is the nn.Embedding; none: there is none."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="State dict: the module that is the nn.Linear at the end. Several side by side:"
            " A,B, in the order of their outputs."
        ),
    ] = None,
    initial_state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODULE.]h=TENSOR",
            help="State dict: the parameter that every session begins with; c=TENSOR for the cell"
            " state of an LSTM; may be repeated.",
        ),
    ] = None,
    epsilon: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODULE=]NUMBER",
            help="State dict: eps of an nn.BatchNorm1d, 1e-05 unless it was set; may be repeated.",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="State dict: what comes last: softmax, log_softmax, sigmoid or none."),
    ] = None,
) -> None:
    """Makes a bundle of a model of PyTorch, ONNX or Keras 3.

    What a bundle cannot express exactly is refused by name and nothing is written; exit status 2.
    """
    from conveyor_models import AmbiguousModuleError, BundleError, add_bundle
    from conveyor_models.importers import (
        ImportOptions,
        parse_cells,
        parse_epsilon,
        parse_initial_state,
        parse_names,
    )
    from conveyor_models.importers import import_model as read_model

    if activation not in (None, "none", "softmax", "log_softmax", "sigmoid"):
        fail(f"--activation {activation}: expected none, softmax, log_softmax or sigmoid")
    try:
        options = ImportOptions(
            cells=parse_cells(cell or []),
            order=parse_names(order),
            between=between,
            embedding=embedding,
            head=head,
            activation=activation,
            epsilon=parse_epsilon(epsilon or []),
            initial_state=parse_initial_state(initial_state or []),
        )
        found = read_model(file, options)
        spec = found.spec(name, version or 1, description)
        bundle = add_bundle(
            into, spec, found.weights, versioned=version is not None, replace=replace
        )
    except AmbiguousModuleError as error:
        lines = [_command_line(sys.argv[1:], answer) for answer in error.answers]
        fail("\n  ".join([f"{file}: {error}", *lines]))
    except BundleError as error:
        said = str(error)
        fail(said if error.path is not None else f"{file}: {said}")
    _show(bundle, found)


def _command_line(given: Sequence[str], answer: Sequence[str]) -> str:
    """The command as it was given, with the options of an answer in it."""
    kept: list[str] = []
    words = iter(given)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in answer:
            kept.append(word)
        elif not equals:
            next(words, None)
    return shlex.join(["conveyor-server", *kept, *answer])


def _show(bundle: Bundle, found: ImportedModel) -> None:
    spec = bundle.spec
    typer.echo(f"{spec.name} version {spec.version} -> {bundle.path}")
    embedded = "" if spec.embedding is None else f", embedding {spec.embedding.size:,}"
    typer.echo(f"  input   {input_text(spec)}{embedded}")
    for layer, known in zip(spec.layers, found.layers, strict=True):
        typer.echo(f"  layer   {layer_text(layer)}  (from {known.name})")
    if spec.head is not None:
        typer.echo(f"  head    {spec.head.size:,}{'' if spec.head.bias else ', no bias'}")
    typer.echo(f"  output  {spec.output_size:,}, activation {spec.output.activation}")
    typer.echo(f"  weights {spec.weight_values:,}")
    typer.echo(f"  digest  {bundle.digest}")
    if not spec.streamable:
        typer.echo("note: a layer runs from the end, so Predict runs it and sessions do not")
    for note in found.notes:
        typer.echo(f"note: {note}")
