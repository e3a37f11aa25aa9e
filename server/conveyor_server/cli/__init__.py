"""`conveyor-server`: reads the configuration and calls the app.

The command is installed with the client too, so what only the server's extra brings is imported
where it is used.
"""

from __future__ import annotations

import asyncio
import difflib
import os
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Column, Table

from conveyor.install import install_command
from conveyor_server.cli.importing import import_model
from conveyor_server.cli.output import fail, input_text, layer_text

if TYPE_CHECKING:
    from conveyor_models import Bundle
    from conveyor_server.config import Config

SERVER_EXTRA: Final = frozenset(
    {
        "grpc_health",
        "grpc_reflection",
        "prometheus_client",
        "pydantic",
        "pydantic_settings",
        "safetensors",
        "torch",
    }
)
"""Modules that the base install does not have."""
DIGEST_CHARS_SHOWN: Final = 19

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Looks at model bundles and makes them.", no_args_is_help=True)
app.add_typer(models_app, name="models")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", envvar="CONVEYOR_CONFIG", help="TOML file with one table a section."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; may be repeated."),
]
ModelsFolder = Annotated[Path | None, typer.Option("--models", help="The model repository.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"conveyor-server {metadata.version('conveyor')}")
        raise typer.Exit


@app.callback()
def whole_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Say the version and exit."
        ),
    ] = False,
) -> None:
    """Serves recurrent networks over gRPC and keeps their state between calls."""


@app.command()
def serve(
    config: ConfigFile = None,
    models: ModelsFolder = None,
    listen: Annotated[str | None, typer.Option(help="host:port of the gRPC services.")] = None,
    metrics: Annotated[str | None, typer.Option(help="host:port of the metrics.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.")] = None,
    settings: Settings = None,
) -> None:
    """Serves until SIGTERM, SIGINT or its terminal's end; SIGHUP looks for changed models.

    Exit status 2 if it cannot start, 1 if it stopped by a mistake of its own.
    """
    flags = _flags(settings)
    named = {
        "models.folder": models,
        "listen.address": listen,
        "listen.metrics_address": metrics,
        "engine.device": device,
    }
    flags |= {key: str(value) for key, value in named.items() if value is not None}
    _run_server(config, flags)


@app.command()
def check(
    config: ConfigFile = None, models: ModelsFolder = None, settings: Settings = None
) -> None:
    """Checks the configuration and every bundle, then says what would be served.

    The configuration includes the files and the device that it names, but not whether its
    addresses are free.

    Exit status 1 if a bundle is not sound or there is none, 2 if the configuration cannot be used
    or the folder of models cannot be read.
    """
    checked = _load(config, models, _flags(settings))
    from conveyor_server.cli.start import start_problems

    problems = start_problems(checked)
    if not problems:
        typer.echo("configuration: sound")
    models_sound = _show_models(checked.models.folder)
    for problem in problems:
        typer.echo(f"conveyor-server: {problem}", err=True)
    if problems:
        raise typer.Exit(2)
    if not models_sound:
        raise typer.Exit(1)


@app.command()
def doctor(
    config: ConfigFile = None,
    models: ModelsFolder = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Checks machine, installation, configuration, ports, device and models; says what to do.

    Exit status 1 if a server would not start or not keep its promises, else 0.
    """
    from conveyor_server.doctor import examine
    from conveyor_server.doctor.report import show

    flags = _flags(settings)
    if models is not None:
        flags |= {"models.folder": str(models)}
    if not show(examine(config, flags), as_json=as_json, say=typer.echo):
        raise typer.Exit(1)


@models_app.command("list")
def list_models(models: ModelsFolder = None, config: ConfigFile = None) -> None:
    """Lists the bundles of a repository.

    Exit status 1 if a bundle is not sound or there is none, 2 if the folder cannot be read.
    """
    if not _show_models(_load(config, models, {}).models.folder):
        raise typer.Exit(1)


@models_app.command("show")
def show_model(
    bundle: Annotated[
        str, typer.Argument(help="A bundle's folder, or NAME or NAME/VERSION in the repository.")
    ],
    models: ModelsFolder = None,
    config: ConfigFile = None,
) -> None:
    """Describes one bundle; of a name without a version, the latest."""
    from conveyor_models import BundleError, load_bundle

    named = re.fullmatch(r"([a-z0-9_-]+)(?:/(\d+))?", bundle)
    is_folder = named is None or (models is None and Path(bundle).is_dir())
    try:
        if named is None or is_folder:
            found = load_bundle(Path(bundle))
        else:
            version = None if named[2] is None else int(named[2])
            found = _find(_load(config, models, {}).models.folder, named[1], version)
    except BundleError as error:
        fail(str(error))
    typer.echo(found.spec.to_toml().rstrip())
    typer.echo(f"\n# digest {found.digest}")
    typer.echo(
        f"# {found.spec.weight_values:,} parameters,"
        f" {4 * found.spec.carry_values:,} bytes of carry for each session"
    )


models_app.command("import")(import_model)


def main() -> None:
    """The command's entry point."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in SERVER_EXTRA:
            raise
        fail(f"{missing}, which the server needs, is not installed: {install_command('server')}")


def _load(config: Path | None, models: Path | None, flags: dict[str, str]) -> Config:
    from conveyor_server.config import ConfigError, load_config

    if models is not None:
        flags = flags | {"models.folder": str(models)}
    try:
        return load_config(config, flags)
    except ConfigError as error:
        fail(str(error))


def _find(repository: Path, name: str, version: int | None) -> Bundle:
    from conveyor_models import load_bundle, scan

    listing = scan(repository)
    # In order of version, so that the last is the latest.
    of_name = [found for found in listing.bundles if found.spec.name == name]
    wanted = [found for found in of_name if version in (None, found.spec.version)]
    if wanted:
        return load_bundle(wanted[-1].path)
    if of_name:
        versions = ", ".join(str(found.spec.version) for found in of_name)
        problems = [f"no version {version} of {name}; it has {versions}"]
    else:
        close = difflib.get_close_matches(name, listing.names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems = [f"no sound bundle {name}{hint}", *(str(each) for each in listing.problems)]
    return fail("\n".join([f"{repository}: {problems[0]}", *problems[1:]]))


def _run_server(config: Path | None, flags: dict[str, str]) -> None:
    # gRPC writes lines of its own to standard error, where only JSON belongs: of each failed TLS
    # handshake, and, once a second, of too few descriptors. It reads this as it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from conveyor_server.app import App, ServerBroken, StartError
    from conveyor_server.config import ConfigError, load_config
    from conveyor_server.engine.devices import DeviceError
    from conveyor_server.logs import configure_logging
    from conveyor_server.rpc.server import AddressError

    try:
        loaded = load_config(config, flags)
        standard_error = configure_logging(loaded.log.level)
        asyncio.run(App(loaded, standard_error).run())
    except (ConfigError, StartError, DeviceError, AddressError) as error:
        fail(str(error))
    except ServerBroken as error:
        fail(str(error), status=1)


def _show_models(folder: Path) -> bool:
    """Prints a repository.

    Returns whether every bundle in it is sound and there is at least one.
    """
    from conveyor_models import BundleError, load_bundle, scan

    table = Table(
        "model",
        Column("version", justify="right"),
        "input",
        Column("output", justify="right"),
        "layers",
        Column("weights", justify="right"),
        # The other columns give way, for half a digest cannot be compared with anything.
        Column("digest", no_wrap=True, overflow="fold"),
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    problems: list[str] = []
    bundles = 0
    try:
        listing = scan(folder)
    except BundleError as error:
        fail(str(error))
    problems += [str(problem) for problem in listing.problems]
    for found in listing.bundles:
        try:
            bundle = load_bundle(found.path)
        except BundleError as error:
            problems.append(str(error))
            continue
        bundles += 1
        spec = bundle.spec
        table.add_row(
            spec.name,
            str(spec.version),
            input_text(spec),
            f"{spec.output_size:,}",
            "\n".join(layer_text(layer) for layer in spec.layers),
            f"{spec.weight_values:,}",
            bundle.digest[:DIGEST_CHARS_SHOWN],
        )
    if bundles:
        Console().print(table)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if not bundles:
        typer.echo(f"problem: {folder}: no bundle there", err=True)
    return bool(bundles) and not problems


def _flags(settings: list[str] | None) -> dict[str, str]:
    flags: dict[str, str] = {}
    for setting in settings or []:
        path, equals, value = setting.partition("=")
        if not equals:
            fail(f"--set {setting}: expected SECTION.KEY=VALUE, as in limits.sessions_max=100")
        flags[path] = value
    return flags
